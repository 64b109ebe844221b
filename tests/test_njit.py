"""The public functions in users' compiled code: the bits, forms, errors and promises that they have outside of it."""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import carray

import child
import compiled
import nhwconv as nc
import threaded
from cases import DTYPES, PASSES, data_of, exact_of, run, supporting, typical
from compiled import LARGE, SMALL, options
from nhwconv.njit import answers, layout, table
from nhwconv.strategies import REGISTRY
from tolerance import assert_close

PACKAGE = Path(nc.__file__).parent
_X, _W, _B, _DY = data_of(SMALL, np.float32)


def assert_same(got: Any, expected: Any) -> None:
    """Check that results are of one type, shape, dtype, and of the same bits."""
    assert type(got) is type(expected)
    if isinstance(expected, tuple):
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)
    elif expected is not None:
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert got.tobytes() == expected.tobytes()


# ----------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_strategy_gives_the_bits_that_it_gives_outside(dtype: Any, pass_: str) -> None:
    for strategy in REGISTRY:
        case = typical(strategy, pass_, dtype=dtype)
        data = data_of(case, dtype)
        for _ in range(2):  # new, and known
            got = compiled.run(case, data, pass_, strategy)
            assert_same(got, run(case, data, pass_, strategy))
            assert_close(got, *exact_of(case, dtype, pass_), case.length(pass_), strategy, case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_gradients_together_and_those_of_a_bias(dtype: Any) -> None:
    for case in (SMALL, LARGE):
        data = data_of(case, dtype)
        for strategy in supporting(case, *PASSES, dtype=dtype):
            got = compiled.backward(data.x, data.w, data.dy, *options(case, strategy))
            expected = nc.conv2d_backward(data.x, data.w, data.dy, **case.options, strategy=strategy)
            assert_same(tuple(got), tuple(expected))
        assert_same(compiled.bias_grad(data.dy), nc.conv2d_bias_grad(data.dy))


def test_smaller_forms_have_the_shapes_that_they_have_outside() -> None:
    x, w, b, dy = data_of(SMALL, np.float32)
    one = options(SMALL)
    for x_, w_, b_, dy_ in ((x[0], w, b, dy[0]), (x[0], w[0], b[0], dy[0, ..., 0])):
        b_ = np.asarray(b_)
        assert_same(compiled.forward(x_, w_, b_, *one), nc.conv2d(x_, w_, b_, padding=1))
        assert_same(compiled.weight_grad(x_, dy_, (3, 3), *one), nc.conv2d_weight_grad(x_, dy_, 3, padding=1))
        assert_same(compiled.input_grad(dy_, w_, (8, 8), *one), nc.conv2d_input_grad(dy_, w_, 8, padding=1))
        assert_same(compiled.backward(x_, w_, dy_, *one), nc.conv2d_backward(x_, w_, dy_, padding=1))
        assert_same(compiled.bias_grad(dy_), nc.conv2d_bias_grad(dy_))
    x2, w2, dy2 = (np.ascontiguousarray(a[0, ..., 0]) for a in (x, w, dy))
    assert_same(compiled.forward(x2, w2, 0.1, *one), nc.conv2d(x2, w2, 0.1, padding=1))
    assert_same(compiled.forward(x2.astype(float), w2, 0.1, *one), nc.conv2d(x2.astype(float), w2, 0.1, padding=1))
    assert_same(compiled.backward(x2, w2, dy2, *one), nc.conv2d_backward(x2, w2, dy2, padding=1))


def test_arrays_of_any_layout_and_of_two_dtypes() -> None:
    data = data_of(SMALL, np.float32)
    x, w, b = data.x, data.w, data.b
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert not unaligned.flags.aligned
    for x_ in (np.asfortranarray(x), x[:, ::-1], np.repeat(x, 2, 2)[:, :, ::2], np.broadcast_to(x, (3, *x.shape[1:])),
               unaligned, x.astype(np.float64)):  # fmt: skip
        assert_same(compiled.forward(x_, w[::-1], b[::-1], *options(SMALL)), nc.conv2d(x_, w[::-1], b[::-1], padding=1))
    assert_same(compiled.forward(x, w, b.astype(float), *options(SMALL)), nc.conv2d(x, w, b.astype(float), padding=1))


def test_an_empty_batch() -> None:
    data = data_of(SMALL, np.float32)
    x, dy = data.x[:0], data.dy[:0]
    assert compiled.forward(x, data.w, data.b, *options(SMALL)).shape == (0, 8, 8, 8)
    assert_same(compiled.backward(x, data.w, dy, *options(SMALL)), nc.conv2d_backward(x, data.w, dy, padding=1))
    assert_same(compiled.bias_grad(dy), np.zeros(8, np.float32))


def test_options_are_literals_or_values_of_every_form() -> None:
    x, w, b, dy = data_of(SMALL, np.float32)

    @numba.njit
    def literals(x, w, b):
        return (
            nc.conv2d(x, w),
            nc.conv2d(x, w, b=b, stride=2, padding="same"),
            nc.conv2d(x, w, stride=(1, 2), padding=(2, 0), dilation=2, strategy="loop"),
            nc.conv2d(x, w, b, padding=((1, 0), (2, 1)), strategy=("winograd", "loop")),
            nc.conv2d(x, w, padding="valid", strategy="tensordot"),
        )

    @numba.njit
    def values(x, w, one, pair, text, name):
        return (
            nc.conv2d(x, w, stride=one, padding=(one, 0), dilation=pair),
            nc.conv2d(x, w, padding=text, strategy=name),
            nc.conv2d(x, w, padding=(pair, (one, 2))),
        )

    assert_same(
        literals(x, w, b),
        (
            nc.conv2d(x, w),
            nc.conv2d(x, w, b=b, stride=2, padding="same"),
            nc.conv2d(x, w, stride=(1, 2), padding=(2, 0), dilation=2, strategy="loop"),
            nc.conv2d(x, w, b, padding=((1, 0), (2, 1)), strategy=("winograd", "loop")),
            nc.conv2d(x, w, padding="valid", strategy="tensordot"),
        ),
    )
    for text in ("same", "valid"):
        assert_same(
            values(x, w, np.uint8(1), (2, 1), text, "loop"),
            (
                nc.conv2d(x, w, stride=1, padding=(1, 0), dilation=(2, 1)),
                nc.conv2d(x, w, padding=text, strategy="loop"),
                nc.conv2d(x, w, padding=((2, 1), (1, 2))),
            ),
        )

    @numba.njit
    def needed(x, w, dy):
        g = nc.conv2d_backward(x, w, dy, padding=1, needs="dw")
        dx, dw, db = nc.conv2d_backward(x, w, dy, padding=1, needs=("dx", "db"))
        return g, dx, dw, db

    assert_same(needed(x, w, dy), needed.py_func(x, w, dy))


def test_results_go_where_the_caller_says_and_are_added_there() -> None:
    x, w, b, dy = data_of(SMALL, np.float32)

    @numba.njit
    def into(x, w, dy, y, dx, dw, db, add):
        nc.conv2d(x, w, padding=1, out=y)
        nc.conv2d_input_grad(dy, w, padding=1, out=dx)
        nc.conv2d_weight_grad(x, dy, padding=1, out=dw, accumulate=add)
        nc.conv2d_bias_grad(dy, out=db, accumulate=add)
        return nc.conv2d_backward(
            x, w, dy, needs=("dw", "db"), padding=1, out=nc.Gradients(None, dw, db), accumulate=True
        )

    def outside(x, w, dy, y, dx, dw, db, add):
        return into.py_func(x, w, dy, y, dx, dw, db, add)

    for add in (False, True):
        got, expected = ([np.full_like(a, 0.5) for a in (dy, x, w, b)] for _ in range(2))
        returned = into(x, w, dy, *got, add)
        outside(x, w, dy, *expected, add)
        assert_same(tuple(got), tuple(expected))
        assert returned.dw.ctypes.data == got[2].ctypes.data
    some = np.zeros((2, 3, 3, 8), np.float32)[::2]  # C-contiguous, which its type does not say
    assert some.flags.c_contiguous
    assert_same(_into(x[:, :3, :3], w, some), nc.conv2d(x[:, :3, :3], w, padding=1))


def test_other_names_of_the_same_sums() -> None:
    x, w, b, _ = data_of(SMALL, np.float32)
    turned = np.ascontiguousarray(w.transpose(3, 1, 2, 0))  # (C, KH, KW, D)

    @numba.njit
    def transposed(x, w, b):
        y = nc.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1)
        return y, nc.conv_transpose2d_backward(x, w, y, stride=2, padding=1, output_padding=(1, 1), needs=("dx", "db"))

    assert_same(transposed(x, turned, b), transposed.py_func(x, turned, b))

    @numba.njit
    def in_one_dimension(x, w, turned, b, dx, dw):
        y = nc.conv1d(x, w, b, padding=(2, 0), dilation=(1,))
        z = nc.conv_transpose1d(x, turned, stride=2, output_padding=1)
        given = nc.Gradients(dx, dw, None)
        return (
            y,
            nc.conv1d_backward(x, w, y, padding=(2, 0)),
            nc.conv1d(x, w, padding="same"),
            z,
            nc.conv_transpose1d_backward(x, turned, z, stride=2, output_padding=1, out=given),
        )

    for x_ in (x[0], x[0, 0]):
        sequences = x_, np.ascontiguousarray(w[:, 1]), np.ascontiguousarray(turned[:, 1]), b
        got, expected = (in_one_dimension, in_one_dimension.py_func)
        into = [(np.ones_like(x_), np.ones_like(sequences[2])) for _ in range(2)]
        assert_same(got(*sequences, *into[0]), expected(*sequences, *into[1]))
    one = x[0, 0, :, 0].copy(), w[0, 0, :, 0].copy()
    sequences = *one, one[1], 0.5
    into = [(np.ones_like(one[0]), np.ones_like(one[1])) for _ in range(2)]
    assert_same(in_one_dimension(*sequences, *into[0]), in_one_dimension.py_func(*sequences, *into[1]))


def test_axes_in_other_orders() -> None:
    x, w, _, dy = data_of(SMALL, np.float32)
    hwio = np.ascontiguousarray(w.transpose(1, 2, 3, 0))
    nchw = [np.ascontiguousarray(a.transpose(0, 3, 1, 2)) for a in (x, w, dy)]

    @numba.njit
    def with_weights(x, w, dy):
        return (
            nc.conv2d(x, w, padding=1, w_layout="HWIO"),
            nc.conv2d_backward(x, w, dy, padding=1, w_layout="HWIO"),
            nc.conv2d_input_grad(dy, w, padding=1, w_layout="HWIO"),
        )

    @numba.njit
    def with_images(x, w, dy):
        return (
            nc.conv2d(x, w, padding=1, layout="NCHW"),
            nc.conv2d_backward(x, w, dy, padding=1, layout="NCHW"),
            nc.conv2d_weight_grad(x, dy, 3, padding=1, layout="NCHW", w_layout=None),
            nc.conv2d_bias_grad(dy, layout="NCHW"),
            nc.conv1d(x[:, :, 0], w[:, :, 0], layout="NCHW"),
        )

    assert_same(with_weights(x, hwio, dy), with_weights.py_func(x, hwio, dy))
    assert_same(with_images(*nchw), with_images.py_func(*nchw))


# ------------------------------------------------------------------------------------------------- plans


def _plans(dtype: Any = np.float32) -> dict[str, Any]:
    return {pass_: nc.plan(pass_, _X.shape, _W.shape, padding=1, dtype=dtype) for pass_ in PASSES}


@numba.njit
def _called(plan, first, second):
    return plan(first, second)


def test_plans_are_called() -> None:
    for dtype in DTYPES:
        plans, data = _plans(dtype), data_of(SMALL, dtype)
        operands = {"forward": (data.x, data.w), "weight_grad": (data.x, data.dy), "input_grad": (data.dy, data.w)}
        for pass_, plan in plans.items():
            assert_same(_called(plan, *operands[pass_]), plan(*operands[pass_]))
            backwards = operands[pass_][0][:, ::-1]
            assert_same(_called(plan, backwards, operands[pass_][1]), plan(backwards, operands[pass_][1]))
    assert len(_called.signatures) == 4 * len(DTYPES) * len(PASSES) // 2


def test_plans_write_where_they_are_told_and_add_there() -> None:
    x, w, b, dy = data_of(SMALL, np.float32)
    plans = _plans()

    @numba.njit
    def into(forward, weight_grad, x, w, b, dy, y, dw, add):
        return forward(x, w, b, out=y), weight_grad(x, second=dy, out=dw, accumulate=add)

    got, expected = ([np.ones_like(dy), np.ones_like(w)] for _ in range(2))
    for add in (False, True):
        returned = into(plans["forward"], plans["weight_grad"], x, w, b, dy, *got, add)
        into.py_func(plans["forward"], plans["weight_grad"], x, w, b, dy, *expected, add)
        assert_same(returned, tuple(expected))
        assert_same(tuple(got), tuple(expected))


_PLAN = _plans()["forward"]


def test_plans_are_globals_and_come_back() -> None:
    within = _plans()["weight_grad"]

    @numba.njit
    def call(x, w):
        y = _PLAN(x, w)
        return y, within(x, y)

    for _ in range(2):
        assert_same(call(_X, _W), call.py_func(_X, _W))

    @numba.njit
    def back(plan):
        return plan

    assert back(_PLAN) == _PLAN


def test_plans_refuse_in_their_own_words() -> None:
    good = _called(_PLAN, _X, _W)
    for arguments in ((_X[:, 1:], _W), (_X.astype(float), _W), (_W, _X)):
        with pytest.raises((ValueError, TypeError)) as expected:
            _PLAN(*arguments)
        with pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"):
            _called(_PLAN, *arguments)
    with pytest.raises(numba.TypingError, match="the plan is for float16, expected float32 or float64"):
        _called(_plans(np.float16)["forward"], _X, _W)
    with pytest.raises(numba.TypingError, match="plan: missing a required argument: 'second'"):
        numba.njit(lambda plan, x: plan(x))(_PLAN, _X)
    y, square = np.ones_like(good), nc.plan("forward", good.shape, (8, 1, 1, 8))
    with pytest.raises(ValueError, match="plan: out shares memory with x"):
        numba.njit(lambda plan, x, w: plan(x, w, out=x))(square, y, np.ones((8, 1, 1, 8), np.float32))
    assert (y == 1).all()


def test_plans_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _called(_PLAN, _X, _W)
    monkeypatch.setattr(answers, "serve", None)
    _called(_PLAN, _X, _W)
    _called(_plans()["forward"], _X, _W)  # an equal one
    with pytest.raises(TypeError, match="not callable"):
        _called(nc.plan("forward", _X.shape, _W.shape, padding=1, strategy="loop"), _X, _W)


# ------------------------------------------------------------------------------------------------ errors

_REFUSED: dict[str, tuple[Any, ...]] = {
    "stride": (_X, _W, None, (0, 1), ((1, 1), (1, 1)), (1, 1), 1, "auto"),
    "padding": (_X, _W, None, (1, 1), ((1, -1), (1, 1)), (1, 1), 1, "auto"),
    "text": (_X, _W, None, (1, 1), "smae", (1, 1), 1, "auto"),
    "groups": (_X, _W, None, (1, 1), ((1, 1), (1, 1)), (1, 1), 3, "auto"),
    "strategy": (_X, _W, None, (1, 1), ((1, 1), (1, 1)), (1, 1), 1, "lööp"),
    "wide text": (_X, _W, None, (1, 1), ((1, 1), (1, 1)), (1, 1), 1, "l\u20acop"),
    "channels": (_X, _W[..., :3], None, (1, 1), ((1, 1), (1, 1)), (1, 1), 1, "auto"),
    "bias": (_X, _W, _B[:3], (1, 1), ((1, 1), (1, 1)), (1, 1), 1, "auto"),
    "ranks": (_X, _W[0], None, (1, 1), ((1, 1), (1, 1)), (1, 1), 1, "auto"),
    "kernel": (_X[:, :1], _W, None, (1, 1), ((0, 0), (0, 0)), (1, 1), 1, "auto"),
}


@pytest.mark.parametrize("what", _REFUSED)
def test_errors_are_those_of_the_public_functions(what: str) -> None:
    arguments = _REFUSED[what]
    with pytest.raises((ValueError, TypeError)) as expected:
        compiled.forward.py_func(*arguments)
    for _ in range(2):
        with pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"):
            compiled.forward(*arguments)


@numba.njit
def _into(x, w, y):
    return nc.conv2d(x, w, padding=1, out=y)


@numba.njit
def _gradients_into(x, w, dy, dx, dw, db):
    return nc.conv2d_backward(x, w, dy, padding=1, out=nc.Gradients(dx, dw, db))


def _read_only(a: np.ndarray) -> np.ndarray:
    a.flags.writeable = False
    return a


@pytest.mark.parametrize("known", [False, True])
def test_nothing_is_written_where_a_result_cannot_go(known: bool) -> None:
    """Also where the same shapes went well before."""
    memory = np.zeros(2 * _DY.size + _X.size, np.float32)
    x = memory[_DY.size : _DY.size + _X.size].reshape(_X.shape)
    x[...] = _X
    if known:
        _into(x, _W, np.zeros_like(_DY))
        _gradients_into(_X, _W, _DY, *(np.zeros_like(a) for a in (_X, _W, _B)))
    before = memory.tobytes()
    outs = [
        memory[: _DY.size + 1][1:].reshape(_DY.shape),  # overlaps x
        np.zeros((1, 8, 8, 16), np.float32)[..., ::2],
        np.zeros(_DY.shape),
        np.zeros((1, 8, 8, 9), np.float32),
        _read_only(np.zeros_like(_DY)),
    ]
    for out in outs:
        with pytest.raises((ValueError, TypeError)) as expected:
            nc.conv2d(x, _W, padding=1, out=out)
        with pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"):
            _into(x, _W, out)
        assert not out[out != memory[0]].any() or out is outs[0]
    assert memory.tobytes() == before
    both = np.zeros(_W.size, np.float32)
    gradients = np.zeros_like(_X), both.reshape(_W.shape), both[-8:]
    with pytest.raises(ValueError, match=r"^conv2d_backward: out\.db shares memory with out\.dw$"):
        _gradients_into(_X, _W, _DY, *gradients)
    assert not both.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_X.astype(np.float16), _W, 1, "auto"), "x has dtype float16, expected float32 or float64"),
        ((_X.astype(np.int32), _W, 1, "auto"), "x has dtype int32, expected float32 or float64"),
        ((1.5, _W, 1, "auto"), "x is float64, expected an array"),
        ((_X[None], _W, 1, "auto"), "x has 5 axes, expected at most 4"),
        ((_X, _W, 1.0, "auto"), "stride is float64, expected an integer"),
        ((_X, _W, True, "auto"), "stride is bool, expected an integer"),
        ((_X, _W, (1, 2, 3), "auto"), "stride has 3 values, expected an int or a pair"),
        ((_X, _W, 1, 7), "strategy is int64, expected a name"),
    ],
)
def test_what_types_alone_tell_is_refused_as_code_is_compiled(arguments: Any, message: str) -> None:
    @numba.njit
    def call(x, w, stride, strategy):
        return nc.conv2d(x, w, stride=stride, strategy=strategy)

    with pytest.raises(numba.TypingError, match=f"conv2d: {re.escape(message)}"):
        call(*arguments)


def test_layouts_are_written_out() -> None:
    @numba.njit
    def call(x, w, layout):
        return nc.conv2d(x, w, layout=layout)

    with pytest.raises(numba.TypingError, match="layout is unicode_type, expected a name that is written out"):
        call(_X, _W, "NCHW")
    with pytest.raises(numba.TypingError, match="w_layout is 'OWHI', expected 'OHWI' or 'HWIO'"):
        numba.njit(lambda x, w: nc.conv2d(x, w, w_layout="OWHI"))(_X, _W)


def test_calls_that_python_would_refuse() -> None:
    with pytest.raises(numba.TypingError, match="conv2d: too many positional arguments"):
        numba.njit(lambda x, w: nc.conv2d(x, w, None, 1))(_X, _W)
    with pytest.raises(numba.TypingError, match="conv2d: got an unexpected keyword argument 'input_size'"):
        numba.njit(lambda x, w: nc.conv2d(x, w, input_size=1))(_X, _W)
    with pytest.raises(numba.TypingError, match="conv1d: x has 4 axes, expected at most 3"):
        numba.njit(lambda x, w: nc.conv1d(x, w))(_X, _W)
    with pytest.raises(numba.TypingError, match="conv1d: stride has 2 values, expected an int"):
        numba.njit(lambda x, w: nc.conv1d(x, w, stride=(1, 1)))(_X[0], _W[0])


def test_needs_are_written_out() -> None:
    @numba.njit
    def unknown(x, w, dy):
        return nc.conv2d_backward(x, w, dy, needs=("dw", "dv"))

    @numba.njit
    def value(x, w, dy, needs):
        return nc.conv2d_backward(x, w, dy, needs=needs)

    with pytest.raises(numba.TypingError, match="needs has 'dv', expected any of"):
        unknown(_X, _W, _DY)
    with pytest.raises(numba.TypingError, match="expected names that are written out"):
        value(_X, _W, _DY, "dw")


# ----------------------------------------------------------------------------------------------- lookups


def test_python_is_asked_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = np.ones((1, 6, 11, 2), np.float32), np.ones((3, 3, 3, 2), np.float32)
    compiled.padded(x, w)
    monkeypatch.setattr(answers, "serve", None)
    compiled.padded(x, w)
    with pytest.raises(TypeError, match="not callable"):
        compiled.padded(x[:, :5], w)


def test_many_shapes_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the first tables hold."""
    x, w = np.arange(200, dtype=np.float32).reshape(1, 2, 100, 1), np.ones((1, 2, 2, 1), np.float32)
    sums = [float(compiled.padded(x[:, :, :width], w).sum()) for width in range(1, 101)]
    with monkeypatch.context() as patch:
        patch.setattr(answers, "serve", None)
        assert [float(compiled.padded(x[:, :, :width], w).sum()) for width in range(1, 101)] == sums
    table.clear()  # as after tuning
    assert [float(compiled.padded(x[:, :, :width], w).sum()) for width in range(1, 101)] == sums


def test_plans_that_are_forgotten_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.padded(_X, _W)
    nc.ops.forget_plans()
    monkeypatch.setattr(answers, "serve", None)
    with pytest.raises(TypeError, match="not callable"):
        compiled.padded(_X, _W)


def test_a_program_is_made_for_as_many_threads_as_there_are() -> None:
    data = data_of(LARGE, np.float32)
    expected = nc.conv2d(data.x, data.w, padding=1)
    threads = numba.get_num_threads()
    compiled.padded(data.x, data.w)
    entries = len(table._table.entries)
    numba.set_num_threads(1)
    try:
        assert_same(compiled.padded(data.x, data.w), expected)
    finally:
        numba.set_num_threads(threads)
    assert len(table._table.entries) - entries == (threads > 1)


# -------------------------------------------------------------------------------------- kinds of callers


def test_callers_with_other_settings_of_numba() -> None:
    @numba.njit(fastmath=True, error_model="python", boundscheck=True)
    def fast(x, w):
        return nc.conv2d(x, w, padding=1)

    @numba.njit(parallel=True)
    def parallel(x, w):
        y = nc.conv2d(x, w, padding=1)
        return y + 1

    @numba.njit
    def within_objmode(x, w):
        with numba.objmode(y="float32[:, :, :, ::1]"):
            y = compiled.padded(x, w)
        return y  # noqa: RET504 - objmode assigns it

    expected = nc.conv2d(_X, _W, padding=1)
    assert_same(fast(_X, _W), expected)
    assert_same(parallel(_X, _W), expected + 1)
    assert_same(within_objmode(_X, _W), expected)


def test_a_c_function() -> None:
    @numba.cfunc("void(CPointer(float32), CPointer(float32), CPointer(float32), intp)")
    def call(x, w, y, n):
        nc.conv2d(carray(x, (n, 8, 8, 4)), carray(w, (8, 3, 3, 4)), padding=1, out=carray(y, (n, 8, 8, 8)))

    y = np.zeros_like(_DY)
    pointer = ctypes.POINTER(ctypes.c_float)
    call.ctypes(*(a.ctypes.data_as(pointer) for a in (_X, _W, y)), 1)
    assert_same(y, nc.conv2d(_X, _W, padding=1))


def test_a_loop_descends() -> None:
    """What all of this is for."""

    @numba.njit
    def descend(x, target, w, rate, steps):
        for _ in range(steps):
            dy = nc.conv2d(x, w, padding=1) - target
            _, dw, _ = nc.conv2d_backward(x, w, dy, padding=1, needs=("dw",))
            w -= rate * dw
        return w

    rng = np.random.default_rng(0)
    x, wanted = rng.standard_normal((4, 12, 12, 2)), rng.standard_normal((3, 3, 3, 2))
    w = descend(x, nc.conv2d(x, wanted, padding=1), np.zeros_like(wanted), 1e-3, 200)
    np.testing.assert_allclose(w, wanted, atol=1e-3)


# ----------------------------------------------------------------------------------------------- children

LAYERS = ("workqueue", "omp", "tbb")


@pytest.mark.parametrize("layer", LAYERS)
def test_threads_and_forks(layer: str) -> None:
    if layer == "tbb" and threaded.find_tbb() is None:
        pytest.skip("tbb is not installed")
    code = "import compiled; compiled.print_children(); compiled.print_workers()"
    assert child.run(code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=4).split() == [layer] * 2


def test_known_shapes_do_not_wait_for_the_gil() -> None:
    assert child.run("import compiled; compiled.print_behind_the_gil()").split() == ["True"]


def test_no_memory_is_lost() -> None:
    out = child.run("import compiled; compiled.print_leaks('100000')", NUMBA_NRT_STATS=1)
    assert out.split() == ["0", "True"]


def _kept(folder: Path, path: Path, store: Path, what: str = "kept") -> list[str]:
    """Call what Numba keeps in a process of its own, with a package from a path, and a store of its own."""
    code = f"import sys; sys.path.insert(0, sys.argv[2]); import compiled; compiled.print_{what}(sys.argv[1])"
    environment = {"NUMBA_CACHE_DIR": folder / "cache", "NHWCONV_CACHE_DIR": store}
    return child.run(code, folder, path, **environment).split()


def test_what_numba_keeps_works_later_elsewhere_and_with_another_version(tmp_path: Path) -> None:
    (tmp_path / "kept.py").write_text(compiled.MODULE)
    store, source = tmp_path / "store", PACKAGE.parent
    assert _kept(tmp_path, source, store)[0] == "0"
    assert _kept(tmp_path, source, store)[0] == "1"
    other = tmp_path / "other"  # which finds no kernels of its version, as where the store was emptied
    shutil.copytree(PACKAGE, other / "nhwconv", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "nhwconv" / "_version.py").write_text('__version__ = "99.0"\n')
    assert _kept(tmp_path, other, store) == ["1", "99.0", str(other)]
    # A version whose words have other meanings says so, and computes nothing.
    words = other / "nhwconv" / "njit" / "layout.py"
    words.write_text(words.read_text().replace(f"VERSION = {layout.VERSION}", f"VERSION = {layout.VERSION + 1}"))
    assert "compiled with another version of nhwconv" in " ".join(_kept(tmp_path, other, store, "other_layout"))


def test_numba_finds_the_functions_by_itself() -> None:
    """By the entry point: nothing has imported the overloads before."""
    code = "import sys, compiled; from nhwconv.njit import *; print('nhwconv.njit.overloads' in sys.modules); "
    code += "from cases import data_of; d = data_of(compiled.SMALL, 'f4'); print(compiled.padded(d.x, d.w).shape)"
    assert child.run(code).split("\n")[:2] == ["False", "(1, 8, 8, 8)"]


def test_the_layout_says_how_large_it_is() -> None:
    """No two things share a word."""
    sizes = {
        layout.FUNCTION: 1, layout.FLAGS: 1, layout.STRIDE: 2, layout.PADDING: 4, layout.PADDING_TEXT: 1,
        layout.DILATION: 2, layout.GROUPS: 1, layout.SIZED: 1, layout.SIZE: 2, layout.STRATEGY: 1,
        layout.TEXT_OF_PADDING: 3, layout.TEXT_OF_STRATEGY: 3, layout.OPERANDS: len(layout.ARRAYS), layout.SCRATCH: 1,
        layout.ANSWER: 1, layout.HASH: 1, layout.BLOCKS: len(layout.ARRAYS) * layout.BLOCK,
    }  # fmt: skip
    taken = [first + i for first, size in sizes.items() for i in range(size)]
    assert taken == list(range(layout.QUESTION))
    assert layout.KEY == layout.STRATEGY + 1
