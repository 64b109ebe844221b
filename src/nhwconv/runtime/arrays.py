"""Memory: arrays for results and workspaces, and reuse of large ones.

Fresh memory costs a page fault for every page that is touched, which can take longer than a depthwise layer. malloc
keeps what is freed up to some 32 MiB, but gives more back to the system at once, and what several results leave free
together. So large buffers are kept here when their arrays die, a bounded amount of them, and the next array of such a
size gets one. With plain arrays instead, four results that live together took 1.3 times as long at 1.5 to 25 MiB each,
and one of 55 MiB 2.3 times as long. Smaller arrays are NumPy's own: that they are not aligned costs less than to align
them.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ALIGNMENT", "Array", "address", "apart", "empty", "release", "scratch", "values_are_data"]

Array = npt.NDArray[Any]

#: A cache line and the widest vector.
ALIGNMENT = 64
#: A prefetcher reads on behind what a core reads, up to the end of a page.
PAGE = 4096
#: From this many bytes on arrays are aligned and buffers reused, and so many bytes of unused ones are kept at most.
#: Smaller ones are cheap to get anew; and Ctrl-C in the middle of giving one back, which Python can only print, would
#: be likelier.
REUSED_FROM = 2**20
KEPT = 256 * 2**20

#: NaN and Inf flow through, and what a dtype cannot hold becomes Inf or zero: NumPy must not warn of it, nor raise.
values_are_data = np.errstate(all="ignore")

_BYTE = np.dtype(np.uint8)
#: A forked child must not share it; Windows has no such flags, and no forks.
_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an uninitialised C-contiguous array; a large one is a view of a buffer, at a multiple of 64 bytes."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < REUSED_FROM:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, _buffers.take(nbytes))


def address(array: Array) -> int:
    """Return where an array's data is; `array.ctypes` imports something each time, which fails as Python ends."""
    return int(array.__array_interface__["data"][0])


def scratch(nbytes: int) -> Array:
    """Return so many bytes from the first multiple of `ALIGNMENT` in them on."""
    if nbytes < REUSED_FROM:
        return np.empty(nbytes + ALIGNMENT, _BYTE)
    return _scratch.take(nbytes)


def apart(elements: int, itemsize: int) -> int:
    """Return how far from one worker to the next its scratch of so many elements has to lie.

    That is a page more than it takes. Closer, the prefetcher of one core asks again and again for lines that another is
    about to write; on a CPU whose cores share no cache that cost a small layer a quarter of its speed.
    """
    return -(-elements * itemsize // ALIGNMENT) * ALIGNMENT // itemsize + PAGE // itemsize if elements else 0


def release() -> None:
    """Give all unused buffers back to the system."""
    _buffers.clear()
    _scratch.clear()


class _Buffer(np.ndarray):
    """Aligned memory. Its type keeps NumPy from naming what lies below it as the base of a view."""

    pool: _Buffers


class _Lease(np.ndarray):
    """A buffer in use: the base of the array that is made of it, and so of all its views."""

    def __del__(self) -> None:
        """When the last view is gone, the buffer is free again; when Python ends, modules go first."""
        if _buffers is not None:
            buffer: Any = self.base
            buffer.pool.give_back(buffer)


class _Buffers:
    """Unused buffers by their size.

    There is no lock: `give_back` may run inside any allocation, when Python collects garbage. Each step on a list or
    the dictionary is atomic, and a buffer is in one place at a time, so the worst that threads do to one another is a
    missed reuse.
    """

    def __init__(self) -> None:
        self._unused: dict[int, list[Any]] = {}

    def take(self, nbytes: int) -> _Lease:
        """Return memory for `nbytes`: the smallest unused buffer, at most a quarter larger, or a new one."""
        least, step = _rounded(nbytes)
        found = self._of_size(range(least, nbytes + nbytes // 4 + 1, step))
        return self._lease(self.new(least)) if found is None else found

    def _of_size(self, sizes: Iterable[int]) -> _Lease | None:
        """Return an unused buffer of the first of these sizes that there is one of."""
        for size in sizes:
            try:
                return self._lease(self._unused[size].pop())
            except LookupError:
                continue
        return None

    @staticmethod
    def _lease(buffer: Any) -> _Lease:
        return _Lease(buffer.shape, _BYTE, buffer)

    def new(self, size: int) -> _Buffer:
        """Return a new buffer."""
        try:
            raw = self._memory(size + ALIGNMENT)
        except MemoryError:
            release()  # what is kept may be what is missing
            raw = self._memory(size + ALIGNMENT)
        buffer = _Buffer((size,), _BYTE, raw, -address(raw) % ALIGNMENT)
        buffer.pool = self
        return buffer

    @staticmethod
    def _memory(nbytes: int) -> Array:
        return np.empty(nbytes, _BYTE)

    def give_back(self, buffer: Any) -> None:
        """Keep a buffer for later; where there are too many, some of the size that has been known longest go."""
        self._unused.setdefault(buffer.size, []).append(buffer)
        while self.nbytes() > KEPT:
            for unused in tuple(self._unused.values()):
                try:
                    unused.pop()
                except IndexError:  # none of this size, or another thread has just taken it
                    continue
                break

    def nbytes(self) -> int:
        """Return the bytes of all unused buffers."""
        return sum(size * len(unused) for size, unused in tuple(self._unused.items()))

    def clear(self) -> None:
        """Forget all unused buffers."""
        self._unused.clear()


class _Scratch(_Buffers):
    """Buffers for as long as a call takes, for which any serves that is large enough.

    So the calls of a thread share one, as large as the largest of them needs. One of each size took an eighth of the
    memory that training a network on contiguous tensors takes.
    """

    @staticmethod
    def _memory(nbytes: int) -> Array:
        """Return memory of its own: what stays while all else comes and goes would leave holes among it."""
        try:
            return np.frombuffer(mmap.mmap(-1, nbytes, **_PRIVATE), _BYTE)
        except OSError as error:
            raise MemoryError(f"no {nbytes / 2**20:.3g} MiB of scratch: {error}") from error

    def take(self, nbytes: int) -> _Lease:
        """Return memory for `nbytes`: the smallest unused buffer that is large enough, or a new one for all others."""
        least, _ = _rounded(nbytes)
        found = self._of_size(sorted(size for size in tuple(self._unused) if size >= least))
        if found is None:
            self.clear()
            found = self._lease(self.new(least))
        return found


def _rounded(nbytes: int) -> tuple[int, int]:
    """Return the least size of a buffer for `nbytes`, and the step to the next.

    There are eight sizes from one power of two to the next.
    """
    step = 1 << (nbytes.bit_length() - 4)
    return -(-nbytes // step) * step, step


_buffers, _scratch = _Buffers(), _Scratch()
