"""Patches: rows of a matrix that hold what each output reads, and their sum back into pixels."""

import numpy as np
import pytest

import fresh
import nhwconv as nc
from cases import DTYPES, PASSES, Case, data_of, exact_of, run
from nhwconv import planning
from nhwconv.program import Program, Step, places
from nhwconv.strategies import im2col as strategy
from nhwconv.strategies.im2col import _patches
from nhwconv.strategies.im2col.patches import col2im, im2col
from tolerance import assert_close

CASES = [
    Case(),
    Case(n=2, h=9, w=7, c=6, d=4, kh=3, kw=2, stride=(2, 3), padding=((1, 2), (0, 3)), dilation=(2, 1), groups=2),
    Case(n=1, h=3, w=2, c=1, d=1, kh=2, kw=2, padding=((5, 4), (6, 3))),
    Case(n=3, h=4, w=4, c=5, d=2, kh=1, kw=1, stride=(3, 2)),
]


def positions(case):
    """Yield each output's number, tap and the pixel that it reads, where there is one."""
    _, oh, ow, _ = case.y_shape
    for n, p, q, r, s in np.ndindex(case.n, oh, ow, case.kh, case.kw):
        i = p * case.stride[0] - case.padding[0][0] + r * case.dilation[0]
        j = q * case.stride[1] - case.padding[1][0] + s * case.dilation[1]
        inside = 0 <= i < case.h and 0 <= j < case.w
        yield (n * oh + p) * ow + q, r, s, (n, i, j) if inside else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_patches_and_back(case, dtype):
    """For each group: zeros outside; the way back adds every patch's number to its pixel, and to that alone."""
    problem = nc.plan("forward", case.x_shape, case.w_shape, dtype=dtype, **case.options).problem
    rng, itemsize, cg = np.random.default_rng(0), np.dtype(dtype).itemsize, case.c // case.groups
    pixels = int(np.prod(case.y_shape[:3]))
    for g in range(case.groups):
        channels = slice(g * cg, (g + 1) * cg)
        x = rng.integers(-9, 10, case.x_shape).astype(dtype)
        patches = np.full((pixels, case.kh, case.kw, cg), np.nan, dtype)
        geometry = (_patches(problem, case.h, g, False),)
        step = Step(im2col(itemsize), geometry, case.n * case.y_shape[1], places("x", "y"))
        planning.execute(Program((step,), 3), x=x, y=patches)
        back = np.full(case.x_shape, 77, dtype)
        step = Step(col2im(itemsize), geometry, case.n * case.h, places("y", "dx", "y"))
        planning.execute(Program((step,), 3), y=patches, dx=back)
        expected = np.zeros(case.x_shape, dtype)
        for row, r, s, pixel in positions(case):
            wanted = np.zeros(cg) if pixel is None else x[pixel][channels]
            np.testing.assert_array_equal(patches[row, r, s], wanted)
            if pixel is not None:
                expected[pixel][channels] += patches[row, r, s]
        np.testing.assert_array_equal(back[..., channels], expected[..., channels])
        others = np.delete(back, np.arange(case.c)[channels], -1)
        assert (others == 77).all()


@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_of_images_and_rows(case, block, monkeypatch):
    """However small the blocks, and where a block reads fewer rows than its images have: every pass is right."""
    monkeypatch.setattr(strategy, "BLOCK", block)
    for pass_ in PASSES:
        fresh.forget()
        got = run(case, data_of(case, np.float64), pass_, "im2col")
        assert_close(got, *exact_of(case, np.float64, pass_), case.length(pass_), "im2col", pass_)
    fresh.forget()
