"""Half types: stored as given, computed in float32, strip by strip, and rounded once at the end."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fresh
import nhwconv as nc
import oracle
from cases import PASSES, Case, cases, draw_data, exact, run, supporting
from grid import is_tried
from nhwconv import planning
from nhwconv.program import Program
from nhwconv.strategies import half
from tolerance import assert_close, gamma

HALVES = [np.float16, ml_dtypes.bfloat16]
each_half = pytest.mark.parametrize("dtype", HALVES)
each_pass = pytest.mark.parametrize("pass_", PASSES)

PAD1 = ((1, 1), (1, 1))
CASES = [
    Case(n=3, h=9, w=8, c=5, d=18, padding=PAD1),
    Case(n=2, h=12, w=9, c=6, d=4, kh=3, kw=2, stride=(2, 1), padding=((2, 0), (0, 1)), dilation=(2, 1), groups=2),
    Case(n=1, h=7, w=7, c=9, d=9, groups=9, padding=PAD1),
    Case(n=2, h=21, w=10, c=18, d=20, padding=PAD1),
    Case(n=0),
]


def strips_of(elements):
    """Let strips have about so many elements, for a while."""
    return fresh.patched((half, "STRIP", elements))


@each_half
@each_pass
@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_types_are_computed_in_float32(case, pass_, dtype):
    """The result errs by a float32 sum's error and one rounding to the half type, and has that type."""
    data = draw_data(case, dtype)
    expected = exact(case, data, pass_)
    for strategy in supporting(case, pass_):
        got = run(case, data, pass_, strategy)
        assert got.dtype == dtype
        assert_close(got, *expected, case.length(pass_), strategy, case)


@each_half
@pytest.mark.parametrize("strip", [1, 100, 1000])
def test_forward_adds_a_bias_once(dtype, strip):
    """In every strip."""
    for case in CASES[:4]:
        data = draw_data(case, dtype)
        with strips_of(strip):
            got = nc.conv2d(data.x, data.w, data.b, **case.options)
        expected = oracle.with_absolute(oracle.forward, data.x, data.w, data.b, **case.options)
        assert_close(got, *expected, case.length("forward") + 1, "loop", case)


@each_half
@each_pass
@settings(max_examples=settings.default.max_examples // 2)
@given(case=cases(), strip=st.sampled_from([1, 30, 200, 1000, 5000]), seed=st.integers(0, 9))
def test_strips(pass_, dtype, case, strip, seed):
    """However small the strips, of rows or of images, the result is the whole problem's."""
    data = draw_data(case, dtype, seed)
    expected = exact(case, data, pass_)
    for strategy in supporting(case, pass_):  # a strip is a problem that a strategy was not asked about
        if not is_tried(case, pass_, strategy, dtype):
            continue
        out = np.full(case.shape(pass_), np.nan, dtype)
        with strips_of(strip):
            run(case, data, pass_, strategy, out=out)
        assert_close(out, *expected, case.length(pass_), strategy, case)


@each_half
def test_weight_gradients_are_summed_in_float32_and_rounded_once(dtype):
    """A sum of many strips does not lose what a half type would lose, and accumulating rounds once as well."""
    case = Case(n=4, h=40, w=8, c=1, d=1, kh=1, kw=1)
    ones = np.ones(case.x_shape, dtype)
    # 1280: in bfloat16, which has 8 bits, adding 1 to 256 changes nothing.
    out = np.full(case.w_shape, 1000, dtype)
    before = float(out[0, 0, 0, 0])
    with strips_of(64):
        assert nc.conv2d_weight_grad(ones, ones) == dtype(1280)
        nc.conv2d_weight_grad(ones, ones, out=out, accumulate=True)
    assert out[0, 0, 0, 0] == dtype(1280 + before)


@each_half
@pytest.mark.parametrize("strip", [1, 50, 10**6])
def test_bias_gradient(dtype, strip):
    """Sums as float32 would, in strips too, and rounds once."""
    dy = np.random.default_rng(0).standard_normal((3, 20, 20, 5)).astype(dtype)
    wide = dy.astype(np.float64)
    out = np.ones(5, dtype)
    with strips_of(strip):
        got = nc.conv2d_bias_grad(dy)
        nc.conv2d_bias_grad(dy, out=out, accumulate=True)
    assert got.dtype == dtype
    assert_close(got, wide.sum((0, 1, 2)), np.abs(wide).sum((0, 1, 2)), 1200, "tensordot")
    assert_close(out, wide.sum((0, 1, 2)) + 1, np.abs(wide).sum((0, 1, 2)) + 1, 1201, "tensordot")


@each_half
def test_backward(dtype):
    """conv2d_backward serves half types, too."""
    case = CASES[1]
    data = draw_data(case, dtype)
    g = nc.conv2d_backward(data.x, data.w, data.dy, **case.options)
    assert {a.dtype for a in g} == {np.dtype(dtype)}
    np.testing.assert_array_equal(g.dx, run(case, data, "input_grad", "auto"))
    np.testing.assert_array_equal(g.dw, run(case, data, "weight_grad", "auto"))


def test_float16_overflows_to_infinity_without_a_warning():
    """65504 is float16's largest number: a larger sum is Inf, as it would be in PyTorch."""
    x, w = np.full((1, 2, 2, 1), 300, np.float16), np.full((1, 1, 1, 1), 300, np.float16)
    assert np.isinf(nc.conv2d(x, w)).all()
    assert np.isinf(nc.conv2d_bias_grad(np.full((4, 4, 4), 60000, np.float16))).all()


@each_half
def test_nan_flows_through_half_types(dtype):
    """Without a warning."""
    x = np.full((1, 2, 2, 1), np.nan, dtype)
    assert np.isnan(nc.conv2d(x, x).astype(np.float32)).all()
    assert np.isnan(nc.conv2d_bias_grad(x).astype(np.float32)).all()


def test_subnormal_halves_are_read_and_written():
    """Subnormal float16 numbers are numbers."""
    tiny = np.float16(2.0**-24)
    x, w = np.full((1, 3, 3, 1), tiny), np.ones((1, 2, 2, 1), np.float16)
    np.testing.assert_array_equal(nc.conv2d(x, w), np.full((1, 2, 2, 1), 4 * tiny))


@each_pass
@each_half
def test_half_types_are_converted_in_blocks(pass_, dtype):
    """No call holds a whole wide copy of a large array: float32 strips stay as small as they are to be."""
    case = Case(n=8, h=64, w=32, c=4, d=4, padding=PAD1)
    with strips_of(2**14):
        plan = nc.plan(pass_, case.x_shape, case.w_shape, **case.options, dtype=dtype, strategy="loop")
        parts = {part for part in plan.program(pass_ == "forward").parts if part.name == "strip"}
        run(case, draw_data(case, dtype), pass_, "loop")
    assert len(parts) == 2
    assert all(0 < part.nbytes <= 4 * 2**14 for part in parts)
    assert plan.workspace < 4 * (np.prod(case.x_shape) + np.prod(case.y_shape)) // 2


def test_promises_for_halves():
    """The tolerance of the tests above: much finer than a half type's own sum would be."""
    assert gamma(1000, np.dtype(np.float32)) < float(ml_dtypes.finfo(np.float16).eps)


# ------------------------------------------------------------------------------------------- conversions

FLOAT32 = np.dtype(np.float32)


def converted(body, source, target, count):
    """Run one step that converts numbers."""
    planning.execute(Program((half._step(body, count, "x", "y"),)), x=source, y=target)
    return target


def widened(halves):
    return converted(half.widen(halves.dtype.name), halves, np.empty(halves.shape, FLOAT32), halves.size)


def rounded(numbers, dtype):
    body = half.round_numbers(np.dtype(dtype).name, numbers.itemsize)
    return converted(body, numbers, np.empty(numbers.shape, dtype), numbers.size)


def bits(array):
    """Return what is compared: bits, but for NaN, of which there are many."""
    found = array.view(f"u{array.itemsize}").copy()
    with np.errstate(invalid="ignore"):
        found[np.isnan(array.astype(np.float64))] = 0xFFFF
    return found


@each_half
def test_every_half_number_is_widened_exactly(dtype):
    """All 65536, subnormal numbers, infinities and NaN among them; and rounded they are what they were."""
    halves = np.arange(2**16, dtype=np.uint16).view(dtype)
    wide = widened(halves)
    with np.errstate(invalid="ignore"):
        expected, double = halves.astype(np.float32), wide.astype(np.float64)
    np.testing.assert_array_equal(bits(wide), bits(expected))
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(halves))
    np.testing.assert_array_equal(bits(rounded(wide, dtype)), bits(halves))
    np.testing.assert_array_equal(bits(rounded(double, dtype)), bits(halves))


def neighbours(dtype, wide):
    """Return every half number, what lies halfway to the next, and the nearest numbers of `wide` on either side."""
    with np.errstate(invalid="ignore"):
        halves = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float64)
    halves = np.sort(halves[np.isfinite(halves)])
    step = halves[-1] - halves[-2]
    ends = [halves[0] - step / 2, halves[-1] + step / 2]  # from which on numbers are infinite
    middle = np.concatenate([halves, (halves[:-1] + halves[1:]) / 2, ends]).astype(wide)
    around = [np.nextafter(middle, wide(s), dtype=wide) for s in (-np.inf, np.inf)]
    return np.concatenate([middle, *around, np.array([np.inf, -np.inf, np.nan, 1e38, -1e38, 1e-45, -0.0], wide)])


@each_half
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_numbers_are_rounded_to_the_nearest_and_ties_to_even(wide, dtype):
    """At every half number, at every tie and right beside it, as NumPy and ml_dtypes round float32."""
    numbers = neighbours(dtype, wide)
    got = rounded(numbers, dtype)
    # float64 is rounded at once. Of what float32 cannot tell from a tie, the side is known; for the rest NumPy rounds.
    with np.errstate(all="ignore"):
        single = numbers.astype(np.float32)
        odd = np.nextafter(single, np.where(numbers > single, np.inf, -np.inf).astype(np.float32), dtype=np.float32)
        single = np.where((single != numbers) & np.isfinite(numbers), odd_of(numbers, single, odd), single)
        expected = single.astype(dtype)
    np.testing.assert_array_equal(bits(got), bits(expected))


def odd_of(numbers, single, beyond):
    """Of the float32 on either side of a number, return the one whose last bit is set."""
    is_odd = (single.view(np.uint32) & 1).astype(bool)
    return np.where(is_odd, single, beyond)


@each_half
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_any_number_is_rounded_to_the_nearest(wide, dtype):
    """Random bits of float32; in float64, what float16 of NumPy gives directly."""
    drawn = np.random.default_rng(0).integers(0, 2**32, 10**6, np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        expected = drawn.astype(dtype)
        np.testing.assert_array_equal(bits(rounded(drawn.astype(wide), dtype)), bits(expected))
        if dtype is np.float16 and wide is np.float64:
            rng = np.random.default_rng(1)
            fine = rng.standard_normal(10**6) * 10.0 ** rng.integers(-9, 6, 10**6)
            np.testing.assert_array_equal(bits(rounded(fine, dtype)), bits(fine.astype(np.float16)))


@pytest.mark.parametrize("count", [1, 2, 63, half.BLOCK - 1, half.BLOCK, half.BLOCK + 1, 2 * half.BLOCK + 5])
def test_conversions_write_what_they_should_and_no_more(count):
    """In blocks, of which the last is a rest."""
    halves = np.random.default_rng(0).standard_normal(count + 8).astype(np.float16)
    wide = np.full(count + 8, 7, np.float32)
    converted(half.widen("float16"), halves, wide, count)
    np.testing.assert_array_equal(wide[:count], halves[:count].astype(np.float32))
    assert (wide[count:] == 7).all()
    back = np.full(count + 8, 9, np.float16)
    converted(half.round_numbers("float16", 4), wide, back, count)
    np.testing.assert_array_equal(back[:count], halves[:count])
    assert (back[count:] == 9).all()


@each_half
def test_no_setting_of_numpy_concerns_half_types(dtype):
    """np.seterr(all="raise"): what overflows is infinite, what underflows is zero, and nothing is raised."""
    x, w = np.full((1, 3, 3, 2), 3, dtype), np.full((2, 2, 2, 2), 1e4, dtype)
    tiny = np.full((1, 3, 3, 2), ml_dtypes.finfo(dtype).smallest_subnormal, dtype)
    nan = np.full((2, 2, 2, 2), np.nan, dtype)
    with np.errstate(all="raise"):
        for strategy in nc.strategies():
            case = Case(n=1, h=3, w=3, c=2, d=2, kh=2, kw=2)
            if strategy not in supporting(case, *PASSES, dtype=dtype):
                continue
            y = nc.conv2d(x, w, np.full(2, 6e4, dtype), strategy=strategy)
            assert np.isinf(y.astype(np.float32)).all() == (dtype is np.float16)
            assert not nc.conv2d(tiny, tiny[:, :2, :2].repeat(2, 0), strategy=strategy).astype(np.float32).any()
            g = nc.conv2d_backward(x, nan, y, strategy=strategy)
            assert np.isnan(g.dx.astype(np.float32)).all()
        assert np.isinf(nc.conv2d_bias_grad(np.full((2, 9, 9, 3), 60000, np.float16))).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_a_bias_that_is_too_large_is_infinite(dtype):
    """A Python number takes the dtype of w, and what that cannot hold is Inf, whatever np.seterr says."""
    x, w = np.ones((4, 4), dtype), np.ones((2, 2), dtype)
    with np.errstate(all="raise"):
        y = nc.conv2d(x, w, 1e300)
    assert y.dtype == dtype
    assert np.isposinf(y.astype(np.float32)).all()
