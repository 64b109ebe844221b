"""The bias gradient: the sum of dy over pixels, in parts of fixed size that are added in their order."""

from __future__ import annotations

from functools import cache

from numba import prange

from .geometry import Fields
from .jit import Kernel, kernel
from .simd import fetch_add

__all__ = ["COLUMN_SUMS", "column_sums"]

#: dy is (pixels, d); part i sums pixels [i * block, (i + 1) * block).
COLUMN_SUMS = Fields("pixels d block tasks")


@cache
def column_sums() -> Kernel:
    """Make the kernel that sums the columns of each part into one row."""

    def column_sums(dy, parts, queue, workers, geometry):
        for _worker in prange(workers):
            g = geometry[0]
            while True:
                task = fetch_add(queue)
                if task >= g.tasks:
                    break
                part = parts[task * g.d : (task + 1) * g.d]
                part[:] = 0
                for pixel in range(task * g.block, min((task + 1) * g.block, g.pixels)):
                    row = dy[pixel * g.d : (pixel + 1) * g.d]
                    for j in range(g.d):
                        part[j] += row[j]

    return kernel(column_sums)
