"""Every error: its type and its whole text, before any work, and with nothing written to `out`."""

import re

import ml_dtypes
import numpy as np
import pytest

import nhwconv as nc
from nhwconv import checks, planning

F = np.float32
X = np.ones((2, 5, 6, 3), F)
W = np.ones((4, 3, 2, 3), F)
DY = np.ones((2, 3, 5, 4), F)
B = np.ones(4, F)

DTYPES = "expected float32, float64, float16 or bfloat16"
FORWARD_FORMS = (
    "expected x (N, H, W, C) with w (D, KH, KW, C/groups); x (H, W, C) with w (D, KH, KW, C/groups); "
    "x (H, W, C) with w (KH, KW, C); x (H, W) with w (KH, KW)"
)
WEIGHT_GRAD_FORMS = (
    "expected x (N, H, W, C) with dy (N, OH, OW, D); x (H, W, C) with dy (OH, OW, D); "
    "x (H, W, C) with dy (OH, OW); x (H, W) with dy (OH, OW)"
)
INPUT_GRAD_FORMS = (
    "expected dy (N, OH, OW, D) with w (D, KH, KW, C/groups); dy (OH, OW, D) with w (D, KH, KW, C/groups); "
    "dy (OH, OW) with w (KH, KW, C); dy (OH, OW) with w (KH, KW)"
)
NO_CHANNELS = ". A batch without a channel axis, (N, H, W), is not a form: pass x[..., None]"
NO_CHANNELS_DY = ". A batch without a channel axis, (N, OH, OW), is not a form: pass dy[..., None]"
KNOWN = ", ".join(f'"{name}"' for name in nc.strategies())


def of(*shape):
    return np.ones(shape, F)


def read_only(array):
    array.flags.writeable = False
    return array


SHARED = np.ones(10_000, F)


def forward(x=X, w=W, b=None, **options):
    return lambda: nc.conv2d(x, w, b, **options)


def weight_grad(x=X, dy=DY, *size, **options):
    return lambda: nc.conv2d_weight_grad(x, dy, *size, **options)


def input_grad(dy=DY, w=W, *size, **options):
    return lambda: nc.conv2d_input_grad(dy, w, *size, **options)


def backward(x=X, w=W, dy=DY, **options):
    return lambda: nc.conv2d_backward(x, w, dy, **options)


def bias_grad(dy=DY, **options):
    return lambda: nc.conv2d_bias_grad(dy, **options)


def plan(pass_="forward", x=X.shape, w=W.shape, **options):
    return lambda: nc.plan(pass_, x, w, **options)


def layer(c=3, d=4, size=3, **options):
    return lambda: nc.Conv2D(c, d, size, **options)


ERRORS = [
    # -------------------------------------------------------------- dtypes
    *(
        (forward(x=X.astype(dtype)), TypeError,
         f"conv2d: x has dtype {np.dtype(dtype)}, {DTYPES}; cast it first, for example np.asarray(x, np.float32)")
        for dtype in (int, np.uint8, bool, complex, np.complex64, object, np.longdouble, ml_dtypes.float8_e5m2)
    ),
    (forward(x="x"), TypeError,
     f"conv2d: x has dtype <U1, {DTYPES}; cast it first, for example np.asarray(x, np.float32)"),
    (forward(x=None), TypeError,
     f"conv2d: x has dtype object, {DTYPES}; cast it first, for example np.asarray(x, np.float32)"),
    (forward(w=W.astype(int)), TypeError,
     f"conv2d: w has dtype int64, {DTYPES}; cast it first, for example np.asarray(w, np.float32)"),
    (forward(b=[1, 2, 3, 4]), TypeError,
     f"conv2d: b has dtype int64, {DTYPES}; cast it first, for example np.asarray(b, np.float32)"),
    (weight_grad(dy=DY.astype(int)), TypeError,
     f"conv2d_weight_grad: dy has dtype int64, {DTYPES}; cast it first, for example np.asarray(dy, np.float32)"),
    (input_grad(dy=DY.astype(bool)), TypeError,
     f"conv2d_input_grad: dy has dtype bool, {DTYPES}; cast it first, for example np.asarray(dy, np.float32)"),
    (bias_grad(DY.astype(int)), TypeError,
     f"conv2d_bias_grad: dy has dtype int64, {DTYPES}; cast it first, for example np.asarray(dy, np.float32)"),
    (backward(dy=DY.astype(complex)), TypeError,
     f"conv2d_backward: dy has dtype complex128, {DTYPES}; cast it first, for example np.asarray(dy, np.float32)"),
    (forward(x=X.astype(np.float16), w=W.astype(ml_dtypes.bfloat16)), TypeError,
     "conv2d: NumPy has no common dtype for these (x has float16, w has bfloat16); cast them to float32"),
    (plan(dtype=int), TypeError, f"plan: dtype is int64, {DTYPES}"),
    (plan(dtype="single precision"), TypeError, f"plan: dtype is 'single precision', {DTYPES}"),
    (layer(dtype=int), TypeError, f"Conv2D: dtype is int64, {DTYPES}"),
    (lambda: nc.warmup(dtypes=[int]), TypeError, f"warmup: dtype is int64, {DTYPES}"),
    # -------------------------------------------------------------- what is an array
    (forward(x=np.ma.ones((2, 5, 6, 3))), TypeError,
     "conv2d: x is a masked array, whose mask would be lost; pass x.filled(value) or x.data"),
    (forward(b=np.ma.ones(4)), TypeError,
     "conv2d: b is a masked array, whose mask would be lost; pass b.filled(value) or b.data"),
    (backward(dy=np.ma.ones((2, 3, 5, 4))), TypeError,
     "conv2d_backward: dy is a masked array, whose mask would be lost; pass dy.filled(value) or dy.data"),
    # -------------------------------------------------------------- integers
    (forward(stride=0), ValueError, "conv2d: stride is 0, expected at least 1"),
    (forward(stride=-2), ValueError, "conv2d: stride is -2, expected at least 1"),
    (forward(stride=(1, 0)), ValueError, "conv2d: stride is 0, expected at least 1"),
    (forward(stride=(1, 2, 3)), ValueError, "conv2d: stride has 3 values, expected an int or a pair"),
    (forward(stride=()), ValueError, "conv2d: stride has 0 values, expected an int or a pair"),
    (forward(stride=1.0), TypeError, "conv2d: stride is 1.0, expected an integer"),
    (forward(stride=True), TypeError, "conv2d: stride is True, expected an integer"),
    (forward(stride=np.True_), TypeError, "conv2d: stride is np.True_, expected an integer"),
    (forward(stride="2"), TypeError, "conv2d: stride is '2', expected an integer"),
    (forward(stride=None), TypeError, "conv2d: stride is None, expected an integer"),
    (forward(stride=2**31), ValueError, "conv2d: stride is 2147483648, expected at most 2147483647"),
    (weight_grad(stride=0), ValueError, "conv2d_weight_grad: stride is 0, expected at least 1"),
    (input_grad(stride=(0, 1)), ValueError, "conv2d_input_grad: stride is 0, expected at least 1"),
    (backward(stride=-1), ValueError, "conv2d_backward: stride is -1, expected at least 1"),
    (forward(dilation=0), ValueError, "conv2d: dilation is 0, expected at least 1"),
    (forward(dilation=(1, -1)), ValueError, "conv2d: dilation is -1, expected at least 1"),
    (forward(dilation=1.5), TypeError, "conv2d: dilation is 1.5, expected an integer"),
    (forward(groups=0), ValueError, "conv2d: groups is 0, expected at least 1"),
    (forward(groups=(1, 1)), TypeError, "conv2d: groups is (1, 1), expected an integer"),
    (forward(groups=1.0), TypeError, "conv2d: groups is 1.0, expected an integer"),
    (weight_grad(X, DY, 0), ValueError, "conv2d_weight_grad: kernel_size is 0, expected at least 1"),
    (weight_grad(X, DY, (3, 2, 1)), ValueError,
     "conv2d_weight_grad: kernel_size has 3 values, expected an int or a pair"),
    (input_grad(DY, W, (5, -6)), ValueError, "conv2d_input_grad: input_size is -6, expected at least 1"),
    (input_grad(DY, W, 5.0), TypeError, "conv2d_input_grad: input_size is 5.0, expected an integer"),
    (layer(c=0), ValueError, "Conv2D: in_channels is 0, expected at least 1"),
    (layer(d=True), TypeError, "Conv2D: out_channels is True, expected an integer"),
    (layer(size=(3, 0)), ValueError, "Conv2D: kernel_size is 0, expected at least 1"),
    (layer(stride=0), ValueError, "Conv2D: stride is 0, expected at least 1"),
    # -------------------------------------------------------------- padding
    (forward(padding=-1), ValueError, "conv2d: padding is -1, expected at least 0"),
    (forward(padding=((0, 1), (-1, 0))), ValueError, "conv2d: padding is -1, expected at least 0"),
    (forward(padding="full"), ValueError,
     "conv2d: padding is 'full', expected \"valid\", \"same\", an int, a pair or a pair of pairs"),
    (forward(padding="SAME"), ValueError,
     "conv2d: padding is 'SAME', expected \"valid\", \"same\", an int, a pair or a pair of pairs"),
    (forward(padding=(1, 2, 3, 4)), ValueError, "conv2d: padding has 4 values, expected an int or a pair"),
    (forward(padding=((1, 2), 3)), ValueError,
     "conv2d: padding is ((1, 2), 3), expected ((top, bottom), (left, right))"),
    (forward(padding=((1, 2), (3,))), ValueError,
     "conv2d: padding is ((1, 2), (3,)), expected ((top, bottom), (left, right))"),
    (forward(padding=0.5), TypeError, "conv2d: padding is 0.5, expected an integer"),
    (forward(padding=np.ones((2, 2))), TypeError, "conv2d: padding is 1.0, expected an integer"),
    (forward(padding=False), TypeError, "conv2d: padding is False, expected an integer"),
    # -------------------------------------------------------------- ranks
    (forward(of(2, 5, 6), of(3, 2)), ValueError,
     f"conv2d: x of shape (2, 5, 6) and w of shape (3, 2) do not go together; {FORWARD_FORMS}{NO_CHANNELS}"),
    (forward(of(2, 5, 6), of(4, 3, 2)), ValueError,
     "conv2d: w of shape (4, 3, 2) has 2 channels, but x of shape (2, 5, 6) (as H, W, C) has 6" + NO_CHANNELS),
    (forward(of(5, 6), W), ValueError,
     f"conv2d: x of shape (5, 6) and w of shape (4, 3, 2, 3) do not go together; {FORWARD_FORMS}"),
    (forward(of(5, 6), of(3, 2, 1)), ValueError,
     f"conv2d: x of shape (5, 6) and w of shape (3, 2, 1) do not go together; {FORWARD_FORMS}"),
    (forward(of(1, 2, 5, 6, 3), W), ValueError,
     f"conv2d: x of shape (1, 2, 5, 6, 3) and w of shape (4, 3, 2, 3) do not go together; {FORWARD_FORMS}"),
    (forward(1.0, W), ValueError,
     f"conv2d: x of shape () and w of shape (4, 3, 2, 3) do not go together; {FORWARD_FORMS}"),
    (plan(x=(5, 6)), ValueError,
     f"plan: x of shape (5, 6) and w of shape (4, 3, 2, 3) do not go together; {FORWARD_FORMS}"),
    (weight_grad(of(2, 5, 6), DY), ValueError,
     "conv2d_weight_grad: x of shape (2, 5, 6) and dy of shape (2, 3, 5, 4) do not go together; " + WEIGHT_GRAD_FORMS),
    (weight_grad(of(5, 6), of(3, 5, 4)), ValueError,
     "conv2d_weight_grad: x of shape (5, 6) and dy of shape (3, 5, 4) do not go together; " + WEIGHT_GRAD_FORMS),
    (input_grad(of(2, 3, 5), of(3, 2)), ValueError,
     "conv2d_input_grad: dy of shape (2, 3, 5) and w of shape (3, 2) do not go together; "
     + INPUT_GRAD_FORMS + NO_CHANNELS_DY),
    (input_grad(of(3, 5), W), ValueError,
     "conv2d_input_grad: dy of shape (3, 5) and w of shape (4, 3, 2, 3) do not go together; " + INPUT_GRAD_FORMS),
    (backward(of(2, 5, 6), of(3, 2), of(2, 3, 5)), ValueError,
     f"conv2d_backward: x of shape (2, 5, 6) and w of shape (3, 2) do not go together; {FORWARD_FORMS}{NO_CHANNELS}"),
    (bias_grad(of(4)), ValueError,
     "conv2d_bias_grad: dy has shape (4,), expected (N, OH, OW, D), (OH, OW, D) or (OH, OW)"),
    (forward(of(5, 6, 2), of(3, 2, 2), groups=2), ValueError,
     "conv2d: groups is 2, but arrays without a D axis need groups=1"),
    (forward(of(5, 6), of(3, 2), groups=2), ValueError,
     "conv2d: groups is 2, but arrays without a D axis need groups=1"),
    (weight_grad(of(5, 6, 2), of(3, 5), groups=2), ValueError,
     "conv2d_weight_grad: groups is 2, but arrays without a D axis need groups=1"),
    (input_grad(of(3, 5), of(3, 2), groups=2), ValueError,
     "conv2d_input_grad: groups is 2, but arrays without a D axis need groups=1"),
    # -------------------------------------------------------------- sizes that do not fit together
    (forward(w=of(4, 3, 2, 5)), ValueError,
     "conv2d: w has 5 input channels per group, but x has 3 channels in 1 group"
     "; if w is (D, C/groups, KH, KW), pass w.transpose(0, 2, 3, 1)"),
    (forward(w=of(3, 3, 2, 3), groups=3), ValueError,
     "conv2d: w has 3 input channels per group, but x has 3 channels in 3 groups"),
    (backward(w=of(4, 3, 2, 5)), ValueError,
     "conv2d_backward: w has 5 input channels per group, but x has 3 channels in 1 group"
     "; if w is (D, C/groups, KH, KW), pass w.transpose(0, 2, 3, 1)"),
    (plan(w=(4, 3, 2, 5)), ValueError, "plan: w has 5 input channels per group, but x has 3 channels in 1 group"
     "; if w is (D, C/groups, KH, KW), pass w.transpose(0, 2, 3, 1)"),
    (forward(groups=2), ValueError, "conv2d: x has 3 channels, which 2 groups do not divide"),
    (forward(w=of(4, 3, 2, 1), groups=3), ValueError,
     "conv2d: the convolution has 4 output channels, which 3 groups do not divide"),
    (weight_grad(groups=3), ValueError,
     "conv2d_weight_grad: the convolution has 4 output channels, which 3 groups do not divide"),
    (weight_grad(groups=2), ValueError, "conv2d_weight_grad: x has 3 channels, which 2 groups do not divide"),
    (input_grad(groups=3), ValueError,
     "conv2d_input_grad: the convolution has 4 output channels, which 3 groups do not divide"),
    (layer(c=3, d=4, groups=2), ValueError, "Conv2D: in_channels is 3, which 2 groups do not divide"),
    (layer(c=3, d=4, groups=3), ValueError, "Conv2D: out_channels is 4, which 3 groups do not divide"),
    (input_grad(of(2, 3, 5, 7)), ValueError, "conv2d_input_grad: w has 4 output channels, but dy has 7"),
    (forward(of(2, 0, 6, 3)), ValueError, "conv2d: x has height 0, expected at least 1"),
    (forward(of(2, 5, 0, 3)), ValueError, "conv2d: x has width 0, expected at least 1"),
    (forward(of(2, 5, 6, 0), of(4, 3, 2, 0)), ValueError, "conv2d: x has channels 0, expected at least 1"),
    (forward(w=of(0, 3, 2, 3)), ValueError, "conv2d: the convolution has 0 output channels, expected at least 1"),
    (forward(w=of(4, 0, 2, 3)), ValueError, "conv2d: the kernel has height 0, expected at least 1"),
    (forward(w=of(4, 3, 0, 3)), ValueError, "conv2d: the kernel has width 0, expected at least 1"),
    (forward(w=of(4, 6, 2, 3)), ValueError, "conv2d: the kernel spans 6 rows, but the padded input has only 5"),
    (forward(w=of(4, 3, 9, 3), padding=1), ValueError,
     "conv2d: the kernel spans 9 columns, but the padded input has only 8"),
    (forward(dilation=(3, 1), padding=((1, 0), (0, 0))), ValueError,
     "conv2d: the kernel spans 7 rows, but the padded input has only 6"),
    (weight_grad(X, DY, 7), ValueError,
     "conv2d_weight_grad: the kernel spans 7 rows, but the padded input has only 5"),
    (input_grad(DY, W, (2, 6)), ValueError,
     "conv2d_input_grad: the kernel spans 3 rows, but the padded input has only 2"),
    (weight_grad(dy=of(2, 6, 5, 4)), ValueError,
     "conv2d_weight_grad: dy of shape (2, 6, 5, 4) (as N, OH, OW, D) is larger than "
     "x of shape (2, 5, 6, 3) (as N, H, W, C) allows"),
    (weight_grad(of(5, 6), of(6, 5)), ValueError,
     "conv2d_weight_grad: dy of shape (1, 6, 5, 1) (as N, OH, OW, D) is larger than "
     "x of shape (1, 5, 6, 1) (as N, H, W, C) allows"),
    (weight_grad(X, DY, 3), ValueError,
     "conv2d_weight_grad: dy has shape (2, 3, 5, 4) (as N, OH, OW, D), expected (2, 3, 4, 4)"),
    (weight_grad(dy=of(3, 3, 5, 4)), ValueError,
     "conv2d_weight_grad: dy has shape (3, 3, 5, 4) (as N, OH, OW, D), expected (2, 3, 5, 4)"),
    (input_grad(DY, W, (6, 6)), ValueError,
     "conv2d_input_grad: dy has shape (2, 3, 5, 4) (as N, OH, OW, D), expected (2, 4, 5, 4)"),
    (backward(dy=of(2, 3, 5, 5)), ValueError,
     "conv2d_backward: dy has shape (2, 3, 5, 5) (as N, OH, OW, D), expected (2, 3, 5, 4)"),
    (backward(dy=of(3, 5, 4)), ValueError, "conv2d_backward: dy has shape (3, 5, 4), expected (2, 3, 5, 4)"),
    (backward(X[0], W, DY), ValueError, "conv2d_backward: dy has shape (2, 3, 5, 4), expected (3, 5, 4)"),
    (backward(X[0], W[0], DY[0]), ValueError, "conv2d_backward: dy has shape (3, 5, 4), expected (3, 5)"),
    (input_grad(of(2, 1, 1, 4), of(4, 1, 1, 3), padding=1), ValueError,
     "conv2d_input_grad: dy of 1x1 implies an input of -1x-1, expected at least 1x1"),
    (input_grad(of(2, 0, 1, 4), padding="same"), ValueError,
     "conv2d_input_grad: dy of 0x1 implies an input of 0x1, expected at least 1x1"),
    *(
        (weight_grad(**options), ValueError,
         "conv2d_weight_grad: kernel_size is needed: the shapes determine it only with stride 1, dilation 1 and "
         "padding in numbers")
        for options in ({"stride": 2}, {"dilation": (1, 2)}, {"padding": "same"})
    ),
    (forward(b=of(3)), ValueError, "conv2d: b has shape (3,), expected (4,)"),
    (forward(b=1.0), ValueError, "conv2d: b has shape (), expected (4,)"),
    (forward(b=of(1, 4)), ValueError, "conv2d: b has shape (1, 4), expected (4,); pass b.reshape(-1)"),
    (forward(X[0], W[0], of(1)), ValueError, "conv2d: b has shape (1,), expected ()"),
    # -------------------------------------------------------------- out
    (forward(out=[0.0]), TypeError, "conv2d: out is a list, expected a numpy.ndarray"),
    (forward(out=0), TypeError, "conv2d: out is an int, expected a numpy.ndarray"),
    (forward(out=np.ma.zeros(DY.shape, F)), TypeError, "conv2d: out is a MaskedArray, expected a numpy.ndarray"),
    (forward(out=of(2, 3, 5, 3)), ValueError, "conv2d: out has shape (2, 3, 5, 3), expected (2, 3, 5, 4)"),
    (forward(out=np.ones(DY.shape)), TypeError, "conv2d: out has dtype float64, expected float32"),
    (forward(out=np.ones(DY.shape, np.dtype(F).newbyteorder())), TypeError,
     "conv2d: out has dtype >f4, expected float32"),
    (forward(X, W.astype(float), out=of(*DY.shape)), TypeError, "conv2d: out has dtype float32, expected float64"),
    (forward(out=read_only(of(*DY.shape))), ValueError, "conv2d: out is read-only"),
    (forward(out=np.ones(DY.shape, F, order="F")), ValueError, "conv2d: out must be C-contiguous and aligned"),
    (forward(out=of(2, 3, 5, 8)[..., ::2]), ValueError, "conv2d: out must be C-contiguous and aligned"),
    (forward(out=np.ndarray(DY.shape, F, bytearray(2000), 1)), ValueError,
     "conv2d: out must be C-contiguous and aligned"),
    (forward(SHARED[:180].reshape(X.shape), out=SHARED[179:299].reshape(DY.shape)), ValueError,
     "conv2d: out shares memory with x"),
    (forward(w=SHARED[100:172].reshape(W.shape), out=SHARED[:120].reshape(DY.shape)), ValueError,
     "conv2d: out shares memory with w"),
    (forward(b=SHARED[100:104], out=SHARED[:120].reshape(DY.shape)), ValueError, "conv2d: out shares memory with b"),
    (forward(np.lib.stride_tricks.as_strided(SHARED, X.shape, (4004, 700, 92, 12)), out=SHARED[:120].reshape(DY.shape)),
     ValueError, "conv2d: out shares memory with x"),
    (weight_grad(out=of(4, 3, 2, 4)), ValueError,
     "conv2d_weight_grad: out has shape (4, 3, 2, 4), expected (4, 3, 2, 3)"),
    (weight_grad(out=of(3, 2, 3)), ValueError,
     "conv2d_weight_grad: out has shape (3, 2, 3), expected (4, 3, 2, 3)"),
    (weight_grad(SHARED[:180].reshape(X.shape), out=SHARED[150:222].reshape(W.shape)), ValueError,
     "conv2d_weight_grad: out shares memory with x"),
    (weight_grad(dy=SHARED[:120].reshape(DY.shape), out=SHARED[:72].reshape(W.shape)), ValueError,
     "conv2d_weight_grad: out shares memory with dy"),
    (input_grad(out=of(2, 5, 6, 4)), ValueError,
     "conv2d_input_grad: out has shape (2, 5, 6, 4), expected (2, 5, 6, 3)"),
    (input_grad(out=of(5, 6, 3)), ValueError, "conv2d_input_grad: out has shape (5, 6, 3), expected (2, 5, 6, 3)"),
    (input_grad(w=SHARED[:72].reshape(W.shape), out=SHARED[:180].reshape(X.shape)), ValueError,
     "conv2d_input_grad: out shares memory with w"),
    (bias_grad(out=of(5)), ValueError, "conv2d_bias_grad: out has shape (5,), expected (4,)"),
    (bias_grad(SHARED[:120].reshape(DY.shape), out=SHARED[:4]), ValueError,
     "conv2d_bias_grad: out shares memory with dy"),
    (backward(out=of(3)), TypeError,
     "conv2d_backward: out is of type ndarray, expected Gradients(dx, dw, db)"),
    (backward(out=(None, None)), TypeError,
     "conv2d_backward: out is of type tuple, expected Gradients(dx, dw, db)"),
    (backward(out=nc.Gradients(dw=of(4, 3, 3, 3))), ValueError,
     "conv2d_backward: out.dw has shape (4, 3, 3, 3), expected (4, 3, 2, 3)"),
    (backward(out=nc.Gradients(dx=np.ones(X.shape))), TypeError,
     "conv2d_backward: out.dx has dtype float64, expected float32"),
    (backward(out=nc.Gradients(db=3)), TypeError, "conv2d_backward: out.db is an int, expected a numpy.ndarray"),
    (backward(out=nc.Gradients(SHARED[:180].reshape(X.shape), SHARED[100:172].reshape(W.shape))), ValueError,
     "conv2d_backward: out.dw shares memory with out.dx"),
    (backward(out=nc.Gradients(dx=of(*X.shape)), needs="dw"), ValueError,
     "conv2d_backward: out.dx is given, but dx is not in needs"),
    # -------------------------------------------------------------- accumulate and needs
    (weight_grad(accumulate=True), ValueError, "conv2d_weight_grad: accumulate=True needs out to add to"),
    (bias_grad(accumulate=True), ValueError, "conv2d_bias_grad: accumulate=True needs out to add to"),
    (backward(accumulate=True, out=nc.Gradients(db=of(4))), ValueError,
     "conv2d_backward: accumulate=True needs out.dw to add to"),
    (backward(accumulate=True, needs="db"), ValueError, "conv2d_backward: accumulate=True needs out.db to add to"),
    (weight_grad(accumulate=1), TypeError, "conv2d_weight_grad: accumulate is 1, expected True or False"),
    (backward(needs=("dx", "dz")), ValueError,
     "conv2d_backward: needs has 'dz', expected any of \"dx\", \"dw\", \"db\""),
    (backward(needs=None), ValueError, "conv2d_backward: needs has None, expected any of \"dx\", \"dw\", \"db\""),
    # -------------------------------------------------------------- strategies and passes
    (forward(strategy="lop"), ValueError,
     f'conv2d: there is no strategy "lop", expected "auto" or one of {KNOWN}; did you mean "loop"?'),
    (forward(strategy="fastest"), ValueError,
     f'conv2d: there is no strategy "fastest", expected "auto" or one of {KNOWN}'),
    (weight_grad(strategy=("loop", "im2row")), ValueError,
     f'conv2d_weight_grad: there is no strategy "im2row", expected "auto" or one of {KNOWN}; did you mean "im2col"?'),
    (input_grad(strategy=()), ValueError, "conv2d_input_grad: strategy is an empty tuple, expected at least one name"),
    (backward(strategy=None), TypeError, "conv2d_backward: strategy is None, expected a name or a tuple of names"),
    (forward(strategy=["loop"]), TypeError, "conv2d: strategy is ['loop'], expected a name or a tuple of names"),
    (forward(strategy=("loop", "auto")), ValueError,
     "conv2d: strategy is ('loop', 'auto'), but \"auto\" cannot be one of several names"),
    (layer(strategy="lop"), ValueError,
     f'Conv2D: there is no strategy "lop", expected "auto" or one of {KNOWN}; did you mean "loop"?'),
    (plan("backward"), ValueError, "plan: pass_ is 'backward', expected one of forward, weight_grad, input_grad"),
    (plan(x=5), TypeError, "plan: x_shape is 5, expected a tuple of ints"),
    (plan(w=(4, 3, 2, 3.0)), TypeError, "plan: w_shape is 3.0, expected an integer"),
    (plan(x=(-2, 5, 6, 3)), ValueError, "plan: x_shape is -2, expected at least 0"),
    (lambda: nc.warmup(["forward", "backward"]), ValueError,
     "warmup: passes has 'backward', expected any of forward, weight_grad, input_grad"),
    (lambda: nc.warmup(strategy="lop"), ValueError,
     f'warmup: there is no strategy "lop", expected "auto" or one of {KNOWN}; did you mean "loop"?'),
    (lambda: nc.Conv2D(3, 4, 3).backward(DY), RuntimeError, "Conv2D.backward: call forward first"),
]  # fmt: skip


#: What every call comes to after its checks.
WORK = (planning.Plan, "run"), (planning.Backward, "run"), (planning, "execute")


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=[m[:90] for _, _, m in ERRORS])
def test_message(call, error, message, monkeypatch):
    """The error has its type and exactly this text, and no pass was started."""

    def work(*arguments):
        raise AssertionError("work was done before everything was checked")

    for of, name in WORK:
        monkeypatch.setattr(of, name, work)
    SHARED[:] = 1
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        call()
    assert type(caught.value) is error
    assert (SHARED == 1).all()


def test_work_is_seen(monkeypatch):
    """The test above would notice work: a good call does reach these functions."""
    reached = []
    monkeypatch.setattr(planning.Plan, "run", lambda plan, *_: reached.append(plan.pass_))
    monkeypatch.setattr(planning.Backward, "run", lambda *_: reached.append("backward"))
    monkeypatch.setattr(planning, "execute", lambda *_, **named: reached.append("bias_grad"))
    for call in (forward(), weight_grad(), input_grad(), backward(), bias_grad()):
        call()
    assert reached == ["forward", "weight_grad", "input_grad", "backward", "bias_grad"]


def test_ragged_lists():
    """A list that is no array is an error of ours, with NumPy's reason."""
    with pytest.raises(ValueError, match=r"^conv2d: x is not an array: .*inhomogeneous"):
        nc.conv2d([[1.0, 2.0], [3.0]], W)


BAD_WITH_OUT = [
    (lambda out: nc.conv2d(X, of(4, 3, 2, 5), out=out), DY.shape),
    (lambda out: nc.conv2d(X, W, of(3), out=out), DY.shape),
    (lambda out: nc.conv2d(X, W, strategy="lop", out=out), DY.shape),
    (lambda out: nc.conv2d_weight_grad(X, of(2, 3, 3, 4), (3, 2), out=out), W.shape),
    (lambda out: nc.conv2d_weight_grad(X, DY, (3, 2), accumulate="yes", out=out), W.shape),
    (lambda out: nc.conv2d_input_grad(DY, W, (9, 9), out=out), X.shape),
    (lambda out: nc.conv2d_bias_grad(of(4), out=out), (4,)),
    # dx is good, and would be written first or last: db is what is wrong.
    (lambda out: nc.conv2d_backward(X, W, DY, out=nc.Gradients(dx=out, db=of(5))), X.shape),
    (lambda out: nc.conv2d_backward(X, W, DY, out=nc.Gradients(dw=out, db=of(5))), W.shape),
    (lambda out: nc.conv2d_backward(X, W, DY, out=nc.Gradients(dx=of(1), db=out)), (4,)),
    (lambda out: nc.conv2d_backward(X, W, of(2, 3, 5, 1), out=nc.Gradients(dx=out)), X.shape),
]  # fmt: skip


@pytest.mark.parametrize(("call", "shape"), BAD_WITH_OUT)
def test_out_is_untouched_by_an_error(call, shape):
    """Where anything is wrong nothing is written, not even to the results that were right."""
    out = np.full(shape, 7, F)
    with pytest.raises((ValueError, TypeError)):
        call(out)
    assert (out == 7).all()


def test_out_between_the_elements_of_an_input_is_accepted():
    """may_share_memory says perhaps, shares_memory says no: interleaved arrays do not overlap."""
    both = np.ones((6, 10), F)
    x, out = both[:, :4], both[3, 4:].reshape(3, 2)
    assert np.may_share_memory(x, out)
    assert not np.shares_memory(x, out)
    assert nc.conv2d(x, of(4, 3), out=out) is out
    np.testing.assert_array_equal(out, np.full((3, 2), 12))
    np.testing.assert_array_equal(x, of(6, 4))


def test_an_undecided_overlap_counts_as_overlap(monkeypatch):
    """Where NumPy gives up, the answer is yes."""

    def too_hard(a, b, max_work):
        assert max_work == 1000
        raise np.exceptions.TooHardError

    monkeypatch.setattr(np, "shares_memory", too_hard)
    x = SHARED[:180].reshape(X.shape)
    with pytest.raises(ValueError, match=r"^conv2d: out shares memory with x$"):
        nc.conv2d(x, W, out=SHARED[100:220].reshape(DY.shape))


def test_equal_arguments_of_other_types_are_checked_each_time():
    """1, 1.0 and True are equal, and plans are remembered: each is still judged by itself."""
    for _ in range(2):
        nc.conv2d(X, W, stride=1)
        for bad in (1.0, True):
            with pytest.raises(TypeError, match=f"stride is {bad}, expected an integer"):
                nc.conv2d(X, W, stride=bad)
        nc.conv2d(X, W, stride=(1, 1))
        nc.conv2d_weight_grad(X, DY, (3, 2))
        for bad in (1.0, True):
            with pytest.raises(TypeError, match=f"stride is {bad}, expected an integer"):
                nc.conv2d(X, W, stride=(bad, 1))
            with pytest.raises(TypeError, match="expected an integer"):
                nc.conv2d_weight_grad(X, DY, (3, 2 * float(bad)))


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError])
def test_a_refusal_gets_the_words_of_the_function(error):
    """One place puts the public function's name before the message, and makes the error; nothing is chained to it."""
    with pytest.raises(error, match=r"^conv2d: x is odd$") as caught, checks.words_of("conv2d"):
        checks.fail("x is odd", error)
    assert caught.value.__suppress_context__
    assert not isinstance(caught.value, checks.Refusal)


def test_other_errors_pass_as_they_are():
    """What is not a refusal is a mistake of ours, or the interpreter's: nothing is said in its place."""
    with pytest.raises(ZeroDivisionError, match="zero"), checks.words_of("conv2d"):
        _ = 1 // 0


class N:
    """An integer as NumPy and others make them: an object with __index__."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


@pytest.mark.parametrize("function", [forward, backward])
def test_integers_of_other_types_are_planned_by_their_value(function):
    """Not by what they are: one object after another, one object whose value changes, and the same value as an int."""
    shapes = []
    for stride in (N(1), N(2), 1, 2):
        y = nc.conv2d(X, W, stride=stride)
        shapes.append(y.shape)
    assert shapes == [(2, 3, 5, 4), (2, 2, 3, 4)] * 2
    changing = N(1)
    assert nc.conv2d(X, W, stride=changing).shape == (2, 3, 5, 4)
    changing.value = 2
    assert nc.conv2d(X, W, stride=changing).shape == (2, 2, 3, 4)
    assert nc.plan("forward", X.shape, W.shape, stride=changing) == nc.plan("forward", X.shape, W.shape, stride=2)
    for bad in (True, 1.0, np.float32(1), np.True_):
        function(stride=1)()
        with pytest.raises(TypeError, match="expected an integer"):
            function(stride=bad)()
        with pytest.raises(TypeError, match="expected an integer"):
            function(groups=bad)()
