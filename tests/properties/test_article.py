"""The article's four steps, as the article writes them, and the functions that compute them.

The article: weight and bias gradients, from one sample and one channel to many of both.
"""

import numpy as np
import pytest

import nhwconv as nc
from cases import PASSES
from nhwconv.strategies import REGISTRY
from tolerance import assert_close, gamma

N, H, W, C, D, KH, KW = 3, 9, 8, 17, 19, 3, 2
OH, OW = H - KH + 1, W - KW + 1

rng = np.random.default_rng(0)
X = rng.standard_normal((N, H, W, C))
ETA = rng.standard_normal((N, OH, OW, D))


def step1(x, eta):
    """One sample, one channel: x (H, W), eta (oh, ow)."""
    oh, ow = eta.shape
    gradW = np.empty((KH, KW))
    for h in range(KH):
        for w in range(KW):
            gradW[h, w] = np.sum(eta * x[h : h + oh, w : w + ow])
    return gradW, eta.sum()


def step2(x, eta):
    """Many channels: x (H, W, c), eta (oh, ow)."""
    oh, ow = eta.shape
    gradW = np.empty((KH, KW, C))
    for h in range(KH):
        for w in range(KW):
            gradW[h, w, :] = np.tensordot(eta, x[h : h + oh, w : w + ow, :], ([0, 1], [0, 1]))
    return gradW, eta.sum()


def step3(x, eta):
    """Many kernels: x (H, W, c), eta (oh, ow, d)."""
    oh, ow, _ = eta.shape
    gradW = np.empty((D, KH, KW, C))
    for h in range(KH):
        for w in range(KW):
            gradW[:, h, w, :] = np.tensordot(eta, x[h : h + oh, w : w + ow, :], ([0, 1], [0, 1]))
    return gradW, eta.sum((0, 1))


def step4(x, eta):
    """Many samples: x (n, H, W, c), eta (n, oh, ow, d)."""
    _, oh, ow, _ = eta.shape
    gradW = np.empty((D, KH, KW, C))
    for h in range(KH):
        for w in range(KW):
            gradW[:, h, w, :] = np.tensordot(eta, x[:, h : h + oh, w : w + ow, :], ([0, 1, 2], [0, 1, 2]))
    return gradW, eta.sum((0, 1, 2))


STEPS = [
    (step1, X[0, :, :, 0], ETA[0, :, :, 0], (KH, KW), ()),
    (step2, X[0], ETA[0, :, :, 0], (KH, KW, C), ()),
    (step3, X[0], ETA[0], (D, KH, KW, C), (D,)),
    (step4, X, ETA, (D, KH, KW, C), (D,)),
]
steps = pytest.mark.parametrize(
    ("step", "x", "eta", "w_shape", "b_shape"), STEPS, ids=["one-channel", "channels", "kernels", "samples"]
)


def strategies_for(x, w_shape, dtype):
    """Return the strategies that can do all passes of a step; at least those that take everything."""
    problem = nc.plan("forward", x.shape, w_shape, dtype=dtype).problem
    names = [n for n, s in REGISTRY.items() if not any(s.supports(problem, p) for p in PASSES)]
    assert {"loop", "im2col", "tensordot"} <= set(names)
    return names


@steps
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weight_gradient(step, x, eta, w_shape, b_shape, dtype):
    """conv2d_weight_grad is each of the four steps; the kernel's size follows from the shapes."""
    x, eta = x.astype(dtype), eta.astype(dtype)
    exact, _ = step(x.astype(np.float64), eta.astype(np.float64))
    absolute, _ = step(np.abs(x.astype(np.float64)), np.abs(eta.astype(np.float64)))
    for strategy in strategies_for(x, w_shape, dtype):
        got = nc.conv2d_weight_grad(x, eta, strategy=strategy)
        assert got.shape == w_shape
        assert got.dtype == dtype
        assert_close(got, exact, absolute, N * OH * OW, strategy)


@steps
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bias_gradient(step, x, eta, w_shape, b_shape, dtype):
    """conv2d_bias_grad is each of the four steps."""
    eta = eta.astype(dtype)
    _, exact = step(x, eta.astype(np.float64))
    _, absolute = step(x, np.abs(eta.astype(np.float64)))
    got = nc.conv2d_bias_grad(eta)
    assert got.shape == b_shape
    assert got.dtype == dtype
    assert np.all(np.abs(got - exact) <= gamma(N * OH * OW, np.dtype(dtype)) * absolute)


@steps
def test_layers_backward(step, x, eta, w_shape, b_shape):
    """conv2d_backward and forward agree with each step on what shapes belong together."""
    w, b = np.ones(w_shape), np.ones(b_shape)
    gradW, gradb = step(x, eta)
    absW, absb = step(np.abs(x), np.abs(eta))
    for strategy in strategies_for(x, w_shape, np.float64):
        assert nc.conv2d(x, w, b, strategy=strategy).shape == eta.shape
        g = nc.conv2d_backward(x, w, eta, strategy=strategy)
        assert g.dx.shape == x.shape
        assert_close(g.dw, gradW, absW, N * OH * OW, strategy)
        assert_close(g.db, np.asarray(gradb), np.asarray(absb), N * OH * OW, "tensordot")


def test_the_articles_layer():
    """Conv2D.backward(eta) leaves step four in gradW and gradb."""
    layer = nc.Conv2D(C, D, (KH, KW), dtype=np.float64, rng=0)
    layer.forward(X)
    layer.backward(ETA)
    gradW, gradb = step4(X, ETA)
    absW, absb = step4(np.abs(X), np.abs(ETA))
    strategy = nc.plan("weight_grad", X.shape, layer.W.shape, dtype=float).strategy
    assert_close(layer.gradW, gradW, absW, N * OH * OW, strategy)
    assert_close(layer.gradb, gradb, absb, N * OH * OW, "tensordot")
