"""The bias gradient: short sums in the arrays' dtype, added in float64, written once or added."""

import numpy as np
import pytest

import nhwconv as nc
from cases import DTYPES
from nhwconv import planning
from nhwconv.strategies.bias import BLOCK, SERIAL, bias_steps, sum_pixels
from tolerance import assert_close

PIXELS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("d", [1, 3, 16, 33])
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums(dtype, pixels, d, accumulate):
    """Of pixels around a part's number, compiled and by NumPy, alone and added to what is there."""
    dy = np.random.default_rng(0).standard_normal((pixels, d)).astype(dtype)
    before = np.ones(d, dtype) if accumulate else np.full(d, np.nan, dtype)
    wide = dy.astype(np.float64)
    exact, absolute = wide.sum(0) + accumulate, np.abs(wide).sum(0) + accumulate
    for compiled in (True, False):
        db = before.copy()
        if compiled:
            planning.execute(planning.bias_program(pixels, d, dy.dtype, accumulate), dy=dy, db=db)
        else:
            sum_pixels(accumulate, dy, db)
        # A part of so many numbers, and one rounding at the end: what is between is float64.
        assert_close(db, exact, absolute, min(pixels, BLOCK) + 1, "loop")


def test_the_error_does_not_grow_with_the_pixels():
    """A million equal numbers: a running sum in float32 would err by a thousandth."""
    dy = np.full((1, 1000, 1000, 2), 0.1, np.float32)
    np.testing.assert_allclose(nc.conv2d_bias_grad(dy), np.float64(np.float32(0.1)) * 1e6, rtol=2e-6)


def test_tasks_follow_the_pixels():
    """So the bits do not follow the threads; a small sum is not launched in parallel."""
    steps = bias_steps(5 * BLOCK + 7, 8, 4, False)
    assert [s.tasks for s in steps] == [6, 1]
    small, large = (planning.bias_program(pixels, 10, np.dtype(np.float32), False) for pixels in (100, SERIAL))
    assert small.workers == 1
    assert [s.tasks for s in large.steps] == [-(-SERIAL // BLOCK), 1]
