"""How many threads compute: Numba's, and BLAS's as many, so that strategies which use either can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba
from threadpoolctl import ThreadpoolController, threadpool_limits

from ..runtime import machine

__all__ = ["blas_follows", "set_threads", "threads"]


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute with so many threads, Numba's present number by default, and as many of BLAS; then as before.

    Raises
    ------
    ValueError
        Where Numba cannot have so many.
    """
    before = machine.threads()
    numba.set_num_threads(before if number is None else number)
    try:
        with threadpool_limits(machine.threads(), user_api="blas"):
            yield
    finally:
        numba.set_num_threads(before)


def set_threads(number: int) -> None:
    """Compute with so many threads from now on."""
    numba.set_num_threads(number)
    threadpool_limits(number, user_api="blas")


def blas_follows() -> bool:
    """Return whether the threads of NumPy's BLAS can be limited: those of macOS's own cannot."""
    return bool(ThreadpoolController().select(user_api="blas").info())
