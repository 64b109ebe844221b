"""The promised error bound, on data made to break it.

    || got - exact || <= B * || |x| (*) |w| ||,   B = 1e-5 in float32, 1e-13 in float64

in l2, for whatever "auto" may choose. Float32 results are compared with the article's sums in float64, float64 results
with the same sums in long double; what those sums err themselves is allowed for.
"""

from functools import cache

import numpy as np
import pytest

import nhwconv as nc
from cases import PASSES, Case, Data, refusal, run
from nhwconv.strategies import AUTO
from tolerance import PROMISE, gamma

PAD1 = ((1, 1), (1, 1))


def _signs(rng, shape):
    return rng.choice([-1.0, 1.0], shape)


def _alternating(rng, shape):
    """Signs that alternate along every axis, so that sums of thousands cancel."""
    odd = sum(np.indices(shape, sparse=True)) % 2
    return (1 - 2.0 * odd) * (1 + 0.01 * rng.standard_normal(shape))


#: From a generator and a shape to numbers that are hard to sum or to transform.
DATA = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "a mean of 1000": lambda rng, shape: rng.standard_normal(shape) + 1000,
    "12 decades": lambda rng, shape: _signs(rng, shape) * 10 ** rng.uniform(-6, 6, shape),
    "positive": lambda rng, shape: rng.uniform(0, 1, shape),
    "alternating": _alternating,
    "one huge pixel": lambda rng, shape: np.where(rng.uniform(size=shape) < 1e-3, 1e6, rng.standard_normal(shape)),
}

#: Cases by the strategy that they are made for; each runs every strategy that can do it.
CASES = {
    "dense": Case(n=2, h=20, w=21, c=40, d=36, padding=PAD1),
    "5x5": Case(n=1, h=13, w=16, c=20, d=24, kh=5, kw=5, padding=((2, 2), (2, 2))),
    "6x6": Case(n=1, h=15, w=19, c=20, d=24, kh=6, kw=6),
    "4x1": Case(n=2, h=17, w=9, c=24, d=17, kh=4, kw=1),
    "1x7": Case(n=2, h=9, w=34, c=24, d=17, kh=1, kw=7),
    "3x3, stride 2": Case(n=2, h=31, w=33, c=24, d=32, stride=(2, 2)),
    "one input channel": Case(n=2, h=20, w=21, c=1, d=8, kh=5, kw=5),
    "three input channels, stride 2": Case(n=2, h=31, w=33, c=3, d=24, stride=(2, 2)),
    "depthwise": Case(n=2, h=20, w=21, c=24, d=48, padding=PAD1, groups=24),
}

#: The weight gradient sums over 100,800 pixels here.
LONG = {
    "dense": Case(n=7, h=120, w=120, c=16, d=16, padding=PAD1),
    "three input channels": Case(n=7, h=120, w=120, c=3, d=16, padding=PAD1),
    "depthwise": Case(n=7, h=120, w=120, c=16, d=16, padding=PAD1, groups=16),
}


@cache
def arrays(case, kind, dtype):
    rng = np.random.default_rng(0)
    shapes = case.x_shape, case.w_shape, (case.d,), case.y_shape
    return Data(*(DATA[kind](rng, shape).astype(dtype) for shape in shapes))


def _sums(case, data, pass_, dtype):
    """The three passes as sums over kernel positions, in any dtype of NumPy's, with stride and groups."""
    n, (d, kh, kw, cg), (_, oh, ow, _) = case.n, case.w_shape, case.y_shape
    groups, (sh, sw) = case.groups, case.stride
    x = np.pad(data.x.astype(dtype), ((0, 0), *case.padding, (0, 0))).reshape(n, -1, case.w + sum(case.padding[1]),
                                                                             groups, cg)  # fmt: skip
    w = data.w.astype(dtype).reshape(groups, d // groups, kh, kw, cg)
    dy = data.dy.astype(dtype).reshape(n, oh, ow, groups, d // groups)
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for h in range(kh):
        for v in range(kw):
            window = np.s_[:, h : h + sh * (oh - 1) + 1 : sh, v : v + sw * (ow - 1) + 1 : sw]
            if pass_ == "forward":
                y += np.einsum("nijgc,gdc->nijgd", x[window], w[:, :, h, v])
            elif pass_ == "weight_grad":
                dw[:, :, h, v] = np.einsum("nijgd,nijgc->gdc", dy, x[window])
            else:
                dx[window] += np.einsum("nijgd,gdc->nijgc", dy, w[:, :, h, v])
    (top, _), (left, _) = case.padding
    dx = dx[:, top : top + case.h, left : left + case.w]
    return {"forward": y, "weight_grad": dw, "input_grad": dx}[pass_]


@cache
def truth(case, kind, dtype, pass_):
    """Return the exact result as nearly as it can be had, the norm of the sum of absolute values, and its own error."""
    data = arrays(case, kind, dtype)
    absolute = Data(*map(np.abs, data))
    if dtype == np.float32:
        wide = np.dtype(np.float64)
        exact, norm = (
            run(case, Data(*(a.astype(wide) for a in of)), pass_, "tensordot") for of in (data, absolute)
        )  # fmt: skip
    else:
        wide = np.dtype(np.longdouble)
        exact, norm = _sums(case, data, pass_, wide), _sums(case, absolute, pass_, np.float64)
    return exact, float(np.linalg.norm(norm)), gamma(case.length(pass_), wide)


def check(case, kind, dtype, pass_, strategy):
    exact, norm, own = truth(case, kind, dtype, pass_)
    got = run(case, arrays(case, kind, dtype), pass_, strategy)
    error = float(np.linalg.norm((got - exact.reshape(got.shape)).astype(np.float64)))
    assert error <= (PROMISE[np.dtype(dtype)] + own) * norm, f"{error / norm:.2g} of the absolute values' norm"


def able(cases, dtypes, passes):
    """Every (case, dtype, pass, strategy) that exists."""
    return [
        pytest.param(case, dtype, pass_, strategy, id=f"{name}-{np.dtype(dtype).name}-{pass_}-{strategy}")
        for name, case in cases.items()
        for dtype in dtypes
        for pass_ in passes
        for strategy in AUTO
        if refusal(case, pass_, strategy, dtype) is None
    ]


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize(("case", "dtype", "pass_", "strategy"), able(CASES, (np.float32, np.float64), PASSES))
def test_the_bound_holds(case, dtype, pass_, strategy, kind):
    check(case, kind, dtype, pass_, strategy)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize(("case", "dtype", "pass_", "strategy"), able(LONG, (np.float32,), ("weight_grad",)))
def test_the_bound_holds_for_long_sums(case, dtype, pass_, strategy, kind):
    check(case, kind, dtype, pass_, strategy)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize(("case", "dtype", "pass_", "strategy"), able(LONG, (np.float32,), ("weight_grad",)))
def test_the_bound_holds_for_the_bias_gradient(case, dtype, pass_, strategy, kind):
    """By itself and beside a strategy's weight gradient: it is a sum over the same pixels."""
    data = arrays(case, kind, dtype)
    exact = data.dy.sum((0, 1, 2), dtype=np.float64)
    allowed = PROMISE[np.dtype(dtype)] * np.linalg.norm(np.abs(data.dy).sum((0, 1, 2), dtype=np.float64))
    options = {**case.options, "needs": ("dw", "db"), "strategy": strategy}
    for got in (nc.conv2d_bias_grad(data.dy), nc.conv2d_backward(data.x, data.w, data.dy, **options).db):
        assert np.linalg.norm(got - exact) <= allowed


def test_every_strategy_of_auto_is_held_to_it():
    tested = {parameters.values[1:] for parameters in able(CASES, (np.float32, np.float64), PASSES)}
    assert tested == {(dtype, p, name) for dtype in (np.float32, np.float64) for p in PASSES for name in AUTO}
