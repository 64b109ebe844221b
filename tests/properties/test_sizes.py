"""Sizes at the ends of what there is: addresses past 2^31 elements, thousands of channels, one pixel, and beyond."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import checked
import nhwconv as nc
from cases import DTYPES, PASSES, Case, refusal
from nhwconv.runtime import arrays
from nhwconv.strategies import AUTO, REGISTRY

F = np.float32
MIB = 2**20
FAR = 2**31
PAD1 = ((1, 1), (1, 1))


def sparse(path: Path, *shape: int) -> np.ndarray:
    """Return an array of zeros that lies in a file with holes: only what is touched takes memory or disk."""
    return np.memmap(path, F, "w+", shape=shape)


def able(pass_: str, x: tuple[int, ...], w: tuple[int, ...], **options: object) -> list[str]:
    """Return the strategies that can do a problem without a copy of the gigabytes between the pixels that they read."""
    problem = nc.plan(pass_, x, w, **options).problem
    names = [name for name, s in REGISTRY.items() if s.supports(problem, pass_) is None]
    names = [name for name in names if nc.plan(pass_, x, w, **options, strategy=name).workspace < 64 * MIB]
    assert set(names) & set(AUTO)
    return names


#: Strides so large that a few pixels of an array of 9 GiB and more are read: along rows, columns, images.
STRIDED = [
    ((1, 3, FAR // 4 + 5, 2), {"stride": (1, FAR // 8)}),
    ((1, FAR // 4 + 5, 3, 2), {"stride": (FAR // 8, 1)}),
    ((2, FAR // 8 + 1, 5, 2), {"stride": (FAR // 8, 2)}),
]


@pytest.mark.parametrize(("shape", "options"), STRIDED, ids=["columns", "rows", "images"])
@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "depthwise"])
def test_x_past_two_to_the_31st_element(shape, options, groups, tmp_path):
    """Forward and weight gradient read the pixels that the formula says, whichever strategy computes them."""
    x = sparse(tmp_path / "x", *shape)
    assert x.size > FAR
    seen = x[:, :: options["stride"][0], :: options["stride"][1]]
    seen[...] = np.random.default_rng(0).standard_normal(seen.shape, F)
    w = np.random.default_rng(1).standard_normal((6, 1, 1, 2 // groups), F)
    dy = np.random.default_rng(2).standard_normal((*seen.shape[:3], 6), F)
    plain = {"strategy": "tensordot", "groups": groups}
    y, dw = nc.conv2d(seen, w, **plain), nc.conv2d_weight_grad(seen, dy, 1, **plain)
    for name in able("forward", shape, w.shape, groups=groups, **options):
        np.testing.assert_allclose(nc.conv2d(x, w, groups=groups, **options, strategy=name), y, rtol=0, atol=1e-5)
    for name in able("weight_grad", shape, w.shape, groups=groups, **options):
        got = nc.conv2d_weight_grad(x, dy, 1, groups=groups, **options, strategy=name)
        np.testing.assert_allclose(got, dw, rtol=0, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "depthwise"])
def test_dy_past_two_to_the_31st_element(groups, tmp_path):
    """Padding so large that most of y never meets x: the input gradient reads the few pixels of dy that do."""
    padding = ((FAR // 8, 7), (1, 0))
    dy = sparse(tmp_path / "dy", 1, 2 + sum(padding[0]), 4, 4)
    assert dy.size > FAR
    seen = dy[:, padding[0][0] : padding[0][0] + 2]
    seen[...] = np.random.default_rng(0).standard_normal(seen.shape, F)
    w = np.random.default_rng(1).standard_normal((4, 1, 1, 2 // groups), F)
    options = {"groups": groups, "padding": padding}
    expected = nc.conv2d_input_grad(seen, w, (2, 3), groups=groups, padding=((0, 0), (1, 0)), strategy="tensordot")
    for name in able("input_grad", (1, 2, 3, 2), w.shape, **options):
        if name not in ("im2col", "tensordot"):  # which walk over all of dy
            got = nc.conv2d_input_grad(dy, w, (2, 3), **options, strategy=name)
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


EXTREME = [
    Case(n=1, h=3, w=4, c=3000, d=5, kh=1, kw=1),
    Case(n=1, h=3, w=4, c=5, d=3000, kh=1, kw=1),
    Case(n=1, h=3, w=3, c=2100, d=17, kh=2, kw=2),
    Case(n=1, h=4, w=4, c=2048, d=2048, groups=2048, padding=PAD1),
    Case(n=1, h=4, w=3, c=2048, d=4096, groups=1024, kh=2, kw=1),
    Case(n=1, h=1, w=1, c=1, d=1, kh=1, kw=1),
    Case(n=1, h=1, w=1, c=3, d=2, kh=5, kw=5, padding=((2, 2), (2, 2))),
    Case(n=2, h=11, w=13, c=3, d=4, kh=11, kw=13),
    Case(n=1, h=40, w=40, c=3, d=4, kh=2, kw=2, stride=(19, 30)),
    # dilation past every border: the middle tap alone meets the image; and none does
    Case(n=1, h=4, w=5, c=6, d=7, dilation=(9, 11), padding=((9, 9), (11, 11))),
    Case(n=1, h=4, w=5, c=17, d=20, dilation=(500, 600), padding=((500, 500), (600, 600))),
    Case(n=1, h=4, w=5, c=6, d=7, kh=2, kw=2, dilation=(9, 11), padding=((5, 4), (6, 5))),
    Case(n=1, h=3, w=3, c=6, d=6, groups=6, dilation=(50, 60), padding=((50, 50), (60, 60))),
    Case(n=1, h=2, w=2, c=3, d=4, kh=1, kw=1, padding=((40, 0), (0, 30)), stride=(7, 7)),
    Case(n=0, h=1, w=1, c=1, d=1, kh=1, kw=1),
]


@pytest.mark.parametrize("strategy", REGISTRY)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EXTREME, ids=str)
def test_extreme_sizes(case, dtype, pass_, strategy):
    """Each strategy equals the oracle, or refuses."""
    if refusal(case, pass_, strategy, dtype) is None:
        checked.overwritten(case, dtype, pass_, strategy)


# ------------------------------------------------------------------------------------------- extra memory

#: Problems whose patches, or widened copies, would be larger than what a call may take.
HEAVY = [
    (Case(n=4, h=96, w=96, c=64, d=64, padding=PAD1), np.float32),
    (Case(n=4, h=96, w=96, c=96, d=96, padding=PAD1, groups=96), np.float32),
    (Case(n=8, h=96, w=96, c=64, d=64, padding=PAD1, groups=2), np.float64),
    (Case(n=16, h=96, w=96, c=64, d=64, padding=PAD1, groups=64), np.float16),
]


def extra(call: object) -> int:
    """Return how many bytes a call takes at its peak, beside what it returns."""
    arrays.release()
    tracemalloc.start()
    try:
        result = call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak - sum(r.nbytes for r in (result if isinstance(result, tuple) else (result,)))


@pytest.mark.parametrize(("case", "dtype"), HEAVY, ids=[f"{c}-{np.dtype(t)}" for c, t in HEAVY])
def test_extra_memory_stays_in_its_bound(case, dtype):
    """What is allocated, not only what is planned: at most 64 MiB or a tenth of the arrays, and the weights again."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, F).astype(dtype) for shape in (case.x_shape, case.y_shape))
    w, b = np.ones(case.w_shape, dtype), np.ones(case.d, dtype)
    bound = max(64 * MIB, (x.nbytes + dy.nbytes + w.nbytes) // 10) + 6 * w.size * 8 + MIB
    everything = x, dy
    for name in REGISTRY:
        options = {**case.options, "strategy": name}
        x, dy = (a[:1] if name == "plain" else a for a in everything)  # whose loops would take minutes
        calls = {
            "forward": lambda x=x, options=options: nc.conv2d(x, w, b, **options),
            "weight_grad": lambda x=x, dy=dy, options=options: nc.conv2d_weight_grad(
                x, dy, (case.kh, case.kw), **options
            ),
            "input_grad": lambda dy=dy, options=options: nc.conv2d_input_grad(dy, w, (case.h, case.w), **options),
        }
        able = [p for p in PASSES if name != "tensordot" and refusal(case, p, name, dtype) is None]
        for pass_ in able:
            calls[pass_]()  # compiles
            taken = extra(calls[pass_])
            assert taken <= bound, (pass_, name, taken / MIB)
        if set(able) == set(PASSES):
            taken = extra(lambda x=x, dy=dy, options=options: tuple(nc.conv2d_backward(x, w, dy, **options)))
            assert taken <= bound, ("backward", name, taken / MIB)
    x, dy = everything
    assert extra(lambda: nc.conv2d_bias_grad(dy)) <= bound
    layer = nc.Conv2D(case.c, case.d, (case.kh, case.kw), padding=case.padding, groups=case.groups, dtype=dtype)
    layer.forward(x[:1])
    assert extra(lambda: layer.forward(x)) <= bound
