"""What measures the limits of this machine: multiply-adds from L1, reading and copying from memory."""

from __future__ import annotations

from functools import cache

from ..codegen.simd import at, copy, integers, numbers
from ..codegen.tile import Operand, Rows, Sum, no_prefetch, tile_product
from ..runtime.jit import Body
from ..runtime.records import Record, record

__all__ = ["LimitCopy", "LimitTiles", "copy_blocks", "multiply_add", "sum_blocks"]


class LimitTiles(Record):
    """One task: a tile of rows x columns, over the same `steps` products `runs` times."""

    rows: int
    columns: int
    steps: int
    runs: int
    tile: int


class LimitCopy(Record):
    """One task: `block` numbers."""

    block: int


@cache
def multiply_add(ITEMSIZE: int) -> Body:
    """Make the body whose every task is one register tile, over the same numbers again and again: A, B and C."""

    def multiply_add(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, LimitTiles)
        table = integers(operands)
        a, b = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        c = Rows(at(numbers(table[2], ITEMSIZE), worker * g.rows * g.columns), g.columns)
        of_a, of_b = Operand(a, 0, 0, g.steps, 1), Operand(b, 0, 0, 0, g.columns)
        tile_product(g.tile, g.rows, g.columns, Sum(g.runs, 1, g.steps), of_a, of_b, False, c, c, 0, no_prefetch(a))

    return Body(multiply_add)


@cache
def sum_blocks() -> Body:
    """Make the body that reads an array, a block a task; integers, whose sum a compiler may vectorise."""

    def sum_blocks(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, LimitCopy)
        table = integers(operands)
        source = integers(table[0])
        total = 0
        for i in range(task * g.block, (task + 1) * g.block):
            total += source[i]
        integers(table[1])[task] = total

    return Body(sum_blocks)


@cache
def copy_blocks() -> Body:
    """Make the body that copies an array, a block a task."""

    def copy_blocks(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, LimitCopy)
        table = integers(operands)
        copy(at(integers(table[1]), task * g.block), at(integers(table[0]), task * g.block), g.block)

    return Body(copy_blocks)
