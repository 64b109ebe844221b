"""Weights as HWIO and images as NCHW: the same bits as the usual layouts, in every function, strategy and dtype.

Large images are turned in blocks, whose weight and bias gradients are added up; then these have other roundings.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nhwconv as nc
from cases import PASSES, Case, draw_data, supporting
from nhwconv.strategies import REGISTRY, turning

#: Between them: groups and none, a channel a group, few and many channels, parts of one slice and of several.
CASES = (
    Case(n=2, h=7, w=9, c=6, d=8, kh=3, kw=2, stride=(1, 2), padding=((1, 0), (2, 1)), groups=2),
    Case(n=2, h=7, w=9, c=6, d=12, stride=(1, 2), padding=((1, 0), (2, 1)), groups=6),
    Case(n=2, h=13, w=11, c=34, d=38, padding=((2, 0), (1, 1)), groups=2),
    Case(n=1, h=9, w=8, c=48, d=40, padding=((1, 1), (1, 1))),
    Case(n=3, h=40, w=37, c=33, d=70, padding=((1, 1), (1, 1))),
    Case(n=2, h=8, w=8, c=65, d=3, kh=1, kw=1),
    Case(n=1, h=30, w=50, c=3, d=33, kh=5, kw=5, stride=(2, 2)),
    Case(n=1, h=6, w=6, c=64, d=96, kh=1, kw=1),
)
DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)

each_strategy = pytest.mark.parametrize("strategy", REGISTRY)
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)


def hwio(w: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(w, 0, -1))


def first(a: np.ndarray) -> np.ndarray:
    """Channels first; for weights that is OIHW."""
    return np.ascontiguousarray(np.moveaxis(a, -1, 1))


def same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.flags.c_contiguous
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


def every_result(case: Case, data: Any, options: dict[str, Any], turned: Any, weights: Any) -> list[np.ndarray]:
    """Return what all functions make of arrays in a layout, in their order: with `accumulate`, too."""
    x, w, b, dy = turned(data.x), weights(data.w), data.b, turned(data.dy)
    options = {**case.options, **options}
    y = nc.conv2d(x, w, b, **options)
    dw = nc.conv2d_weight_grad(x, dy, (case.kh, case.kw), **options)
    dx = nc.conv2d_input_grad(dy, w, (case.h, case.w), **options)
    g = nc.conv2d_backward(x, w, dy, **options)
    results = [y, dw, dx, *(a.copy() for a in g)]
    again = nc.conv2d_backward(x, w, dy, **options, out=g, accumulate=True)
    more = nc.conv2d_weight_grad(x, dy, **options, out=dw.copy(), accumulate=True)
    t = nc.conv_transpose2d(dy, w, data.x[0, 0, 0], **options)
    u = nc.conv_transpose2d_backward(dy, w, t, **options)
    return [*results, *again, more, t, *u]


@each_dtype
@each_case
@each_strategy
def test_bits_are_those_of_the_usual_layouts(strategy, case, dtype):
    """Each function gives the same numbers, at the places that the layout says."""
    if strategy not in supporting(case, *PASSES, dtype=dtype):
        return
    data = draw_data(case, dtype)
    expected = every_result(case, data, {"strategy": strategy}, np.asarray, np.asarray)
    kinds = "xwxxwbxwbwxxwb"  # y, dw, dx; dx, dw, db twice; dw; the transposed result, and its dx, dw, db
    for options, images, weights in (({"w_layout": "HWIO"}, np.asarray, hwio), ({"layout": "NCHW"}, first, first)):
        got = every_result(case, data, {**options, "strategy": strategy}, images, weights)
        assert len(got) == len(kinds) == len(expected)
        for kind, g, e in zip(kinds, got, expected, strict=True):
            same(g, e if kind == "b" else weights(e) if kind == "w" else images(e))


@pytest.fixture
def small_blocks(monkeypatch):
    """Let images be turned in blocks that hold a few kilobytes."""
    monkeypatch.setattr(turning, "TOGETHER", 1)
    nc.ops.forget_plans()
    yield
    nc.ops.forget_plans()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("strategy", REGISTRY)
def test_blocks_of_images(strategy):
    """Several blocks, not all as large: the same bits where nothing is summed over images, exact sums where it is."""
    case = Case(n=5, h=23, w=11, c=16, d=16, padding=((1, 1), (1, 1)))
    if strategy not in supporting(case, *PASSES):
        return
    data = draw_data(case, np.float32)
    expected = every_result(case, data, {"strategy": strategy}, np.asarray, np.asarray)
    got = every_result(case, data, {"layout": "NCHW", "strategy": strategy}, first, first)
    length, eps = case.n * 23 * 11, np.finfo(np.float32).eps
    for kind, g, e in zip("xwxxwbxwbwxxwb", got, expected, strict=True):
        if kind == "x":
            same(g, first(e))
        else:
            exact = first(e) if kind == "w" else e
            assert np.abs(g - exact).max() <= 4 * eps * np.sqrt(length) * np.abs(exact).max()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("strategy", ["loop", "winograd", "grouped"])
def test_weights_are_prepared_once_for_all_blocks_of_a_size(strategy):
    """Of five blocks, two sizes: the steps that read w are those of two programs."""
    channels = 4 if strategy == "grouped" else 16
    x, w, groups = (9, 61, 23, 16), (16, 3, 3, channels), 16 // channels
    name = "depthwise" if strategy == "grouped" else strategy
    plan = nc.plan("input_grad", x, w, padding=1, groups=groups, strategy=name)
    alone = plan.program()
    program = plan.program(first=frozenset({"dy", "dx"}))

    def count(program, array):
        return sum(any(place.source == array for place in step.places) for step in program.steps)

    assert count(alone, "w") == 1
    assert count(program, "dy") == count(program, "dx") > 2
    assert count(program, "w") == 2
    assert program.problem == alone.problem
    assert program.ran == alone.ran


def test_half_types_are_rounded_once(small_blocks):
    """Their gradients are not stored between blocks."""
    x, w = (5, 23, 11, 16), (16, 3, 3, 16)
    plan = nc.plan("weight_grad", x, w, padding=1, dtype=np.float16)
    program = plan.program(first=frozenset({"x", "dy"}))
    assert len(program.steps) == len(plan.program().steps) + 2
