"""Vector moves of bodies: what each says it reads and writes, and nothing beside it."""

from functools import cache
from itertools import product

import numpy as np
import pytest

from nhwconv import planning
from nhwconv.codegen.simd import (
    add_rows,
    at,
    copy,
    copy_rows,
    fetch_add,
    fill_zero,
    integers,
    numbers,
    transpose,
    transpose_exact,
)
from nhwconv.program import Program, Step, places
from nhwconv.runtime import machine
from nhwconv.runtime.jit import Body, device
from nhwconv.runtime.records import Record, record

each_size = pytest.mark.parametrize("dtype", [np.float32, np.float64])


class Move(Record):
    """What the moves take."""

    rows: int
    columns: int
    s_row: int
    t_row: int
    add: int


def run(body, x, y, b=None, **fields):
    fields = {"rows": 0, "columns": 0, "s_row": 0, "t_row": 0, "add": 0, **fields}
    program = Program((Step(body, (Move(**fields),), 1, places("x", "b" if b is not None else "x", "y")),))
    planning.execute(program, x=x, y=y, **({} if b is None else {"b": b}))
    return y


def body_of(move):
    """Make the bodies, by the size of a number, of a move: ``move(source, more, target, g)``."""

    @cache
    def make(ITEMSIZE):
        def body(operands, geometry, worker, task, fresh):
            table = integers(operands)
            source, more = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
            move(source, more, numbers(table[2], ITEMSIZE), record(geometry, 0, Move))

        return Body(body)

    return make


@device
def _copy(source, more, target, g):
    copy(at(target, 2), at(source, 1), g.columns)


@device
def _copy_rows(source, more, target, g):
    copy_rows(target, g.t_row, source, g.s_row, g.rows, g.columns)


@device
def _fill(source, more, target, g):
    fill_zero(at(target, 3), g.columns)


@device
def _transpose(source, more, target, g):
    transpose(source, g.s_row, g.rows, g.columns, target, g.t_row)


@device
def _transpose_exact(source, more, target, g):
    transpose_exact(source, g.s_row, g.rows, g.columns, g.add != 0, more, target, g.t_row)


@device
def _add_rows(source, more, target, g):
    add_rows(source, g.s_row, g.rows, g.columns, target)


@each_size
@pytest.mark.parametrize("count", [0, 1, 5, 64, 1000])
def test_copies_and_zeros(dtype, count):
    """So many elements, from the offsets on."""
    x = np.arange(1.0, count + 8).astype(dtype)
    y = run(body_of(_copy)(x.itemsize), x, np.full(count + 8, 77, dtype), columns=count)
    np.testing.assert_array_equal(y, [77, 77, *x[1 : 1 + count], *[77] * 6])
    y = run(body_of(_fill)(x.itemsize), x, np.full(count + 8, 77, dtype), columns=count)
    np.testing.assert_array_equal(y, [77] * 3 + [0] * count + [77] * 5)


@each_size
def test_rows_are_copied(dtype):
    """Of every width around whole vectors; what lies between them is neither read nor written."""
    lanes = machine.lanes(np.dtype(dtype).itemsize)
    for rows, columns in product((0, 1, 3), (0, 1, lanes - 1, lanes, lanes + 1, 2 * lanes, 4 * lanes + 3)):
        x = np.full((rows, columns + 2), np.nan, dtype)
        x[:, :columns] = np.arange(1, rows * columns + 1).reshape(rows, columns)
        y = np.full((rows + 1, columns + 5), 77, dtype)
        run(body_of(_copy_rows)(y.itemsize), x, y, rows=rows, columns=columns, s_row=columns + 2, t_row=columns + 5)
        np.testing.assert_array_equal(y[:rows, :columns], x[:, :columns])
        assert (y[:, columns:] == 77).all()
        assert (y[rows:] == 77).all()


@each_size
def test_blocks_are_transposed(dtype):
    """Of every size; rows of the target are whole vectors, zeros where there is no row of the source."""
    lanes, rng = machine.lanes(np.dtype(dtype).itemsize), np.random.default_rng(0)
    for rows, columns in product(range(1, lanes + 1), repeat=2):
        memory = np.full((lanes, lanes + 3), np.nan, dtype)
        x = memory[:rows, :columns]
        x[...] = rng.standard_normal((rows, columns))
        y = np.full((lanes, lanes + 5), 77, dtype)
        run(body_of(_transpose)(y.itemsize), memory, y, rows=rows, columns=columns, s_row=lanes + 3, t_row=lanes + 5)
        np.testing.assert_array_equal(y[:columns, :rows], x.T)
        assert (y[:columns, rows:lanes] == 0).all()
        assert (y[:columns, lanes:] == 77).all()
        assert (y[columns:] == 77).all()


@each_size
@pytest.mark.parametrize("add", [0, 1])
def test_blocks_are_transposed_exactly(dtype, add):
    """Nothing is written beside them; what is added is added to each row of the target."""
    lanes, rng = machine.lanes(np.dtype(dtype).itemsize), np.random.default_rng(0)
    for rows, columns in product(range(1, lanes + 1), repeat=2):
        memory = np.full((lanes, lanes), np.nan, dtype)
        memory[:rows, :columns] = rng.standard_normal((rows, columns))
        e = np.full(lanes, np.nan, dtype)
        if add:
            e[:rows] = rng.standard_normal(rows)
        y = np.full((lanes, lanes + 2), 77, dtype)
        fields = {"rows": rows, "columns": columns, "s_row": lanes, "t_row": lanes + 2, "add": add}
        run(body_of(_transpose_exact)(y.itemsize), memory, y, e, **fields)
        expected = np.full_like(y, 77)
        expected[:columns, :rows] = memory[:rows, :columns].T + (e[:rows] if add else dtype(0))
        np.testing.assert_array_equal(y, expected)


@each_size
def test_rows_are_added(dtype):
    """To one, of every width around four vectors; integers, so that the order of the sum is all the same."""
    lanes, rng = machine.lanes(np.dtype(dtype).itemsize), np.random.default_rng(0)
    for rows, columns in product((0, 1, 2, 3, 8), (1, lanes - 1, lanes, 4 * lanes, 4 * lanes + 1, 9 * lanes + 3)):
        x = np.full((max(rows, 1), columns + 2), np.nan, dtype)
        x[:, :columns] = rng.integers(-100, 100, (len(x), columns))
        y = np.full(columns + 4, 77, dtype)
        run(body_of(_add_rows)(y.itemsize), x, y, rows=rows, columns=columns, s_row=columns + 2)
        np.testing.assert_array_equal(y[:columns], 77 + x[:rows, :columns].sum(0))
        assert (y[columns:] == 77).all()


def test_counters_are_counted_once():
    """By many workers at once: no two get the same number."""

    def take(operands, geometry, worker, task, fresh):
        table = integers(operands)
        integers(table[1])[fetch_add(integers(table[0]), 3)] += 1

    counters, taken = np.zeros(8, np.int64), np.zeros(5000, np.int64)
    g = Move(rows=0, columns=0, s_row=0, t_row=0, add=0)
    planning.execute(Program((Step(Body(take), (g,), 5000, places("x", "y")),), 8), x=counters, y=taken)
    assert (taken == 1).all()
    assert counters.tolist() == [0, 0, 0, 5000, 0, 0, 0, 0]
