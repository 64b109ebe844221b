"""Plans made anew: what a test changes about the package shows in programs that are made after the change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import nhwconv as nc
from nhwconv import planning


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
