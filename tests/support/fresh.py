"""Plans made anew: what a test changes about the package shows in programs that are made after the change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

import nhwconv as nc
from nhwconv import planning
from nhwconv.runtime import machine


def forget() -> None:
    """Forget every plan and program."""
    nc.ops.forget_plans()
    planning._bias_program.cache_clear()


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes (of, name, value) for a block, whose plans are its own."""
    with pytest.MonkeyPatch.context() as patch:
        for of, name, value in changes:
            patch.setattr(of, name, value)
        forget()
        try:
            yield
        finally:
            forget()


def workers(count: int, *more: tuple[Any, str, Any]) -> AbstractContextManager[None]:
    """Give every program, however small, so many workers at most, and set `more` attributes."""
    machine.threads()  # they start when they are asked for, and from now on they are not
    return patched((machine, "threads", lambda: count), (machine, "SERIAL_CYCLES", 0), *more)


def past_the_caches() -> AbstractContextManager[None]:
    """Let results of any size be stored past the caches, where the algorithm allows it; a vector counts as a line."""
    return patched((machine, "STREAM_BYTES", 0), (machine, "LINE", machine.vector_bytes()))
