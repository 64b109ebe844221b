"""The bias gradient: the sum of dy over pixels, in parts of fixed size that are added in their order."""

from __future__ import annotations

from functools import cache

from numba import prange

from .geometry import Fields
from .jit import Kernel, kernel
from .simd import add_rows, fill_zero
from .tasks import next_task

__all__ = ["COLUMN_SUMS", "column_sums"]

#: dy is (pixels, d); part i sums pixels [i * block, (i + 1) * block).
COLUMN_SUMS = Fields("pixels d block tasks")


@cache
def column_sums() -> Kernel:
    """Make the kernel that sums the columns of each part into one row."""

    def column_sums(dy, parts, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                fill_zero(parts, task * g.d, g.d)
                first = task * g.block
                add_rows(dy, first * g.d, g.d, min(g.block, g.pixels - first), g.d, parts, task * g.d)

    return kernel(column_sums)
