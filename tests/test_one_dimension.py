"""One dimension: images of one row, bit for bit; its own forms, options and words."""

from __future__ import annotations

import re

import numpy as np
import pytest

import nhwconv as nc
from nhwconv.strategies import REGISTRY

RNG = np.random.default_rng(0)
X, W, B = (RNG.standard_normal(s).astype(np.float32) for s in ((3, 50, 12), (8, 5, 6), (8,)))
V = RNG.standard_normal((12, 5, 4)).astype(np.float32)  # of a transposed convolution from 12 to 8 channels
ONE = {"stride": 2, "padding": (3, 1), "dilation": 2, "groups": 2}
TWO = {"stride": (1, 2), "padding": ((0, 0), (3, 1)), "dilation": (1, 2), "groups": 2}

each_strategy = pytest.mark.parametrize(
    "strategy", [name for name in REGISTRY if name not in ("depthwise", "winograd")]
)


@each_strategy
def test_conv1d_is_conv2d_of_one_row(strategy):
    """The result and all gradients, with every option."""
    y = nc.conv1d(X, W, B, **ONE, strategy=strategy)
    np.testing.assert_array_equal(y, nc.conv2d(X[:, None], W[:, None], B, **TWO, strategy=strategy)[:, 0])
    g = nc.conv1d_backward(X, W, y, **ONE, strategy=strategy)
    two = nc.conv2d_backward(X[:, None], W[:, None], y[:, None], **TWO, strategy=strategy)
    for got, expected in zip(g, two, strict=True):
        np.testing.assert_array_equal(got, expected.reshape(got.shape))
    assert g.dx.shape == X.shape
    assert g.dw.shape == W.shape


@each_strategy
def test_conv_transpose1d_is_conv_transpose2d_of_one_row(strategy):
    """The result and all gradients, with every option."""
    y = nc.conv_transpose1d(X, V, B, **ONE, output_padding=1, strategy=strategy)
    more = {**TWO, "output_padding": (0, 1), "strategy": strategy}
    np.testing.assert_array_equal(y, nc.conv_transpose2d(X[:, None], V[:, None], B, **more)[:, 0])
    g = nc.conv_transpose1d_backward(X, V, y, **ONE, output_padding=1, strategy=strategy)
    for got, expected in zip(g, nc.conv_transpose2d_backward(X[:, None], V[:, None], y[:, None], **more), strict=True):
        np.testing.assert_array_equal(got, expected.reshape(got.shape))


@pytest.mark.parametrize("groups", [1, 12])
def test_values(groups):
    """What `auto` takes gives NumPy's correlate, channel by channel."""
    w = RNG.standard_normal((4 if groups == 1 else 12, 7, 12 // groups))
    x = X.astype(float)
    y = nc.conv1d(x, w, groups=groups)
    for d in range(len(w)):
        channels = range(12) if groups == 1 else [d]
        exact = sum(np.correlate(x[1, :, c], w[d, :, c if groups == 1 else 0]) for c in channels)
        np.testing.assert_allclose(y[1, :, d], exact, atol=1e-12)


def test_forms():
    """One sequence, one kernel, and plain vectors, as the article's forms have it in two dimensions."""
    x, w = X[0].astype(float), W[:, :, :6].astype(float)
    w = np.concatenate([w, w], 2)
    np.testing.assert_array_equal(nc.conv1d(x, w), nc.conv1d(x[None], w)[0])
    np.testing.assert_array_equal(nc.conv1d(x, w[0], 1.0), nc.conv1d(x, w[:1], np.ones(1))[:, 0])
    np.testing.assert_allclose(nc.conv1d(x[:, 0], w[0, :, 0]), np.correlate(x[:, 0], w[0, :, 0]), atol=1e-12)
    g = nc.conv1d_backward(x[:, 0], w[0, :, 0], np.ones(46))
    assert [a.shape for a in g] == [(50,), (5,), ()]
    g = nc.conv1d_backward(x, w[0], np.ones(46))
    assert [a.shape for a in g] == [(50, 12), (5, 12), ()]
    assert nc.conv_transpose1d(x[:, 0], np.ones(3)).shape == (52,)
    assert nc.conv_transpose1d(x[:, 0], np.ones((3, 2))).shape == (52, 2)


def test_options():
    """Ints, ints alone in a tuple, pairs and words as padding; `out` and `accumulate`."""
    same = nc.conv1d(X, W, padding="same", groups=2)
    assert same.shape == (3, 50, 8)
    np.testing.assert_array_equal(same, nc.conv1d(X, W, padding=2, groups=(2)))
    np.testing.assert_array_equal(same, nc.conv1d(X, W, padding=(2,), stride=(1,), dilation=[1], groups=2))
    np.testing.assert_array_equal(same, nc.conv1d(X, W, padding=np.array([2, 2]), groups=2))
    np.testing.assert_array_equal(same[:, 2:-2], nc.conv1d(X, W, padding="valid", groups=2))
    causal = nc.conv1d(X, W, padding=(4, 0), groups=2)
    later = X.copy()
    later[:, 30:] = 0
    np.testing.assert_array_equal(nc.conv1d(later, W, padding=(4, 0), groups=2)[:, :30], causal[:, :30])
    assert nc.conv_transpose1d(X, V, stride=3, padding="same", groups=2).shape == (3, 150, 8)
    out = np.empty((3, 50, 8), np.float32)
    assert nc.conv1d(X, W, padding=2, groups=2, out=out) is out
    np.testing.assert_array_equal(out, same)
    g = nc.conv1d_backward(X, W, same, padding=2, groups=2)
    twice = nc.conv1d_backward(
        X, W, same, padding=2, groups=2, out=nc.Gradients(None, g.dw.copy(), g.db.copy()), accumulate=True
    )
    np.testing.assert_allclose(twice.dw, 2 * g.dw, rtol=1e-6)


FORMS = (
    "x (N, L, C) with w (D, K, C/groups); x (L, C) with w (D, K, C/groups); x (L, C) with w (K, C); x (L) with w (K)"
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nc.conv1d(X, W), "conv1d: w has 6 input channels per group, but x has 12 channels in 1 group"),
        (lambda: nc.conv1d(X[..., 0], W[0, :, 0]),
         "conv1d: x of shape (3, 50) and w of shape (5,) do not go together; expected "
         f"{FORMS}. A batch without a channel axis, (N, L), is not a form: pass x[..., None]"),
        (lambda: nc.conv1d(X, W[0]),
         "conv1d: x of shape (3, 50, 12) and w of shape (5, 6) do not go together; expected "
         f"{FORMS}"),
        (lambda: nc.conv1d(X, W, groups=2, stride=(1, 2)), "conv1d: stride has 2 values, expected an int"),
        (lambda: nc.conv1d(X, W, groups=2, padding=(1, 2, 3)),
         "conv1d: padding has 3 values, expected an int or a pair"),
        (lambda: nc.conv1d(X, W, groups=2, padding="full"),
         "conv1d: padding is 'full', expected \"valid\", \"same\", an int or a pair (before, after)"),
        (lambda: nc.conv1d(X[:, :3], W, groups=2),
         "conv1d: the kernel spans 5 positions, but the padded input has only 3"),
        (lambda: nc.conv1d(X[:, :0], W, groups=2), "conv1d: x has length 0, expected at least 1"),
        (lambda: nc.conv1d(X, W, B[None], groups=2), "conv1d: b has shape (1, 8), expected (8,); pass b.reshape(-1)"),
        (lambda: nc.conv1d(X, W, groups=2, out=np.empty((3, 45, 8), np.float32)),
         "conv1d: out has shape (3, 45, 8), expected (3, 46, 8)"),
        (lambda: nc.conv1d_backward(X, W, X, groups=2),
         "conv1d_backward: dy has shape (3, 50, 12) (as N, OL, D), expected (3, 46, 8)"),
        (lambda: nc.conv_transpose1d(X, V, stride=2, output_padding=2, groups=2),
         "conv_transpose1d: output_padding is 2, expected less than the stride, 2, or the dilation, 1"),
        (lambda: nc.conv_transpose1d(X, V[:3]), "conv_transpose1d: w has 3 input channels, but x has 12"),
        (lambda: nc.conv1d(X, np.ones((5, 12, 8), np.float32)),
         "conv1d: w has 8 input channels per group, but x has 12 channels in 1 group; if w is (K, C/groups, D), pass "
         'w_layout="HWIO", or w.transpose(2, 0, 1)'),
    ],
)  # fmt: skip
def test_errors(call, message):
    """In the words of the function that was called, and of one dimension."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
