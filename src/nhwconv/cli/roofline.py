"""What this machine could do at best: multiply-adds and bytes a second, measured.

The peak is that of the package's own micro-kernel on operands that stay in L1, where nothing but its multiply-adds
limits it; the bandwidth is that of reading arrays too large for the caches of a core, or of copying them, whichever
moves more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..codegen.tile import panel_tile, register_tile
from ..planning import execute
from ..problem import ConvProblem
from ..program import Program, Step, places
from ..runtime import arrays, machine
from ..timing import time_calls
from .limits import LimitCopy, LimitTiles, copy_blocks, multiply_add, sum_blocks

__all__ = ["Roofline", "measure", "peak_call"]

#: Products of one run, whose A and B take at most half of the smallest L1 there is, and how often a tile runs.
STEPS, RUNS = 64, 512
#: Bytes of each array that is read or copied: more than the private caches of any CPU.
STREAM = 64 * 2**20
#: Each figure is the best of several tries within so many seconds; what disturbs a try only ever makes it slower.
SECONDS = 0.25


@dataclass(frozen=True)
class Roofline:
    """The machine's limits for one dtype.

    Attributes
    ----------
    threads : int
        How many threads it was measured with.
    peak : float
        Floating-point operations a second.
    bandwidth : float
        Bytes a second, to and from memory.
    """

    threads: int
    peak: float
    bandwidth: float

    def seconds(self, problem: ConvProblem) -> float:
        """Return the least time of a direct pass: that of its arithmetic or of its x, w and y, whichever is longer.

        A strategy that multiplies less than a direct pass, as Winograd does, can take less, and so can one that finds
        its arrays in a cache.
        """
        return max(problem.flops / self.peak, problem.bytes / self.bandwidth)


def measure(dtype: np.dtype[Any]) -> Roofline:
    """Measure the peak and the bandwidth with as many threads as Numba uses now: about a second, once a process.

    Parameters
    ----------
    dtype : dtype
        float32 or float64: what is multiplied.

    Returns
    -------
    Roofline

    Examples
    --------
    >>> import numpy as np
    >>> from nhwconv.cli.roofline import measure
    >>> measure(np.dtype(np.float32)).peak > 1e8
    True
    """
    threads = machine.threads()
    return Roofline(threads, _peak(dtype, threads), _bandwidth(threads))


@cache
def _peak(dtype: np.dtype[Any], threads: int) -> float:
    call, flops = peak_call(dtype, threads)
    return flops / _best(call)


def peak_call(dtype: np.dtype[Any], threads: int) -> tuple[Callable[[], None], int]:
    """Return a call of the micro-kernel on operands in L1, eight tasks a thread, and its floating-point operations."""
    mr, nr = register_tile(dtype.itemsize)
    columns = nr * machine.lanes(dtype.itemsize)
    a, b = (_aligned(size * STEPS, dtype) for size in (mr, columns))
    c = _aligned(threads * mr * columns, dtype)
    tasks = 8 * threads
    geometry = LimitTiles(rows=mr, columns=columns, steps=STEPS, runs=RUNS, tile=panel_tile(dtype.name, mr, nr))
    step = Step(multiply_add(dtype.itemsize), (geometry,), tasks, places("x", "w", "y"))
    program = Program((step,), threads)
    return lambda: execute(program, x=a, w=b, y=c), 2 * math.prod((mr, columns, STEPS, RUNS, tasks))


def _aligned(size: int, dtype: np.dtype[Any]) -> arrays.Array:
    """Return ones from a cache line's beginning on, so that no vector lies in two of them."""
    lines = np.ones(size + arrays.ALIGNMENT, dtype)
    start = -lines.ctypes.data % arrays.ALIGNMENT // dtype.itemsize
    return lines[start : start + size]


@cache
def _bandwidth(threads: int) -> float:
    source, target = (arrays.empty((STREAM // 8,), np.dtype(np.int64)) for _ in range(2))
    source[:], target[:] = 1, 1
    block = 2**15  # 256 KiB
    tasks = source.size // block
    sums = np.zeros(tasks, np.int64)
    reads, copies = (
        Program((Step(body, (LimitCopy(block=block),), tasks, places("x", "y")),), threads)
        for body in (sum_blocks(), copy_blocks())
    )
    reading = _best(lambda: execute(reads, x=source, y=sums))
    copying = _best(lambda: execute(copies, x=source, y=target))
    return max(STREAM / reading, 2 * STREAM / copying)


def _best(call: Callable[[], None]) -> float:
    """Return the seconds of the fastest call, after one that compiles."""
    call()
    return min(time_calls(call, SECONDS))
