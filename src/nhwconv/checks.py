"""Arguments and arrays become a `ConvProblem` here, or one of the package's error messages.

Everything is checked before any work is done, and nothing is written to before everything is checked.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .problem import ConvProblem, Padding, same_padding

__all__ = [
    "as_bias",
    "as_dtype",
    "as_input",
    "as_out",
    "as_shape",
    "check_bias",
    "check_dy",
    "common_dtype",
    "fail",
    "geometry",
    "input_grad_problem",
    "integer",
    "kernel_sizes",
    "no_samples",
    "output_shape",
    "pair",
    "prepare",
    "problem_for",
    "stand_in",
    "weight_grad_problem",
]

Array = npt.NDArray[Any]

#: Sizes and offsets are kept below this, so that no product of two overflows 64 bits.
LARGEST = 2**31 - 1
LARGEST_ARRAY = 2**48


def fail(function: str, message: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error` in the one form that every message of the package has: ``function: message``."""
    raise error(f"{function}: {message}")


# ---------------------------------------------------------------------------------------------- arrays


_DTYPES = "float32, float64, float16 or bfloat16"


#: Those that need no second look; bfloat16 and other byte orders are known by their name.
_NATIVE = frozenset(map(np.dtype, ("float16", "float32", "float64")))


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype in _NATIVE or dtype.name in ("float16", "float32", "float64", "bfloat16")


def as_dtype(function: str, value: Any) -> np.dtype[Any]:
    """Return a dtype that nhwconv computes with, in native byte order."""
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        fail(function, f"dtype is {value!r}, expected {_DTYPES}", TypeError)
    if not _is_float(dtype):
        fail(function, f"dtype is {dtype}, expected {_DTYPES}", TypeError)
    return dtype.newbyteorder("=")


def as_input(function: str, name: str, value: Any) -> Array:
    """Return `value` as an array of a floating dtype that nhwconv computes with; no copy is made."""
    if type(value) is np.ndarray and value.dtype in _NATIVE:
        return value
    if isinstance(value, np.ma.MaskedArray):
        fail(
            function,
            f"{name} is a masked array, whose mask would be lost; pass {name}.filled(value) or {name}.data",
            TypeError,
        )
    try:
        array = np.asarray(value)
    except ValueError as error:  # a ragged list
        fail(function, f"{name} is not an array: {error}")
    if not _is_float(array.dtype):
        fail(
            function,
            f"{name} has dtype {array.dtype}, expected {_DTYPES}; "
            f"cast it first, for example np.asarray({name}, np.float32)",
            TypeError,
        )
    return array


def common_dtype(function: str, **inputs: Array) -> np.dtype[Any]:
    """Return the dtype in which these arrays meet, as NumPy promotes; always in native byte order."""
    dtypes = {array.dtype for array in inputs.values()}
    if len(dtypes) == 1 and dtypes <= _NATIVE:
        return dtypes.pop()
    try:
        return np.result_type(*inputs.values()).newbyteorder("=")
    except np.exceptions.DTypePromotionError:
        each = ", ".join(f"{name} has {array.dtype}" for name, array in inputs.items())
        fail(function, f"NumPy has no common dtype for these ({each}); cast them to float32", TypeError)


def prepare(array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return `array` as kernels take it: `dtype`, `shape`, C-contiguous, aligned; copied only if it must be."""
    if array.dtype != dtype or not (array.flags.c_contiguous and array.flags.aligned):
        array = np.require(array, dtype, ["C", "A"])
    if not array.flags.writeable:
        array = _without_read_only_flag(array)
    return array if array.shape == shape else array.reshape(shape)


class _Exposed:
    """The memory of an array through the array interface, without its read-only flag."""

    def __init__(self, array: Array) -> None:
        self.owner = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def _without_read_only_flag(array: Array) -> Array:
    # Numba compiles a second kernel for read-only arrays. No kernel writes to its inputs, so one will do.
    # (A dtype outside NumPy loses its name in the interface, hence the view.)
    return np.asarray(_Exposed(array)).view(array.dtype) if array.size else array.copy()


def as_out(
    function: str, name: str, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: dict[str, Array]
) -> Array:
    """Check an `out` argument: shape, dtype, writable, C-contiguous, and apart from every input."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        fail(function, f"{name} is {_a(type(out).__name__)}, expected a numpy.ndarray", TypeError)
    if out.shape != shape:
        fail(function, f"{name} has shape {out.shape}, expected {shape}")
    if out.dtype != dtype:
        fail(function, f"{name} has dtype {out.dtype}, expected {dtype}", TypeError)
    if not out.flags.writeable:
        fail(function, f"{name} is read-only")
    if not out.flags.c_contiguous or not out.flags.aligned:
        fail(function, f"{name} must be C-contiguous and aligned")
    for other, array in inputs.items():
        if np.may_share_memory(out, array) and _overlap(out, array):
            fail(function, f"{name} shares memory with {other}")
    return out.view(np.ndarray)


def _overlap(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(a, b, max_work=1000)  # type: ignore[arg-type]  # NumPy's stub is too narrow
    except np.exceptions.TooHardError:
        return True


def _a(noun: str) -> str:
    return f"{'an' if noun[:1] in 'aeiouAEIOU' else 'a'} {noun}"


# An empty batch is checked like any other. So a call on stand-ins, which hold no data, raises every error before there
# is any, and tells shapes and dtypes of results: for arrays that a framework has yet to compute.


def no_samples(array: Any) -> Array:
    """Return an empty batch of what `array`, of any framework, holds batches of."""
    return np.empty((0, *array.shape[1:]), array.dtype)


def stand_in(array: Any) -> Array:
    """Return zeros of the shape and dtype of an array of any framework, in the memory of one of them."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)


# ------------------------------------------------------------------------------------ integer arguments


def _shown(number: int) -> str:
    """Return a number for a message; Python refuses to print very long ones."""
    bits = number.bit_length()
    return str(number) if bits < 256 else f"an integer of {bits} bits"


def integer(function: str, name: str, value: Any, least: int) -> int:
    """Return an integer argument as an int; bools and floats are refused."""
    if isinstance(value, (bool, np.bool_)):
        fail(function, f"{name} is {value!r}, expected an integer", TypeError)
    try:
        number = operator.index(value)
    except TypeError:
        fail(function, f"{name} is {value!r}, expected an integer", TypeError)
    if number < least:
        fail(function, f"{name} is {_shown(number)}, expected at least {least}")
    if number > LARGEST:
        fail(function, f"{name} is {_shown(number)}, expected at most {LARGEST}")
    return number


def pair(function: str, name: str, value: Any, least: int) -> tuple[int, int]:
    """Return an int, or a pair of them for rows and columns, as a pair."""
    if isinstance(value, (tuple, list)) or (isinstance(value, np.ndarray) and value.ndim):
        if len(value) != 2:
            fail(function, f"{name} has {len(value)} values, expected an int or a pair")
        first, second = value
        return integer(function, name, first, least), integer(function, name, second, least)
    number = integer(function, name, value, least)
    return number, number


def _padding(function: str, value: Any) -> Padding | str:
    """Return ``((top, bottom), (left, right))``, or "same" for whoever knows the sizes."""
    if isinstance(value, str):
        if value == "same":
            return "same"
        if value == "valid":
            return (0, 0), (0, 0)
        fail(function, f'padding is {value!r}, expected "valid", "same", an int, a pair or a pair of pairs')
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (tuple, list)) and len(value) == 2 and any(isinstance(v, (tuple, list)) for v in value):
        if not all(isinstance(v, (tuple, list)) and len(v) == 2 for v in value):
            fail(function, f"padding is {value!r}, expected ((top, bottom), (left, right))")
        return pair(function, "padding", value[0], 0), pair(function, "padding", value[1], 0)
    rows, columns = pair(function, "padding", value, 0)
    return (rows, rows), (columns, columns)


class geometry:  # noqa: N801 - a plain record, used once a call
    """Stride, padding, dilation and groups, checked; `padding` may still be "same"."""

    __slots__ = ("dilation", "groups", "padding", "stride")

    def __init__(self, function: str, stride: Any, padding: Any, dilation: Any, groups: Any) -> None:
        self.stride = pair(function, "stride", stride, 1)
        self.dilation = pair(function, "dilation", dilation, 1)
        self.padding = _padding(function, padding)
        self.groups = integer(function, "groups", groups, 1)

    def pads(self, size: tuple[int, int], kernel: tuple[int, int]) -> Padding:
        """Return the padding in numbers for an input of this size."""
        if isinstance(self.padding, str):
            rows, columns = (same_padding(*v) for v in zip(size, kernel, self.stride, self.dilation, strict=True))
            return rows, columns
        return self.padding


# ------------------------------------------------------------------------------------------ the problem

Shape = tuple[int, ...]

_NO_CHANNELS = {
    "x": ". A batch without a channel axis, (N, H, W), is not a form: pass x[..., None]",
    "dy": ". A batch without a channel axis, (N, OH, OW), is not a form: pass dy[..., None]",
}


def _ranks(
    function: str, names: tuple[str, str], shapes: tuple[Shape, Shape], forms: dict[tuple[int, int], str]
) -> None:
    """Check that two arrays' ranks are one of the article's forms."""
    ranks = len(shapes[0]), len(shapes[1])
    if ranks in forms:
        return
    accepted = "; ".join(f"{names[0]} {form}" for form in forms.values())
    hint = ""
    if ranks[0] == 3 and ranks[1] in (2, 3):
        hint = _NO_CHANNELS[names[0]]
    given = f"{names[0]} of shape {shapes[0]} and {names[1]} of shape {shapes[1]}"
    fail(function, f"{given} do not go together; expected {accepted}{hint}")


_FORWARD_FORMS = {
    (4, 4): "(N, H, W, C) with w (D, KH, KW, C/groups)",
    (3, 4): "(H, W, C) with w (D, KH, KW, C/groups)",
    (3, 3): "(H, W, C) with w (KH, KW, C)",
    (2, 2): "(H, W) with w (KH, KW)",
}
_WEIGHT_GRAD_FORMS = {
    (4, 4): "(N, H, W, C) with dy (N, OH, OW, D)",
    (3, 3): "(H, W, C) with dy (OH, OW, D)",
    (3, 2): "(H, W, C) with dy (OH, OW)",
    (2, 2): "(H, W) with dy (OH, OW)",
}
_INPUT_GRAD_FORMS = {
    (4, 4): "(N, OH, OW, D) with w (D, KH, KW, C/groups)",
    (3, 4): "(OH, OW, D) with w (D, KH, KW, C/groups)",
    (2, 3): "(OH, OW) with w (KH, KW, C)",
    (2, 2): "(OH, OW) with w (KH, KW)",
}


def _batched_x(shape: Shape) -> Shape:
    """``(H, W)`` and ``(H, W, C)`` as ``(N, H, W, C)``."""
    return shape if len(shape) == 4 else (1, *shape) if len(shape) == 3 else (1, *shape, 1)


def _batched_w(shape: Shape) -> Shape:
    """``(KH, KW)`` and ``(KH, KW, C)`` as ``(D, KH, KW, C)``."""
    return _batched_x(shape)


def _batched_dy(shape: Shape) -> Shape:
    """``(OH, OW)`` and ``(OH, OW, D)`` as ``(N, OH, OW, D)``."""
    return _batched_x(shape)


def _build(
    function: str,
    x: Shape,
    kernel: tuple[int, int],
    d: int,
    cg: int | None,
    form: geometry,
    dtype: np.dtype[Any],
    whose: str = "x",
) -> ConvProblem:
    """Check sizes against one another and make the problem. `cg` is what w says, None where w isn't given."""
    n, h, w, c = x
    groups = form.groups
    for name, value in (("height", h), ("width", w), ("channels", c)):
        if value < 1:
            fail(function, f"{whose} has {name} {value}, expected at least 1")
    for name, value in (("height", kernel[0]), ("width", kernel[1])):
        if value < 1:
            fail(function, f"the kernel has {name} {value}, expected at least 1")
    if d < 1:
        fail(function, f"the convolution has {d} output channels, expected at least 1")
    if c % groups:
        fail(function, f"{whose} has {c} channels, which {groups} groups do not divide")
    if d % groups:
        fail(function, f"the convolution has {d} output channels, which {groups} groups do not divide")
    if cg is not None and cg * groups != c:
        fail(
            function,
            f"w has {cg} input channels per group, but {whose} has {c} channels in {groups} group{'s' * (groups > 1)}",
        )
    problem = ConvProblem(n, h, w, c, d, *kernel, form.stride, form.pads((h, w), kernel), form.dilation, groups, dtype)
    for axis, size, out, length in ((0, h, problem.oh, kernel[0]), (1, w, problem.ow, kernel[1])):
        if out < 1:
            before, after = problem.padding[axis]
            reach = problem.dilation[axis] * (length - 1) + 1
            span = f"{reach} {('rows', 'columns')[axis]}"
            fail(function, f"the kernel spans {span}, but the padded input has only {size + before + after}")
    if max(math.prod(shape) for shape in (problem.x_shape, problem.w_shape, problem.y_shape)) > LARGEST_ARRAY:
        fail(function, f"{problem} has an array of more than {LARGEST_ARRAY} elements")
    return problem


def _no_groups(function: str, form: geometry) -> None:
    if form.groups != 1:
        fail(function, f"groups is {form.groups}, but arrays without a D axis need groups=1")


def problem_for(function: str, x: Shape, w: Shape, form: geometry, dtype: np.dtype[Any]) -> ConvProblem:
    """Return the problem of ``x`` and ``w``, whichever of the article's forms they have."""
    _ranks(function, ("x", "w"), (x, w), _FORWARD_FORMS)
    if len(w) < 4:
        _no_groups(function, form)
    d, kh, kw, cg = _batched_w(w)
    if len(x) == len(w) == 3 and cg != x[2]:
        fail(
            function,
            f"w of shape {w} has {cg} channels, but x of shape {x} (as H, W, C) has {x[2]}{_NO_CHANNELS['x']}",
        )
    return _build(function, _batched_x(x), (kh, kw), d, cg, form, dtype)


def _check_dy(function: str, dy: Shape, problem: ConvProblem) -> None:
    if dy != problem.y_shape:
        fail(function, f"dy has shape {dy} (as N, OH, OW, D), expected {problem.y_shape}")


def check_dy(function: str, dy: Shape, problem: ConvProblem, x_rank: int, w_rank: int) -> None:
    """Check that dy is the gradient of this problem's output, in the form that x and w have."""
    rank = {(4, 4): 4, (3, 4): 3, (3, 3): 2, (2, 2): 2}[x_rank, w_rank]
    if len(dy) != rank:
        expected = problem.y_shape[4 - rank :] if rank > 2 else problem.y_shape[1:3]
        fail(function, f"dy has shape {dy}, expected {expected}")
    _check_dy(function, _batched_dy(dy), problem)


def kernel_sizes(
    function: str, kernel_size: Any, out: Shape | None, x: Shape, dy: Shape, form: geometry
) -> tuple[int, int]:
    """Return (KH, KW): as given, as `out` has them, or as the shapes imply them."""
    if kernel_size is not None:
        return pair(function, "kernel_size", kernel_size, 1)
    if out is not None and len(out) in (2, 3, 4):
        kh, kw = out[1:3] if len(out) == 4 else out[:2]
        return kh, kw
    if form.stride != (1, 1) or form.dilation != (1, 1) or isinstance(form.padding, str):
        fail(
            function,
            "kernel_size is needed: the shapes determine it only with stride 1, dilation 1 and padding in numbers",
        )
    (top, bottom), (left, right) = form.padding
    size = x[1] + top + bottom - dy[1] + 1, x[2] + left + right - dy[2] + 1
    if min(size) < 1:
        fail(
            function,
            f"dy of shape {dy} (as N, OH, OW, D) is larger than x of shape {x} (as N, H, W, C) allows",
        )
    return size


def weight_grad_problem(
    function: str,
    x: Shape,
    dy: Shape,
    kernel_size: Any,
    out: Shape | None,
    form: geometry,
    dtype: np.dtype[Any],
) -> tuple[ConvProblem, Shape]:
    """Return the problem of ``x`` and ``dy``, and the shape that dw has in their form."""
    _ranks(function, ("x", "dy"), (x, dy), _WEIGHT_GRAD_FORMS)
    if len(dy) == 2:
        _no_groups(function, form)
    x4, dy4 = _batched_x(x), _batched_dy(dy)
    kernel = kernel_sizes(function, kernel_size, out, x4, dy4, form)
    problem = _build(function, x4, kernel, dy4[3], None, form, dtype)
    _check_dy(function, dy4, problem)
    shape = problem.w_shape
    return problem, shape if len(dy) > 2 else shape[1:] if len(x) == 3 else shape[1:3]


def input_grad_problem(
    function: str, dy: Shape, w: Shape, input_size: Any, form: geometry, dtype: np.dtype[Any]
) -> tuple[ConvProblem, Shape]:
    """Return the problem of ``dy`` and ``w``, and the shape that dx has in their form."""
    _ranks(function, ("dy", "w"), (dy, w), _INPUT_GRAD_FORMS)
    if len(w) < 4:
        _no_groups(function, form)
    n, oh, ow, d = _batched_dy(dy)
    wd, kh, kw, cg = _batched_w(w)
    if wd != d:
        fail(function, f"w has {wd} output channels, but dy has {d}")
    if input_size is not None:
        h, width = pair(function, "input_size", input_size, 1)
    else:
        h, width = _smallest_input(function, (oh, ow), (kh, kw), form)
    problem = _build(function, (n, h, width, cg * form.groups), (kh, kw), d, cg, form, dtype, whose="the input")
    _check_dy(function, (n, oh, ow, d), problem)
    shape = problem.x_shape
    return problem, shape if len(dy) == 4 else shape[1:] if len(w) > 2 else shape[1:3]


def _smallest_input(function: str, out: tuple[int, int], kernel: tuple[int, int], form: geometry) -> tuple[int, int]:
    if isinstance(form.padding, str):
        size = tuple((o - 1) * s + 1 for o, s in zip(out, form.stride, strict=True))
    else:
        size = tuple(
            (o - 1) * s + d * (k - 1) + 1 - sum(p)
            for o, k, s, d, p in zip(out, kernel, form.stride, form.dilation, form.padding, strict=True)
        )
    if min(size) < 1:
        fail(
            function,
            f"dy of {out[0]}x{out[1]} implies an input of {size[0]}x{size[1]}, expected at least 1x1",
        )
    return size[0], size[1]


def as_shape(function: str, name: str, value: Any) -> Shape:
    """Return a shape as a tuple of ints."""
    if not isinstance(value, (tuple, list)):
        fail(function, f"{name} is {value!r}, expected a tuple of ints", TypeError)
    return tuple(integer(function, name, size, 0) for size in value)


def as_bias(function: str, value: Any, w: Array) -> Array:
    """Return b as an array; a Python number takes w's dtype, as NumPy's rules for weak scalars have it."""
    if type(value) is float or type(value) is int:
        try:
            return np.asarray(value, w.dtype)
        except OverflowError:
            fail(function, f"b is {_shown(int(value))}, which {w.dtype} cannot hold")
    return as_input(function, "b", value)


def check_bias(function: str, b: Array, problem: ConvProblem, w_rank: int) -> None:
    """Check that b has one value for each output channel: ``(D,)``, or 0-d where w has no D axis."""
    expected: Shape = (problem.d,) if w_rank == 4 else ()
    if b.shape != expected:
        fail(function, f"b has shape {b.shape}, expected {expected}")


def output_shape(problem: ConvProblem, x_rank: int, w_rank: int) -> Shape:
    """Return the shape of y in the form that x and w have."""
    shape = problem.y_shape
    return shape if x_rank == 4 else shape[1:] if w_rank == 4 else shape[1:3]
