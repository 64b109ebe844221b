"""What measures the limits of this machine: multiply-adds from L1, reading and copying from memory."""

from __future__ import annotations

from functools import cache

from numba import prange

from .geometry import Fields
from .jit import Kernel, kernel
from .simd import copy
from .tasks import next_task
from .tile import tile_product

__all__ = ["LIMIT_COPY", "LIMIT_TILES", "copy_blocks", "multiply_add", "sum_blocks"]

#: One task: a tile of rows x columns, over the same `steps` products `runs` times.
LIMIT_TILES = Fields("rows columns steps runs tasks tile")
#: One task: `block` numbers.
LIMIT_COPY = Fields("block tasks")


@cache
def multiply_add() -> Kernel:
    """Make the kernel whose every task is one register tile, over the same numbers again and again."""

    def multiply_add(a, b, c, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            while next_task(queue, worker, workers, g.tasks) < g.tasks:
                tile_product(
                    g.tile, g.rows, g.columns, g.runs, 1, g.steps, a, 0, 0, 0, g.steps, 1, b, 0, 0, 0, g.columns,
                    False, c, 0, 0, c, worker * g.rows * g.columns, g.columns, 0, a, 0, 0, 0,
                )  # fmt: skip

    return kernel(multiply_add)


@cache
def sum_blocks() -> Kernel:
    """Make the kernel that reads an array, a block a task; integers, whose sum a compiler may vectorise."""

    def sum_blocks(source, sums, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                total = 0
                for i in range(task * g.block, (task + 1) * g.block):
                    total += source[i]
                sums[task] = total

    return kernel(sum_blocks)


@cache
def copy_blocks() -> Kernel:
    """Make the kernel that copies an array, a block a task."""

    def copy_blocks(source, target, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                copy(target, task * g.block, source, task * g.block, g.block)

    return kernel(copy_blocks)
