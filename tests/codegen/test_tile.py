"""The micro-kernel's contract, as the first lines of `nhwconv.codegen.tile` have it: each of its points."""

from itertools import product

import numpy as np
import pytest

import child
from cases import DTYPES
from nhwconv.codegen import tile
from nhwconv.runtime import arrays
from products import ADDS, KINDS, SUMS, Product, sizes
from tolerance import assert_close

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_add = pytest.mark.parametrize("add", ADDS)
LENGTHS = {sums: int(np.prod(sums)) for sums in SUMS}


def new(p, add, gap=0):
    """Return C with gaps between its rows, what it holds before, and the memory that it lies in."""
    memory = np.full((p.rows, p.columns + gap), 77, p.dtype)
    c = memory[:, : p.columns]
    c[...] = p.before if add == "C" else np.nan
    return c, memory


@each_add
@each_kind
@each_dtype
def test_any_rows_columns_and_sums(dtype, kind, add):
    """Every size around register tiles and vectors, every shape of a sum; what is not named is neither used nor hit."""
    for (rows, columns), sums in product(sizes(np.dtype(dtype).itemsize), SUMS):
        p = Product(dtype, kind, rows, columns, sums)
        c, memory = new(p, add, gap=3)
        p.run(add, c)
        assert_close(c, *p.exact(add), LENGTHS[sums] + 1, "loop", (rows, columns, sums))
        assert (memory[:, columns:] == 77).all(), (rows, columns)


@each_kind
@each_dtype
def test_a_sum_of_nothing_is_what_is_added(dtype, kind):
    """None of outer, inner or steps: zero, the row, or C as it is."""
    for sums in [s for s in SUMS if 0 in s]:
        p = Product(dtype, kind, 5, 7, sums)
        for add, expected in (("nothing", np.zeros((5, 7))), ("a row", np.tile(p.bias, (5, 1))), ("C", p.before)):
            np.testing.assert_array_equal(p.run(add, new(p, add)[0]), expected.astype(dtype))


@each_kind
@each_dtype
def test_e_is_not_read_where_it_is_not_added(dtype, kind):
    """It may hold NaN, and so may C, whether it would be one row or as many as C."""
    p = Product(dtype, kind, 9, 5, (2, 3, 5))
    for e_row in (0, p.columns):
        got = p.run("nothing", new(p, "nothing")[0], e=np.full_like(p.before, np.nan), e_row=e_row)
        assert np.isfinite(got).all()


@each_kind
@each_dtype
def test_a_blocked_sum_is_added_at_its_end(dtype, kind):
    """C is added to the finished sum, not started from: a small sum on a large C is rounded once."""
    p = Product(dtype, kind, 3, 4, (1, 1, 64))
    p.a[...], p.b[..., :4] = 1, np.finfo(dtype).eps / 64
    p.before[...] = 1
    got = p.run("C", new(p, "C")[0])
    np.testing.assert_array_equal(got, np.full((3, 4), 1 + np.finfo(dtype).eps, dtype))


@each_dtype
def test_strides_of_a(dtype):
    """Both sides have strides: rows that overlap, as pixels do, and steps that lie apart."""
    rng = np.random.default_rng(0)
    p = Product(dtype, "panel", 20, 6, (3, 2, 5))
    image = rng.standard_normal(400).astype(dtype)
    view = np.lib.stride_tricks.as_strided(image, p.a.shape, [s * image.itemsize for s in (60, 7, 2, 1)])
    p.a = np.array(view)
    assert_close(p.run("nothing", new(p, "nothing")[0], a=view), *p.exact("nothing"), 30, "loop")
    p = Product(dtype, "column", 20, 6, (3, 2, 5))
    view = np.lib.stride_tricks.as_strided(image, p.a.shape, [s * image.itemsize for s in (60, 7, 11, 1)])
    p.a = np.array(view)
    assert_close(p.run("nothing", new(p, "nothing")[0], a=view), *p.exact("nothing"), 30, "loop")


@each_dtype
def test_stores_past_the_caches_write_the_same(dtype):
    """Where C allows it, and where it does not: whole vectors or partial ones, at any place in a cache line."""
    mr, nr, lanes = tile.tile_shape(np.dtype(dtype).itemsize)
    for columns, gap, offset in product((nr * lanes, nr * lanes - 1, lanes), (0, lanes, 1), (0, 1, lanes)):
        p = Product(dtype, "panel", 2 * mr + 1, columns, (2, 1, 3))
        expected = p.run("a row", new(p, "a row")[0])
        memory = arrays.empty((2**14,), np.dtype(dtype))
        memory.fill(77)
        row = columns + gap
        rows = memory[offset : offset + p.rows * row].reshape(p.rows, row)
        p.run("a row", rows[:, :columns], stream=1)
        np.testing.assert_array_equal(rows[:, :columns], expected)
        assert (rows[:, columns:] == 77).all()
        assert (memory[:offset] == 77).all()
        assert (memory[offset + p.rows * row :] == 77).all()


@each_kind
@each_dtype
def test_lines_that_are_asked_for_may_lie_anywhere(dtype, kind):
    """Nothing is read there: results are the same bits, also where nothing is mapped."""
    p = Product(dtype, kind, 30, 9, (2, 2, 7))
    expected = p.run("a row", new(p, "a row")[0]).tobytes()
    for ahead in (0, 8, -(2**40), p.a.ctypes.data):
        for ahead_tile, ahead_step in ((0, 0), (64, 16), (-64, 2**30)):
            places = {"ahead": ahead, "ahead_tile": ahead_tile, "ahead_step": ahead_step}
            assert p.run("a row", new(p, "a row")[0], **places).tobytes() == expected


@each_kind
def test_nan_and_inf_are_numbers(kind):
    """A row's and a column's alone."""
    p = Product(np.float32, kind, 20, 9, (1, 1, 5))
    p.a[0, 0][(3, 2) if kind == "panel" else (2, 3)] = np.nan
    p.b[0, 0, 1, 4] = np.inf
    got = p.run("nothing", new(p, "nothing")[0])
    assert np.isnan(got[3]).all()
    assert not np.isfinite(got[:, 4]).any()
    rest = np.delete(np.delete(got, 3, 0), 4, 1)
    assert np.isfinite(rest).all()


def test_exactly_what_is_named_is_read_and_written():
    """Every operand ends, and starts, at a page without access; inputs are read-only for the processor."""
    out = child.run("import products; products.serve()")
    count = 2 * 2 * 2 * len(SUMS) * len(ADDS)
    assert int(out.split()[-1]) == sum(count // 2 * len(sizes(itemsize)) for itemsize in (4, 8))


def test_prices():
    """More rows, columns or steps never cost less; a tile and its rest cost no less than two tiles' sums."""
    shape = tile.tile_shape(4)
    mr, nr, lanes = shape
    for rows, columns, depth in product((1, mr, mr + 1), (1, lanes, nr * lanes + 1), (1, 9, 576)):
        price = tile.cycles(rows, columns, depth, shape)
        assert price > 0
        for more in ((rows + 1, columns, depth), (rows, columns + 1, depth), (rows, columns, depth + 1)):
            assert tile.cycles(*more, shape) >= price
    whole = tile.cycles(mr, nr * lanes, 576, shape)
    assert tile.cycles(4 * mr, 3 * nr * lanes, 576, shape) == pytest.approx(12 * whole)
    assert 2 * mr * nr * lanes * 576 / whole <= 4 * lanes  # no more than the peak


def test_register_tiles_fit_the_registers():
    """Accumulators, vectors of B and a broadcast number, of every width."""
    for itemsize in (4, 8):
        for mr, nr in {tile.register_tile(itemsize), *tile.narrow_tiles(itemsize)}:
            assert mr * nr + nr + 1 <= tile.machine.registers() + 2  # a load may be part of the multiply-add
