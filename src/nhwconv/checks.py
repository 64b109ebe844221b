"""Arguments and arrays become a `ConvProblem` here, or one of the package's error messages.

Everything is checked before any work is done, and nothing is written to before everything is checked.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .problem import ConvProblem, Padding, same_padding

__all__ = [
    "NATIVE",
    "Options",
    "Refusal",
    "as_bias",
    "as_dtype",
    "as_input",
    "as_out",
    "as_planned",
    "as_shape",
    "check_accumulate",
    "check_bias",
    "check_dy",
    "common_dtype",
    "fail",
    "input_grad_problem",
    "integer",
    "kernel_size_key",
    "kernel_sizes",
    "no_samples",
    "output_shape",
    "pair",
    "prepare",
    "problem_for",
    "stand_in",
    "weight_grad_problem",
    "words_of",
]

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

#: Sizes and offsets are kept below this, so that no product of two overflows 64 bits.
LARGEST = 2**31 - 1
LARGEST_ARRAY = 2**48


class Refusal(Exception):  # noqa: N818 - it says what is refused, and becomes an error
    """What is wrong with a call, before `words_of` makes it the error of the function that was called."""

    def __init__(self, message: str, error: type[Exception]) -> None:
        super().__init__(message)
        self.error = error


def fail(message: str, error: type[Exception] = ValueError) -> NoReturn:
    """Refuse a call; `error` is what its caller sees."""
    raise Refusal(message, error)


@contextmanager
def words_of(function: str) -> Iterator[None]:
    """Give refusals the one form that every message of the package has: ``function: message``."""
    try:
        yield
    except Refusal as refusal:
        raise refusal.error(f"{function}: {refusal}") from None


# ---------------------------------------------------------------------------------------------- arrays


_DTYPES = "float32, float64, float16 or bfloat16"


#: Those that need no second look; bfloat16 and other byte orders are known by their name.
NATIVE = frozenset(map(np.dtype, ("float16", "float32", "float64")))


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype in NATIVE or dtype.name in ("float16", "float32", "float64", "bfloat16")


def as_dtype(value: Any) -> np.dtype[Any]:
    """Return a dtype that nhwconv computes with, in native byte order."""
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        fail(f"dtype is {value!r}, expected {_DTYPES}", TypeError)
    if not _is_float(dtype):
        fail(f"dtype is {dtype}, expected {_DTYPES}", TypeError)
    return dtype.newbyteorder("=")


def as_input(name: str, value: Any) -> Array:
    """Return `value` as an array of a floating dtype that nhwconv computes with; no copy is made."""
    if type(value) is np.ndarray and value.dtype in NATIVE:
        return value
    if isinstance(value, np.ma.MaskedArray):
        fail(
            f"{name} is a masked array, whose mask would be lost; pass {name}.filled(value) or {name}.data",
            TypeError,
        )
    try:
        array = np.asarray(value)
    except ValueError as error:  # a ragged list
        fail(f"{name} is not an array: {error}")
    if not _is_float(array.dtype):
        fail(
            f"{name} has dtype {array.dtype}, expected {_DTYPES}; "
            f"cast it first, for example np.asarray({name}, np.float32)",
            TypeError,
        )
    return array


def as_planned(name: str, value: Any, shape: Shape, dtype: np.dtype[Any]) -> Array:
    """Return an operand of a plan as an array; it must have the plan's shape and dtype."""
    array = as_input(name, value)
    if array.shape != shape:
        fail(f"{name} has shape {array.shape}, expected {shape}")
    if array.dtype.newbyteorder("=") != dtype:
        fail(f"{name} has dtype {array.dtype}, expected {dtype}", TypeError)
    return array


def check_accumulate(accumulate: object, out: object, name: str = "out") -> None:
    """Check that `accumulate` is a flag, and that there is something to add to."""
    if not isinstance(accumulate, (bool, np.bool_)):
        fail(f"accumulate is {accumulate!r}, expected True or False", TypeError)
    if accumulate and out is None:
        fail(f"accumulate=True needs {name} to add to")


def common_dtype(**inputs: Array) -> np.dtype[Any]:
    """Return the dtype in which these arrays meet, as NumPy promotes; always in native byte order."""
    dtypes = {array.dtype for array in inputs.values()}
    if len(dtypes) == 1 and dtypes <= NATIVE:
        return dtypes.pop()
    try:
        return np.result_type(*inputs.values()).newbyteorder("=")
    except np.exceptions.DTypePromotionError:
        each = ", ".join(f"{name} has {array.dtype}" for name, array in inputs.items())
        fail(f"NumPy has no common dtype for these ({each}); cast them to float32", TypeError)


def prepare(array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return `array` as kernels take it: `dtype`, `shape`, C-contiguous, aligned; copied only if it must be."""
    if array.dtype != dtype or not (array.flags.c_contiguous and array.flags.aligned):
        array = np.require(array, dtype, ["C", "A"])
    return array if array.shape == shape else array.reshape(shape)


def as_out(name: str, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], inputs: dict[str, Array]) -> Array:
    """Check an `out` argument: shape, dtype, writable, C-contiguous, and apart from every input."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        fail(f"{name} is {_a(type(out).__name__)}, expected a numpy.ndarray", TypeError)
    if out.shape != shape:
        fail(f"{name} has shape {out.shape}, expected {shape}")
    if out.dtype != dtype:
        fail(f"{name} has dtype {out.dtype}, expected {dtype}", TypeError)
    if not out.flags.writeable:
        fail(f"{name} is read-only")
    if not out.flags.c_contiguous or not out.flags.aligned:
        fail(f"{name} must be C-contiguous and aligned")
    for other, array in inputs.items():
        if np.may_share_memory(out, array) and _overlap(out, array):
            fail(f"{name} shares memory with {other}")
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


def integer(name: str, value: Any, least: int) -> int:
    """Return an integer argument as an int; bools and floats are refused."""
    if isinstance(value, (bool, np.bool_)):
        fail(f"{name} is {value!r}, expected an integer", TypeError)
    try:
        number = operator.index(value)
    except TypeError:
        fail(f"{name} is {value!r}, expected an integer", TypeError)
    if number < least:
        fail(f"{name} is {_shown(number)}, expected at least {least}")
    if number > LARGEST:
        fail(f"{name} is {_shown(number)}, expected at most {LARGEST}")
    return number


def pair(name: str, value: Any, least: int) -> tuple[int, int]:
    """Return an int, or a pair of them for rows and columns, as a pair."""
    if isinstance(value, (tuple, list)) or (isinstance(value, np.ndarray) and value.ndim):
        if len(value) != 2:
            fail(f"{name} has {len(value)} values, expected an int or a pair")
        first, second = value
        return integer(name, first, least), integer(name, second, least)
    number = integer(name, value, least)
    return number, number


def _padding(value: Any) -> Padding | str:
    """Return ``((top, bottom), (left, right))``, or "same" for whoever knows the sizes."""
    if isinstance(value, str):
        if value == "same":
            return "same"
        if value == "valid":
            return (0, 0), (0, 0)
        fail(f'padding is {value!r}, expected "valid", "same", an int, a pair or a pair of pairs')
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (tuple, list)) and len(value) == 2 and any(isinstance(v, (tuple, list)) for v in value):
        if not all(isinstance(v, (tuple, list)) and len(v) == 2 for v in value):
            fail(f"padding is {value!r}, expected ((top, bottom), (left, right))")
        return pair("padding", value[0], 0), pair("padding", value[1], 0)
    rows, columns = pair("padding", value, 0)
    return (rows, rows), (columns, columns)


@dataclass(frozen=True)
class Options:
    """Stride, padding, dilation and groups, checked; `padding` may still be "same"."""

    stride: tuple[int, int]
    padding: Padding | str
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, stride: Any, padding: Any, dilation: Any, groups: Any) -> Options:
        """Check what a caller gave."""
        return cls(
            pair("stride", stride, 1), _padding(padding), pair("dilation", dilation, 1), integer("groups", groups, 1)
        )

    def pads(self, size: tuple[int, int], kernel: tuple[int, int]) -> Padding:
        """Return the padding in numbers for an input of this size."""
        if isinstance(self.padding, str):
            rows, columns = (same_padding(*v) for v in zip(size, kernel, self.stride, self.dilation, strict=True))
            return rows, columns
        return self.padding


# ------------------------------------------------------------------------------------------ the problem

_NO_CHANNELS = {
    "x": ". A batch without a channel axis, (N, H, W), is not a form: pass x[..., None]",
    "dy": ". A batch without a channel axis, (N, OH, OW), is not a form: pass dy[..., None]",
}


def _ranks(names: tuple[str, str], shapes: tuple[Shape, Shape], forms: dict[tuple[int, int], str]) -> None:
    """Check that two arrays' ranks are one of the article's forms."""
    ranks = len(shapes[0]), len(shapes[1])
    if ranks in forms:
        return
    accepted = "; ".join(f"{names[0]} {form}" for form in forms.values())
    hint = ""
    if ranks[0] == 3 and ranks[1] in (2, 3):
        hint = _NO_CHANNELS[names[0]]
    given = f"{names[0]} of shape {shapes[0]} and {names[1]} of shape {shapes[1]}"
    fail(f"{given} do not go together; expected {accepted}{hint}")


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
    x: Shape,
    kernel: tuple[int, int],
    d: int,
    cg: int | None,
    options: Options,
    dtype: np.dtype[Any],
    whose: str = "x",
) -> ConvProblem:
    """Check sizes against one another and make the problem. `cg` is what w says, None where w isn't given."""
    n, h, w, c = x
    groups = options.groups
    for name, value in (("height", h), ("width", w), ("channels", c)):
        if value < 1:
            fail(f"{whose} has {name} {value}, expected at least 1")
    for name, value in (("height", kernel[0]), ("width", kernel[1])):
        if value < 1:
            fail(f"the kernel has {name} {value}, expected at least 1")
    if d < 1:
        fail(f"the convolution has {d} output channels, expected at least 1")
    if c % groups:
        fail(f"{whose} has {c} channels, which {groups} groups do not divide")
    if d % groups:
        fail(f"the convolution has {d} output channels, which {groups} groups do not divide")
    if cg is not None and cg * groups != c:
        fail(
            f"w has {cg} input channels per group, but {whose} has {c} channels in {groups} group{'s' * (groups > 1)}",
        )
    problem = ConvProblem(
        n, h, w, c, d, *kernel, options.stride, options.pads((h, w), kernel), options.dilation, groups, dtype
    )
    for axis, size, out, length in ((0, h, problem.oh, kernel[0]), (1, w, problem.ow, kernel[1])):
        if out < 1:
            before, after = problem.padding[axis]
            reach = problem.dilation[axis] * (length - 1) + 1
            span = f"{reach} {('rows', 'columns')[axis]}"
            fail(f"the kernel spans {span}, but the padded input has only {size + before + after}")
    if max(math.prod(shape) for shape in (problem.x_shape, problem.w_shape, problem.y_shape)) > LARGEST_ARRAY:
        fail(f"{problem} has an array of more than {LARGEST_ARRAY} elements")
    return problem


def _no_groups(options: Options) -> None:
    if options.groups != 1:
        fail(f"groups is {options.groups}, but arrays without a D axis need groups=1")


def problem_for(x: Shape, w: Shape, options: Options, dtype: np.dtype[Any]) -> ConvProblem:
    """Return the problem of ``x`` and ``w``, whichever of the article's forms they have."""
    _ranks(("x", "w"), (x, w), _FORWARD_FORMS)
    if len(w) < 4:
        _no_groups(options)
    d, kh, kw, cg = _batched_w(w)
    if len(x) == len(w) == 3 and cg != x[2]:
        fail(
            f"w of shape {w} has {cg} channels, but x of shape {x} (as H, W, C) has {x[2]}{_NO_CHANNELS['x']}",
        )
    return _build(_batched_x(x), (kh, kw), d, cg, options, dtype)


def _check_dy(dy: Shape, problem: ConvProblem) -> None:
    if dy != problem.y_shape:
        fail(f"dy has shape {dy} (as N, OH, OW, D), expected {problem.y_shape}")


def check_dy(dy: Shape, problem: ConvProblem, x_rank: int, w_rank: int) -> None:
    """Check that dy is the gradient of this problem's output, in the form that x and w have."""
    rank = {(4, 4): 4, (3, 4): 3, (3, 3): 2, (2, 2): 2}[x_rank, w_rank]
    if len(dy) != rank:
        expected = problem.y_shape[4 - rank :] if rank > 2 else problem.y_shape[1:3]
        fail(f"dy has shape {dy}, expected {expected}")
    _check_dy(_batched_dy(dy), problem)


def kernel_size_key(kernel_size: Any, out: Shape | None) -> tuple[tuple[int, int] | None, Shape | None]:
    """Return what says (KH, KW): the argument, checked, or the shape of `out`."""
    return (None, out) if kernel_size is None else (pair("kernel_size", kernel_size, 1), None)


def kernel_sizes(kernel_size: Any, out: Shape | None, x: Shape, dy: Shape, options: Options) -> tuple[int, int]:
    """Return (KH, KW): as given, as `out` has them, or as the shapes imply them."""
    if kernel_size is not None:
        return pair("kernel_size", kernel_size, 1)
    if out is not None and len(out) in (2, 3, 4):
        kh, kw = out[1:3] if len(out) == 4 else out[:2]
        return kh, kw
    if options.stride != (1, 1) or options.dilation != (1, 1) or isinstance(options.padding, str):
        fail(
            "kernel_size is needed: the shapes determine it only with stride 1, dilation 1 and padding in numbers",
        )
    (top, bottom), (left, right) = options.padding
    size = x[1] + top + bottom - dy[1] + 1, x[2] + left + right - dy[2] + 1
    if min(size) < 1:
        fail(
            f"dy of shape {dy} (as N, OH, OW, D) is larger than x of shape {x} (as N, H, W, C) allows",
        )
    return size


def weight_grad_problem(
    x: Shape,
    dy: Shape,
    kernel_size: Any,
    out: Shape | None,
    options: Options,
    dtype: np.dtype[Any],
) -> tuple[ConvProblem, Shape]:
    """Return the problem of ``x`` and ``dy``, and the shape that dw has in their options."""
    _ranks(("x", "dy"), (x, dy), _WEIGHT_GRAD_FORMS)
    if len(dy) == 2:
        _no_groups(options)
    x4, dy4 = _batched_x(x), _batched_dy(dy)
    kernel = kernel_sizes(kernel_size, out, x4, dy4, options)
    problem = _build(x4, kernel, dy4[3], None, options, dtype)
    _check_dy(dy4, problem)
    shape = problem.w_shape
    return problem, shape if len(dy) > 2 else shape[1:] if len(x) == 3 else shape[1:3]


def input_grad_problem(
    dy: Shape, w: Shape, input_size: Any, options: Options, dtype: np.dtype[Any]
) -> tuple[ConvProblem, Shape]:
    """Return the problem of ``dy`` and ``w``, and the shape that dx has in their options."""
    _ranks(("dy", "w"), (dy, w), _INPUT_GRAD_FORMS)
    if len(w) < 4:
        _no_groups(options)
    n, oh, ow, d = _batched_dy(dy)
    wd, kh, kw, cg = _batched_w(w)
    if wd != d:
        fail(f"w has {wd} output channels, but dy has {d}")
    if input_size is not None:
        h, width = pair("input_size", input_size, 1)
    else:
        h, width = _smallest_input((oh, ow), (kh, kw), options)
    problem = _build((n, h, width, cg * options.groups), (kh, kw), d, cg, options, dtype, whose="the input")
    _check_dy((n, oh, ow, d), problem)
    shape = problem.x_shape
    return problem, shape if len(dy) == 4 else shape[1:] if len(w) > 2 else shape[1:3]


def _smallest_input(out: tuple[int, int], kernel: tuple[int, int], options: Options) -> tuple[int, int]:
    if isinstance(options.padding, str):
        size = tuple((o - 1) * s + 1 for o, s in zip(out, options.stride, strict=True))
    else:
        size = tuple(
            (o - 1) * s + d * (k - 1) + 1 - sum(p)
            for o, k, s, d, p in zip(out, kernel, options.stride, options.dilation, options.padding, strict=True)
        )
    if min(size) < 1:
        fail(
            f"dy of {out[0]}x{out[1]} implies an input of {size[0]}x{size[1]}, expected at least 1x1",
        )
    return size[0], size[1]


def as_shape(name: str, value: Any) -> Shape:
    """Return a shape as a tuple of ints."""
    if not isinstance(value, (tuple, list)):
        fail(f"{name} is {value!r}, expected a tuple of ints", TypeError)
    return tuple(integer(name, size, 0) for size in value)


def as_bias(value: Any, w: Array) -> Array:
    """Return b as an array; a Python number takes w's dtype, as NumPy's rules for weak scalars have it."""
    if type(value) is float or type(value) is int:
        try:
            with np.errstate(all="ignore"):  # a new one each time: they are entered once
                return np.asarray(value, w.dtype)
        except OverflowError:
            fail(f"b is {_shown(int(value))}, which {w.dtype} cannot hold")
    return as_input("b", value)


def check_bias(b: Array, problem: ConvProblem, w_rank: int) -> None:
    """Check that b has one value for each output channel: ``(D,)``, or 0-d where w has no D axis."""
    expected: Shape = (problem.d,) if w_rank == 4 else ()
    if b.shape != expected:
        fail(f"b has shape {b.shape}, expected {expected}")


def output_shape(problem: ConvProblem, x_rank: int, w_rank: int) -> Shape:
    """Return the shape of y in the form that x and w have."""
    shape = problem.y_shape
    return shape if x_rank == 4 else shape[1:] if w_rank == 4 else shape[1:3]
