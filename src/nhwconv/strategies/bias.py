"""The bias gradient: sums of dy over pixels in short parts, which are then added in float64. And a bias repeated.

A strategy that reads all of dy anyway sums it meanwhile, and uses `sum_slices` alone; for others there is `bias_steps`.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ..codegen.simd import add_rows, at, copy, fill_zero, integers, numbers
from ..problem import ConvProblem
from ..program import Part, Place, Step, places
from ..runtime.arrays import Array, values_are_data
from ..runtime.jit import Body
from ..runtime.records import Record, record

__all__ = [
    "SERIAL",
    "bias_steps",
    "column_steps",
    "column_sums",
    "repeat_bias",
    "repeat_step",
    "sum_pixels",
    "sum_rows",
    "sum_slices",
]

#: Below this many elements a parallel launch costs more than it saves.
SERIAL = 100_000
#: Pixels of one partial sum: short sums, added in float64, keep the error at a few roundings.
BLOCK = 256


class ColumnSums(Record):
    """dy is (pixels, d); part i sums pixels ``[i * BLOCK, (i + 1) * BLOCK)``."""

    pixels: int
    d: int


@cache
def column_sums(ITEMSIZE: int) -> Body:
    """Make the body that sums the columns of each part into one row; it takes dy and the parts."""

    def column_sums(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, ColumnSums)
        table = integers(operands)
        part, first = at(numbers(table[1], ITEMSIZE), task * g.d), task * BLOCK
        fill_zero(part, g.d)
        add_rows(at(numbers(table[0], ITEMSIZE), first * g.d), g.d, min(BLOCK, g.pixels - first), g.d, part)

    return Body(column_sums)


class SumRows(Record):
    """A matrix of `rows` rows, and whether their sum is added to what the target holds."""

    rows: int
    columns: int
    accumulate: int


@cache
def sum_rows(ITEMSIZE: int, TARGET_ITEMSIZE: int) -> Body:
    """Make the body that adds the rows of a matrix, in their order and in float64; it takes it and the target."""

    def sum_rows(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, SumRows)
        table = integers(operands)
        rows, target = numbers(table[0], ITEMSIZE), numbers(table[1], TARGET_ITEMSIZE)
        for j in range(g.columns):
            total = np.float64(rows[j])
            for i in range(1, g.rows):
                total += rows[i * g.columns + j]
            target[j] = total + target[j] if g.accumulate else total

    return Body(sum_rows)


def _sum_rows_step(rows: int, columns: int, itemsizes: tuple[int, int], of: Part, to: str | Place, add: bool) -> Step:
    return Step(sum_rows(*itemsizes), (SumRows(rows=rows, columns=columns, accumulate=add),), 1, places(of, to))


def sum_slices(problem: ConvProblem, slices: int, sums: Part, accumulate: bool) -> Step:
    """Return the step that writes the sums of all slices, added up, to db, or adds them to it."""
    itemsize = problem.dtype.itemsize
    return _sum_rows_step(slices, problem.d, (itemsize, itemsize), sums, "db", accumulate)


def column_steps(
    pixels: int, d: int, itemsizes: tuple[int, int], dy: str | Part | Place, target: str | Place, accumulate: bool
) -> list[Step]:
    """Return the steps that sum ``dy (pixels, d)`` over its pixels; itemsizes are dy's and the target's."""
    tasks = -(-pixels // BLOCK)
    sums = Part(tasks * d * itemsizes[0], "parts of db")
    sum_step = Step(column_sums(itemsizes[0]), (ColumnSums(pixels=pixels, d=d),), tasks, places(dy, sums))
    return [sum_step, _sum_rows_step(tasks, d, itemsizes, sums, target, accumulate)]


def bias_steps(pixels: int, d: int, itemsize: int, accumulate: bool) -> list[Step]:
    """Return the steps that write ``dy.sum(0)`` to db, or add it; dy is ``(pixels, d)``."""
    return column_steps(pixels, d, (itemsize, itemsize), "dy", "db", accumulate)


class Repeat(Record):
    """A bias of so many channels, and how often it is written."""

    channels: int
    times: int


@cache
def repeat_bias(ITEMSIZE: int) -> Body:
    """Make the body that writes a bias again and again; it takes it and the target."""

    def repeat_bias(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, Repeat)
        table = integers(operands)
        bias, target = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        for i in range(g.times):
            copy(at(target, i * g.channels), bias, g.channels)

    return Body(repeat_bias)


def repeat_step(channels: int, times: int, itemsize: int) -> tuple[Step, Part]:
    """Return the step that writes b for pixels that have become channels of one, and where."""
    part = Part(channels * times * itemsize, "the bias of several pixels")
    return Step(repeat_bias(itemsize), (Repeat(channels=channels, times=times),), 1, places("b", part)), part


@values_are_data
def sum_pixels(accumulate: bool, dy: Array, db: Array) -> None:
    """Write ``dy.sum(0)`` to db, or add it, by NumPy alone."""
    total = dy.sum(0, dtype=np.float64)
    db[...] = total + db if accumulate else total
