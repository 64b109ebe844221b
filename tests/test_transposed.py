"""Transposed convolution: against the oracle, in identities, its sizes as PyTorch and Keras have them, its errors."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nhwconv as nc
import oracle
from cases import DTYPES, Case, draw_data, supporting
from nhwconv.strategies import REGISTRY
from tolerance import assert_close, error_norm

#: The convolutions whose transposes are taken: phases without taps, groups, one channel a group, few and many channels.
CASES = (
    Case(n=2, h=14, w=15, c=4, d=6, stride=(2, 2), padding=((1, 0), (2, 1)), groups=2),
    Case(n=2, h=13, w=11, c=3, d=5, kh=1, kw=2, stride=(3, 4)),
    Case(n=2, h=9, w=11, c=6, d=12, stride=(2, 1), padding=((1, 1), (0, 1)), groups=6),
    Case(n=1, h=12, w=12, c=40, d=34, padding=((2, 0), (1, 1)), groups=2),
    Case(n=2, h=16, w=16, c=64, d=32, kh=4, kw=4, stride=(2, 2), padding=((1, 1), (1, 1))),
    Case(n=2, h=16, w=16, c=33, d=48, kh=2, kw=2, stride=(2, 2)),
    Case(n=1, h=16, w=17, c=3, d=32, dilation=(2, 3), stride=(2, 3)),
    Case(n=3, h=4, w=5, c=7, d=20, kh=4, kw=5),
)

each_strategy = pytest.mark.parametrize("strategy", REGISTRY)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize("dtype", [*DTYPES, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
@each_case
@each_strategy
def test_forward_is_the_input_gradient_with_a_bias(strategy, case, dtype):
    """It is what the oracle's input gradient says, plus b everywhere, also where no tap leads."""
    if strategy not in supporting(case, "input_grad", dtype=dtype):
        return
    data = draw_data(case, dtype)
    x, b = data.dy, np.arange(1, case.c + 1).astype(dtype)
    exact, absolute = oracle.with_absolute(oracle.input_grad, x, data.w, size=(case.h, case.w), **case.options)
    options = {**case.options, "output_padding": case.output_padding, "strategy": strategy}
    for bias in (None, b):
        more = 0 if bias is None else bias.astype(float)
        y = nc.conv_transpose2d(x, data.w, bias, **options)
        assert_close(y, exact + more, absolute + more, case.length("input_grad") + 1, strategy)
    out = np.full(y.shape, np.nan, dtype)
    assert nc.conv_transpose2d(x, data.w, b, **options, out=out) is out
    assert out.tobytes() == y.tobytes()


@each_case
@each_strategy
def test_gradients_are_the_passes_of_the_convolution(strategy, case):
    """dx is a forward pass over dy, dw the weight gradient with x and dy exchanged, db a sum of dy: bit for bit."""
    if strategy not in supporting(case, "forward", "weight_grad"):
        return
    data = draw_data(case, np.float32)
    x, dy = data.dy, data.x
    options = {**case.options, "strategy": strategy}
    g = nc.conv_transpose2d_backward(x, data.w, dy, **options, output_padding=case.output_padding)
    np.testing.assert_array_equal(g.dx, nc.conv2d(dy, data.w, **options))
    np.testing.assert_array_equal(g.dw, nc.conv2d_weight_grad(dy, x, (case.kh, case.kw), **options))
    np.testing.assert_array_equal(g.db, nc.conv2d_bias_grad(dy))
    one = nc.conv_transpose2d_backward(x, data.w, dy, needs="dw", **options, output_padding=case.output_padding)
    assert one.dx is None
    assert one.db is None
    np.testing.assert_array_equal(one.dw, g.dw)


@each_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_adjoint_identity(dtype, case):
    """<transposed(x, w), dy> = <x, dx> = <w, dw>: for what "auto" takes."""
    data = draw_data(case, dtype)
    x, w, dy = data.dy, data.w, data.x
    options = {**case.options, "output_padding": case.output_padding}
    y, g = nc.conv_transpose2d(x, w, **options), nc.conv_transpose2d_backward(x, w, dy, **options)
    products = [np.sum(a.astype(float) * b.astype(float)) for a, b in ((y, dy), (g.dx, x), (g.dw, w))]
    _, absolute = oracle.with_absolute(oracle.input_grad, x, w, size=(case.h, case.w), **case.options)
    allowed = 3 * error_norm("winograd", absolute, 1, np.dtype(dtype)) * np.linalg.norm(dy)
    assert max(products) - min(products) <= allowed
    assert allowed < 1e-2 * np.linalg.norm(y) * np.linalg.norm(dy)


def test_both_sides_of_an_autoencoder_have_the_same_weights():
    """The transpose of a convolution has its weights, and gives an array of its input's shape."""
    x, w = np.ones((2, 8, 6, 3)), np.ones((5, 2, 2, 3))
    y = nc.conv2d(x, w, stride=2)
    assert nc.conv_transpose2d(y, w, stride=2).shape == x.shape


# ------------------------------------------------------------------------------------------------- sizes


def shape(size: int, kernel: int, **options: Any) -> tuple[int, ...]:
    return nc.conv_transpose2d(np.ones((1, size, size, 1)), np.ones((1, kernel, kernel, 1)), **options).shape[1:3]


@pytest.mark.parametrize(
    ("size", "kernel", "options", "expected"),
    [
        (5, 3, {}, 7),
        (5, 3, {"stride": 2}, 11),
        (5, 3, {"stride": 2, "padding": 1, "output_padding": 1}, 10),
        (5, 4, {"stride": 2, "padding": 1}, 10),
        (5, 3, {"stride": 1, "dilation": 3, "output_padding": 2}, 13),  # fewer than the dilation, as PyTorch has it
        # Keras: size * stride, or that and what the kernel spans beyond the stride.
        (5, 3, {"padding": "same", "stride": 2}, 10),
        (5, 2, {"padding": "same", "stride": 3}, 15),
        (5, 3, {"padding": "same"}, 5),
        (5, 3, {"padding": "valid", "stride": 2}, 11),
        (5, 2, {"padding": "valid", "stride": 3}, 15),
        (5, 2, {"padding": 0, "stride": 3}, 14),
        (5, 3, {"padding": "same", "stride": 2, "output_padding": 0}, 9),
        (5, 3, {"padding": "same", "stride": 2, "output_padding": 1}, 10),
        (5, 2, {"padding": "valid", "stride": 3, "output_padding": 0}, 14),
        (5, 3, {"padding": "same", "dilation": 2}, 5),
    ],
)
def test_sizes(size, kernel, options, expected):
    """Outputs are as many as PyTorch and Keras give."""
    assert shape(size, kernel, **options) == (expected, expected)


def test_sides_of_padding():
    """Asymmetric padding cuts off at the sides that it names; "same" cuts the odd one off at the end."""
    x, w = np.ones((1, 3, 3, 1)), np.arange(9.0).reshape(1, 3, 3, 1)
    whole = nc.conv_transpose2d(x, w)
    np.testing.assert_array_equal(nc.conv_transpose2d(x, w, padding=((1, 0), (0, 2))), whole[:, 1:, :-2])
    w = np.arange(4.0).reshape(1, 2, 2, 1)
    whole = nc.conv_transpose2d(x, w)
    np.testing.assert_array_equal(nc.conv_transpose2d(x, w, padding="same"), whole[:, :-1, :-1])
    same = {"padding": "same", "stride": 2}
    np.testing.assert_array_equal(
        nc.conv_transpose2d(x, w, **same), nc.conv2d_input_grad(x, w, (6, 6), **same)
    )  # the gradient of TensorFlow's "same"


def test_more_outputs_than_kernels_reach_hold_the_bias():
    """`output_padding` adds outputs that only the bias reaches, in every strategy."""
    x, w = np.ones((2, 3, 4, 8), np.float32), np.ones((8, 1, 1, 8), np.float32)
    for strategy in ("loop", "im2col", "plain", "tensordot"):
        y = nc.conv_transpose2d(
            x, w, np.full(8, 7, np.float32), stride=(3, 1), dilation=(1, 3), output_padding=2, strategy=strategy
        )
        assert y.shape == (2, 9, 6, 8)
        assert (y[:, ::3, :4] == 15).all()
        y[:, ::3, :4] = 7
        assert (y == 7).all()


def test_smaller_forms():
    """One image, and the forms without a channel axis, are the batch of one image or one channel."""
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal((4, 5, 3)), rng.standard_normal((3, 2, 2, 6)), rng.standard_normal(6)
    np.testing.assert_array_equal(nc.conv_transpose2d(x, w, b), nc.conv_transpose2d(x[None], w, b)[0])
    flat = x[..., 0]
    batched = nc.conv_transpose2d(flat[None, ..., None], w[:1], b)
    np.testing.assert_array_equal(nc.conv_transpose2d(flat, w[0], b), batched[0])
    one = nc.conv_transpose2d(flat, w[0, ..., 0], b[0])
    np.testing.assert_allclose(one, batched[0, ..., 0], rtol=1e-12)
    g = nc.conv_transpose2d_backward(flat, w[0, ..., 0], one)
    assert [a.shape for a in g] == [(4, 5), (2, 2), ()]


def test_an_empty_batch():
    """It gives an empty result, and gradients of zero."""
    x, w = np.ones((0, 3, 3, 4)), np.ones((4, 2, 2, 5))
    y = nc.conv_transpose2d(x, w)
    assert y.shape == (0, 4, 4, 5)
    g = nc.conv_transpose2d_backward(x, w, y)
    assert g.dx.shape == x.shape
    assert not g.dw.any()
    assert not g.db.any()


# ------------------------------------------------------------------------------------------------ errors

X, W = np.ones((2, 5, 6, 3), np.float32), np.ones((3, 3, 2, 4), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nc.conv_transpose2d(X, W[:2]), "conv_transpose2d: w has 2 input channels, but x has 3"),
        (lambda: nc.conv_transpose2d(X, W, groups=2),
         "conv_transpose2d: x has 3 channels, which 2 groups do not divide"),
        (lambda: nc.conv_transpose2d(X, W, np.ones(3, np.float32)),
         "conv_transpose2d: b has shape (3,), expected (4,)"),
        (lambda: nc.conv_transpose2d(X, W, np.ones((4, 1), np.float32)),
         "conv_transpose2d: b has shape (4, 1), expected (4,); pass b.reshape(-1)"),
        (lambda: nc.conv_transpose2d(X, W, padding=9),
         "conv_transpose2d: x has 5 rows, which give an output of -11, expected at least 1"),
        (lambda: nc.conv_transpose2d(X, W, stride=2, output_padding=2),
         "conv_transpose2d: output_padding is 2, expected less than the stride, 2, or the dilation, 1"),
        (lambda: nc.conv_transpose2d(X, W, stride=2, output_padding=-1),
         "conv_transpose2d: output_padding is -1, expected at least 0"),
        (lambda: nc.conv_transpose2d(X, W, padding="same", output_padding=0),
         'conv_transpose2d: output_padding is 0, but with padding="same" no convolution makes 6 columns of 5'),
        (lambda: nc.conv_transpose2d(X[..., 0], W),
         "conv_transpose2d: w has 3 input channels, but x has 6"),
        (lambda: nc.conv_transpose2d(X[0, 0, 0], W),
         "conv_transpose2d: x of shape (3,) and w of shape (3, 3, 2, 4) do not go together; expected "
         "x (N, H, W, C) with w (C, KH, KW, D/groups); x (H, W, C) with w (C, KH, KW, D/groups); "
         "x (H, W) with w (KH, KW, D); x (H, W) with w (KH, KW)"),
        (lambda: nc.conv_transpose2d_backward(X, W, X),
         "conv_transpose2d_backward: dy has shape (2, 5, 6, 3) (as N, OH, OW, D), expected (2, 7, 7, 4)"),
        (lambda: nc.conv_transpose2d(X, W, out=np.ones((2, 7, 7, 3), np.float32)),
         "conv_transpose2d: out has shape (2, 7, 7, 3), expected (2, 7, 7, 4)"),
        (lambda: nc.conv_transpose2d(X, W, layout="NCWH"),
         "conv_transpose2d: layout is 'NCWH', expected 'NHWC' or 'NCHW'"),
        (lambda: nc.conv_transpose2d(X[:, :0], W), "conv_transpose2d: x has height 0, expected at least 1"),
    ],
)  # fmt: skip
def test_errors(call, message):
    """In the words of the function that was called, before any work."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()
