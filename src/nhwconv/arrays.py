"""Memory: aligned arrays for results and workspaces, and reuse of large ones.

Fresh memory costs a page fault for every page that is touched, which can take longer than a depthwise layer. malloc
keeps what is freed up to some 32 MiB and gives more back to the system at once. So large buffers are kept here when
their arrays die, a bounded amount of them, and the next array of such a size gets one.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import deque
from typing import Any, cast

import numpy as np
import numpy.typing as npt

__all__ = ["ALIGNMENT", "Array", "empty", "release", "values_are_data"]

Array = npt.NDArray[Any]

#: A cache line and the widest vector: an aligned array is worth up to 1.4 times in cache.
ALIGNMENT = 64
#: From this many bytes on buffers are reused, and so many bytes of unused ones are kept at most.
REUSED_FROM = 2**20
KEPT = 256 * 2**20

#: NaN and Inf flow through, and what a dtype cannot hold becomes Inf: NumPy must not warn of either.
values_are_data = np.errstate(over="ignore", invalid="ignore")


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an uninitialised C-contiguous array that starts at a multiple of 64 bytes."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < 4096:  # too small for alignment to pay for itself
        return np.empty(shape, dtype)
    if nbytes < REUSED_FROM:
        raw = _buffers.new(nbytes)
        return np.ndarray(shape, dtype, raw, -raw.ctypes.data % ALIGNMENT)
    raw = _buffers.take(nbytes)
    # The array's base is an object that can be watched; when the last view is gone, the buffer comes back.
    handle: Any = (ctypes.c_char * raw.nbytes).from_buffer(cast("Any", raw))
    weakref.finalize(handle, _buffers.give_back, raw).atexit = False
    return np.ndarray(shape, dtype, handle, -raw.ctypes.data % ALIGNMENT)


def release() -> None:
    """Give all unused buffers back to the system."""
    _buffers.clear()


class _Buffers:
    """Unused buffers, oldest first.

    There is no lock: `give_back` may run inside any allocation, when Python collects garbage. Each step on the deque is
    atomic, and a buffer is in one place at a time, so the worst that threads do to one another is a missed reuse.
    """

    def __init__(self) -> None:
        self._unused: deque[npt.NDArray[np.uint8]] = deque()

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return a buffer for `nbytes` and their alignment: an unused one, at most a quarter larger, or a new one."""
        for _ in range(len(self._unused)):
            try:
                raw = self._unused.popleft()
            except IndexError:
                break
            if nbytes + ALIGNMENT <= raw.nbytes <= nbytes + nbytes // 4 + ALIGNMENT:
                return raw
            self._unused.append(raw)
        return self.new(nbytes)

    def new(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return a new buffer for `nbytes` and their alignment."""
        try:
            return np.empty(nbytes + ALIGNMENT, np.uint8)
        except MemoryError:
            self.clear()  # what is kept may be what is missing
            return np.empty(nbytes + ALIGNMENT, np.uint8)

    def give_back(self, raw: npt.NDArray[np.uint8]) -> None:
        """Keep a buffer for later; the oldest go where there are too many."""
        self._unused.append(raw)
        while sum(buffer.nbytes for buffer in tuple(self._unused)) > KEPT:
            try:
                self._unused.popleft()
            except IndexError:
                break

    def clear(self) -> None:
        """Forget all unused buffers."""
        self._unused.clear()


_buffers = _Buffers()
