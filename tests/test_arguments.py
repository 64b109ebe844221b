"""Arguments: options by value, whatever their type; no warning for what data hold; hints for others' shapes."""

from __future__ import annotations

import re
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest

import nhwconv as nc
from cases import Case, draw_data, supporting
from nhwconv.strategies import REGISTRY

X, W = np.ones((2, 9, 9, 3), np.float32), np.ones((4, 3, 3, 3), np.float32)


class Index:
    """An integer by `__index__` alone; all of them look alike, and compare as objects do."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return "Index()"


@pytest.mark.parametrize("name", ["stride", "dilation", "padding"])
def test_integers_are_planned_by_value(name):
    """Objects that print alike are different options; one that changes is another option at its next call."""
    shapes = [nc.conv2d(X, W, **{name: Index(i)}).shape for i in (1, 2, 3)]
    assert shapes == [nc.conv2d(X, W, **{name: i}).shape for i in (1, 2, 3)]
    assert len(set(shapes)) == 3
    one = Index(1)
    assert nc.conv2d(X, W, **{name: (one, one)}).shape == shapes[0]
    one.value = 2
    assert nc.conv2d(X, W, **{name: (one, one)}).shape == shapes[1]
    with np.printoptions(formatter={"int": lambda _: "?"}):
        assert [nc.conv2d(X, W, **{name: np.array([i, i])}).shape for i in (1, 2, 3)] == shapes
    g = [nc.conv2d_backward(X, W, np.ones(s, np.float32), **{name: Index(i)}) for i, s in enumerate(shapes, 1)]
    assert [a.dx.shape for a in g] == [X.shape] * 3


def test_other_integers_are_planned_by_value():
    """Groups, sizes and shapes, and the options of the other functions."""
    dy = np.ones((2, 5, 5, 4), np.float32)
    assert nc.conv2d_weight_grad(X, dy, Index(5)).shape == (4, 5, 5, 3)
    assert nc.conv2d_weight_grad(X, dy, Index(1), stride=Index(2)).shape == (4, 1, 1, 3)
    assert nc.conv2d_input_grad(dy, W, Index(9), stride=2, padding=1).shape == (2, 9, 9, 3)
    assert nc.conv2d_input_grad(dy, W, Index(10), stride=2, padding=1).shape == (2, 10, 10, 3)
    assert (
        nc.conv2d(np.ones((2, 9, 9, 4), np.float32), np.ones((4, 3, 3, 2), np.float32), groups=Index(2)).shape[3] == 4
    )
    w = np.ones((3, 3, 3, 4), np.float32)
    sizes = [nc.conv_transpose2d(X, w, stride=3, output_padding=Index(i)).shape[1] for i in (0, 1, 2)]
    assert sizes == [27, 28, 29]
    assert nc.plan("forward", (Index(2), 9, 9, 3), W.shape) == nc.plan("forward", X.shape, W.shape)


# ---------------------------------------------------------------------------------------- floating point

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
CASES = (Case(n=2, h=9, w=9, c=4, d=4, groups=4, padding=((1, 1), (1, 1))), Case(n=2, h=12, w=12, c=32, d=32))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("strategy", REGISTRY)
def test_no_call_warns_or_raises_for_what_data_hold(strategy, dtype):
    """Underflow, overflow, NaN and Inf flow through, whatever NumPy's error state, in every function."""
    for case in CASES:
        if strategy not in supporting(case, "forward", "weight_grad", "input_grad", dtype=dtype):
            continue
        data = draw_data(case, dtype)
        info = ml_dtypes.finfo(dtype)
        for value in (info.smallest_subnormal, info.tiny, info.max, np.inf, np.nan):
            with np.errstate(all="ignore"):
                x, w, b, dy = (np.full(a.shape, float(value), dtype) for a in data)
                w[1::2] = 1
            options = {**case.options, "strategy": strategy}
            with np.errstate(all="raise"), warnings.catch_warnings():
                warnings.simplefilter("error")
                nc.conv2d(x, w, b, **options)
                if strategy != "winograd":
                    nc.conv2d(x[0, ..., 0], w[0, ..., 0], 1e300, strategy=strategy)
                g = nc.conv2d_backward(x, w, dy, **options)
                nc.conv2d_backward(x, w, dy, **options, out=g, accumulate=True)
                nc.conv2d_bias_grad(dy)
                nc.conv_transpose2d(dy, w, x[0, 0, 0], **options)
                nc.conv2d(x.astype(x.dtype.newbyteorder()) if x.dtype.isbuiltin == 1 else x[::-1], w, b, **options)


def test_mixed_dtypes_do_not_warn():
    """What one array is converted to, for the sake of another."""
    with np.errstate(all="raise"):
        small = np.full(W.shape, 1e-320)
        assert nc.conv2d(X, small).dtype == np.float64
        nan = np.full(W.shape, np.nan, np.float16)
        assert np.isnan(nc.conv2d(X, nan)).all()
        assert nc.Conv2D(3, 4, 3, dtype=np.float16, rng=0).forward(X.astype(np.float16)).dtype == np.float16


def test_a_bias_that_is_a_number():
    """It is taken as often as it is given."""
    for _ in range(3):
        np.testing.assert_array_equal(nc.conv2d(X[0], W[0], 1.5), nc.conv2d(X[0], W[0]) + np.float32(1.5))


# ------------------------------------------------------------------------------------------------- hints


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nc.conv2d(X, np.ones((3, 3, 3, 8), np.float32)),
         "conv2d: w has 8 input channels per group, but x has 3 channels in 1 group; if w is (KH, KW, C/groups, D), "
         'pass w_layout="HWIO", or w.transpose(3, 0, 1, 2)'),
        (lambda: nc.conv2d(X, np.ones((3, 3, 3, 8), np.float32), w_layout="OHWI"),
         "conv2d: w has 8 input channels per group, but x has 3 channels in 1 group; if w is (KH, KW, C/groups, D), "
         'pass w_layout="HWIO", or w.transpose(3, 0, 1, 2)'),
        (lambda: nc.conv2d(X, np.ones((8, 5, 5, 3), np.float32), w_layout="HWIO"),
         "conv2d: w has 5 input channels per group, but x has 3 channels in 1 group; if w is (D, KH, KW, C/groups), "
         'pass w_layout="OHWI", or w.transpose(1, 2, 3, 0)'),
        (lambda: nc.conv2d(X, np.ones((8, 3, 5, 5), np.float32)),
         "conv2d: w has 5 input channels per group, but x has 3 channels in 1 group; if w is (D, C/groups, KH, KW), "
         "pass w.transpose(0, 2, 3, 1)"),
        (lambda: nc.conv2d(X, np.ones((8, 5, 5, 5), np.float32)),
         "conv2d: w has 5 input channels per group, but x has 3 channels in 1 group"),
        (lambda: nc.conv2d(X, W, np.ones((4, 1), np.float32)),
         "conv2d: b has shape (4, 1), expected (4,); pass b.reshape(-1)"),
        (lambda: nc.conv2d(X, W, np.ones((1, 1, 1, 4), np.float32)),
         "conv2d: b has shape (1, 1, 1, 4), expected (4,); pass b.reshape(-1)"),
        (lambda: nc.conv2d(X, W, np.ones((5, 1), np.float32)), "conv2d: b has shape (5, 1), expected (4,)"),
        (lambda: nc.conv2d(X, W, stride=(1, 2, 3, 1)),
         "conv2d: stride has 4 values, expected an int or a pair; of TensorFlow's four, pass (2, 3)"),
        (lambda: nc.conv2d(X, W, dilation=[1, 2, 2, 1]),
         "conv2d: dilation has 4 values, expected an int or a pair; of TensorFlow's four, pass (2, 2)"),
        (lambda: nc.conv2d(X, W, stride=(2, 2, 2, 2)), "conv2d: stride has 4 values, expected an int or a pair"),
        (lambda: nc.conv2d(X, W, layout="nchw"), "conv2d: layout is 'nchw', expected 'NHWC' or 'NCHW'"),
        (lambda: nc.conv2d(X, W, w_layout="OIHW"), "conv2d: w_layout is 'OIHW', expected 'OHWI' or 'HWIO'"),
        (lambda: nc.conv2d(X, W, layout="NCHW", w_layout="HWIO"),
         "conv2d: w_layout is 'HWIO', but with layout=\"NCHW\" weights are OIHW"),
        (lambda: nc.conv2d(X[0, 0], W[0, 0], layout="NCHW"),
         "conv2d: x of shape (9, 3) and w of shape (3, 3) do not go together; expected x (N, C, H, W) with w "
         "(D, C/groups, KH, KW); x (C, H, W) with w (D, C/groups, KH, KW)"),
    ],
)  # fmt: skip
def test_hints(call, message):
    """A message suggests what would fit, and nothing where nothing does."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


# --------------------------------------------------------------------------------------------- results


def test_results_are_plain_arrays():
    """Those below 1 MiB own their memory, as NumPy's do; larger ones are views of it, and nothing else differs."""
    some, large = nc.conv2d(np.ones((1, 60, 60, 3), np.float32), W), nc.conv2d(np.ones((2, 400, 400, 3), np.float32), W)
    assert some.nbytes > 4096
    for y in (some, large):
        assert type(y) is np.ndarray
        assert y.flags.c_contiguous
        assert y.flags.writeable
        assert y.flags.aligned
    assert some.base is None
    assert some.flags.owndata
    assert sys.getsizeof(some) == sys.getsizeof(some.copy())
    some.resize((1, 2, 2, 2))
    assert large.nbytes >= 2**20
    assert large.ctypes.data % 64 == 0
    assert large.base is not None
    assert large.copy().flags.owndata
