"""The public functions, as Numba's types have them: each asks, makes its results, and runs.

What types alone can tell is refused as code is compiled; everything else, as it runs, by the public functions' checks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba.core import errors, types
from numba.extending import overload

from .. import ops
from .calls import consult, items_of, result, run
from .layout import BACKWARD, BIAS_GRAD, DB, DW, DX, FORWARD, INPUT_GRAD, OUT, WEIGHT_GRAD

__all__: list[str] = []

_Gradients = ops.Gradients
_BITS = {"dx": DX, "dw": DW, "db": DB}


# -------------------------------------------------------------------------------------------- arguments


def _refuse(function: str, message: str) -> None:
    raise errors.TypingError(f"{function}: {message}")


def _default(kind: Any) -> Any:
    """Return the value of an argument that is not given, otherwise what is no argument's."""
    return kind if not isinstance(kind, types.Type) else kind.value if isinstance(kind, types.Omitted) else ...


def _none(kind: Any) -> bool:
    return isinstance(kind, types.NoneType) or _default(kind) is None


def _check_array(function: str, name: str, kind: Any) -> None:
    if not isinstance(kind, types.Array):
        _refuse(function, f"{name} is {kind}, expected an array of float32 or float64")
    if kind.dtype not in (types.float32, types.float64):
        _refuse(
            function,
            f"{name} has dtype {kind.dtype}, expected float32 or float64; half types are computed outside compiled "
            "functions only, where Numba has arrays of them",
        )
    if kind.ndim > 4:
        _refuse(function, f"{name} has {kind.ndim} axes, expected at most 4")


def _check_int(function: str, name: str, kind: Any) -> None:
    if not isinstance(kind, types.Integer) and _default(kind) is ...:
        _refuse(function, f"{name} is {kind}, expected an integer")


def _check_pair(function: str, name: str, kind: Any) -> None:
    items = items_of(kind)
    if items is None:
        _check_int(function, name, kind)
        return
    if len(items) != 2:
        _refuse(function, f"{name} has {len(items)} values, expected an int or a pair")
    for item in items:
        _check_int(function, name, item)


def _check_padding(function: str, kind: Any) -> None:
    if isinstance(kind, (types.UnicodeType, types.StringLiteral)):
        return
    pairs = [items_of(item) for item in items_of(kind) or ()]
    if not any(pair is not None for pair in pairs):
        _check_pair(function, "padding", kind)
        return
    if len(pairs) != 2 or not all(pair is not None and len(pair) == 2 for pair in pairs):
        _refuse(function, f"padding is {kind}, expected ((top, bottom), (left, right))")
    for item in items_of(kind) or ():
        _check_pair(function, "padding", item)


def _check_strategy(function: str, kind: Any) -> None:
    names = items_of(kind) or (kind,)
    known = _default(kind) is not ... or all(isinstance(name, types.StringLiteral) for name in names)
    if not known and not isinstance(kind, types.UnicodeType):
        _refuse(function, f"strategy is {kind}, expected a name or a tuple of names, which are written out")


class _Options(NamedTuple):
    """The types of the options."""

    stride: Any
    padding: Any
    dilation: Any
    groups: Any
    strategy: Any

    def check(self, function: str) -> None:
        """Refuse what is no option."""
        _check_pair(function, "stride", self.stride)
        _check_padding(function, self.padding)
        _check_pair(function, "dilation", self.dilation)
        _check_int(function, "groups", self.groups)
        _check_strategy(function, self.strategy)


def _check_accumulate(function: str, kind: Any) -> None:
    if not isinstance(kind, types.Boolean) and _default(kind) is ...:
        _refuse(function, f"accumulate is {kind}, expected True or False")


def _common(*kinds: Any) -> Any:
    """Return the type in which arrays meet."""
    dtypes = {kind.dtype for kind in kinds if isinstance(kind, types.Array)}
    return types.float64 if types.float64 in dtypes else types.float32


def _like(dtype: Any) -> Any:
    """Return what stands for a type in compiled code."""
    return np.dtype(str(dtype))


# --------------------------------------------------------------------------------------------- operands


def _ready(a, dtype):
    """Return an array as programs take it; None is None."""


@overload(_ready)
def _ready_overload(a, dtype):
    if _none(a):
        return lambda a, dtype: None
    if isinstance(a, types.Array) and a.dtype == dtype.dtype and (a.layout == "C" or not a.ndim) and a.aligned:
        return lambda a, dtype: a
    if isinstance(a, types.Array) and a.ndim:

        def copied(a, dtype):
            copy = np.empty(a.shape, dtype)
            copy[...] = a
            return copy

        return copied

    def converted(a, dtype):
        copy = np.empty(1, dtype)
        copy[0] = a[()]
        return copy

    return converted


def _bias(b, w):
    """Return a bias as an array; a number takes w's dtype, as it does outside."""


@overload(_bias)
def _bias_overload(b, w):
    if not isinstance(b, (types.Float, types.Integer)):
        return lambda b, w: b

    def boxed(b, w):
        array = np.empty(1, w.dtype)
        array[0] = b
        return array

    return boxed


def _target(q, index, axes, like, out):
    """Return where a result goes: what the caller gave, or a new array."""


@overload(_target, prefer_literal=True)
def _target_overload(q, index, axes, like, out):
    if _none(out):
        return lambda q, index, axes, like, out: result(q, index, axes, like)
    return lambda q, index, axes, like, out: out


def _out_flag(kind: Any) -> int:
    return 0 if _none(kind) else OUT


# --------------------------------------------------------------------------------------------- functions

# A rank that no form has is refused as code runs, in the words of the public functions.
_RANK_OF_Y = {(4, 4): 4, (3, 4): 3, (3, 3): 2, (2, 2): 2}
_RANK_OF_DW = {(4, 4): 4, (3, 3): 4, (3, 2): 3, (2, 2): 2}
_RANK_OF_DX = {(4, 4): 4, (3, 4): 3, (2, 3): 3, (2, 2): 2}


@overload(ops.conv2d, prefer_literal=True)
def _conv2d(
    x,
    w,
    b=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    strategy="auto",
    out=None,
):
    for name, kind in (("x", x), ("w", w)):
        _check_array("conv2d", name, kind)
    if not _none(b) and not isinstance(b, (types.Float, types.Integer)):
        _check_array("conv2d", "b", b)
    if not _none(out):
        _check_array("conv2d", "out", out)
    _Options(stride, padding, dilation, groups, strategy).check("conv2d")
    like, rank, flags = _like(_common(x, w, b)), _RANK_OF_Y.get((x.ndim, w.ndim), 4), _out_flag(out)

    def conv2d(x, w, b=None, stride=1, padding=0, dilation=1, groups=1, strategy="auto", out=None):
        q = consult(FORWARD, flags, False, stride, padding, dilation, groups, None, strategy,
                    x, w, b, out, None, None, None, None)  # fmt: skip
        y = _target(q, 0, rank, like, out)
        run(q, _ready(x, like), _ready(w, like), _ready(_bias(b, w), like), y, None, None, None, None)
        return y

    return conv2d


@overload(ops.conv2d_weight_grad, prefer_literal=True)
def _conv2d_weight_grad(
    x,
    dy,
    kernel_size=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    strategy="auto",
    out=None,
    accumulate=False,
):
    for name, kind in (("x", x), ("dy", dy)):
        _check_array("conv2d_weight_grad", name, kind)
    if not _none(out):
        _check_array("conv2d_weight_grad", "out", out)
    if not _none(kernel_size):
        _check_pair("conv2d_weight_grad", "kernel_size", kernel_size)
    _Options(stride, padding, dilation, groups, strategy).check("conv2d_weight_grad")
    _check_accumulate("conv2d_weight_grad", accumulate)
    like, rank, flags = _like(_common(x, dy)), _RANK_OF_DW.get((x.ndim, dy.ndim), 4), _out_flag(out)

    def conv2d_weight_grad(
        x, dy, kernel_size=None, stride=1, padding=0, dilation=1, groups=1, strategy="auto", out=None, accumulate=False
    ):
        q = consult(WEIGHT_GRAD, flags, accumulate, stride, padding, dilation, groups, kernel_size, strategy,
                    x, None, None, None, dy, None, out, None)  # fmt: skip
        dw = _target(q, 0, rank, like, out)
        run(q, _ready(x, like), None, None, None, _ready(dy, like), None, dw, None)
        return dw

    return conv2d_weight_grad


@overload(ops.conv2d_bias_grad, prefer_literal=True)
def _conv2d_bias_grad(dy, out=None, accumulate=False):
    _check_array("conv2d_bias_grad", "dy", dy)
    if not _none(out):
        _check_array("conv2d_bias_grad", "out", out)
    _check_accumulate("conv2d_bias_grad", accumulate)
    like, rank, flags = _like(dy.dtype), int(dy.ndim > 2), _out_flag(out)

    def conv2d_bias_grad(dy, out=None, accumulate=False):
        q = consult(BIAS_GRAD, flags, accumulate, 1, 0, 1, 1, None, "auto",
                    None, None, None, None, dy, None, None, out)  # fmt: skip
        db = _target(q, 0, rank, like, out)
        run(q, None, None, None, None, _ready(dy, like), None, None, db)
        return db

    return conv2d_bias_grad


@overload(ops.conv2d_input_grad, prefer_literal=True)
def _conv2d_input_grad(
    dy,
    w,
    input_size=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    strategy="auto",
    out=None,
):
    for name, kind in (("dy", dy), ("w", w)):
        _check_array("conv2d_input_grad", name, kind)
    if not _none(out):
        _check_array("conv2d_input_grad", "out", out)
    if not _none(input_size):
        _check_pair("conv2d_input_grad", "input_size", input_size)
    _Options(stride, padding, dilation, groups, strategy).check("conv2d_input_grad")
    like, rank, flags = _like(_common(dy, w)), _RANK_OF_DX.get((dy.ndim, w.ndim), 4), _out_flag(out)

    def conv2d_input_grad(dy, w, input_size=None, stride=1, padding=0, dilation=1, groups=1, strategy="auto", out=None):
        q = consult(INPUT_GRAD, flags, False, stride, padding, dilation, groups, input_size, strategy,
                    None, w, None, None, dy, out, None, None)  # fmt: skip
        dx = _target(q, 0, rank, like, out)
        run(q, None, _ready(w, like), None, None, _ready(dy, like), dx, None, None)
        return dx

    return conv2d_input_grad


# --------------------------------------------------------------------------------------------- backward


def _needed(kind: Any) -> tuple[str, ...]:
    """Return what is needed, which is written out."""
    function = "conv2d_backward"
    value = getattr(kind, "literal_value", None) if _default(kind) is ... else _default(kind)
    items = items_of(kind)
    if items is not None:
        value = tuple(getattr(k, "literal_value", None) for k in items)
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        _refuse(function, f"needs is {kind}, expected names that are written out")
        return ()
    for name in names:
        if name not in _BITS:
            _refuse(function, f'needs has {name!r}, expected any of "dx", "dw", "db"')
    return names


def _gradient(q, bit, index, axes, like, out):
    """Return where a gradient goes; None where it is not needed."""


@overload(_gradient, prefer_literal=True)
def _gradient_overload(q, bit, index, axes, like, out):
    if not bit.literal_value:
        return lambda q, bit, index, axes, like, out: None
    return lambda q, bit, index, axes, like, out: _target(q, index, axes, like, out)


def _pick(out, index):
    """Return one of three results that the caller gives, or None."""


@overload(_pick, prefer_literal=True)
def _pick_overload(out, index):
    if _none(out):
        return lambda out, index: None
    i = index.literal_value
    return lambda out, index: out[i]


@overload(ops.conv2d_backward, prefer_literal=True)
def _conv2d_backward(
    x,
    w,
    dy,
    needs=("dx", "dw", "db"),
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    strategy="auto",
    out=None,
    accumulate=False,
):
    for name, kind in (("x", x), ("w", w), ("dy", dy)):
        _check_array("conv2d_backward", name, kind)
    if not _none(out):
        items = items_of(out) or ()
        if len(items) != 3:
            _refuse("conv2d_backward", f"out is of type {out}, expected Gradients(dx, dw, db)")
        for name, kind in zip(_Gradients._fields, items, strict=True):
            if not _none(kind):
                _check_array("conv2d_backward", f"out.{name}", kind)
    _Options(stride, padding, dilation, groups, strategy).check("conv2d_backward")
    _check_accumulate("conv2d_backward", accumulate)
    names = _needed(needs)
    like, dx_rank, dw_rank, db_rank = _like(_common(x, w, dy)), x.ndim, w.ndim, int(w.ndim == 4)
    dx_bit, dw_bit, db_bit = (bit if name in names else 0 for name, bit in _BITS.items())
    flags = dx_bit | dw_bit | db_bit | _out_flag(out)

    def conv2d_backward(
        x, w, dy, needs=("dx", "dw", "db"), stride=1, padding=0, dilation=1, groups=1, strategy="auto", out=None,
        accumulate=False,
    ):  # fmt: skip
        out_dx, out_dw, out_db = _pick(out, 0), _pick(out, 1), _pick(out, 2)
        q = consult(BACKWARD, flags, accumulate, stride, padding, dilation, groups, None, strategy,
                    x, w, None, None, dy, out_dx, out_dw, out_db)  # fmt: skip
        dx = _gradient(q, dx_bit, 0, dx_rank, like, out_dx)
        dw = _gradient(q, dw_bit, 1, dw_rank, like, out_dw)
        db = _gradient(q, db_bit, 2, db_rank, like, out_db)
        run(q, _ready(x, like), _ready(w, like), None, None, _ready(dy, like), dx, dw, db)
        return _Gradients(dx, dw, db)

    return conv2d_backward
