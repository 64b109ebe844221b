"""Arguments and arrays become a `ConvProblem` here, or one of the package's error messages.

Everything is checked before any work is done, and nothing is written to before everything is checked.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .layouts import IMAGES, PLAIN, WEIGHTS, Form, Layout
from .problem import ConvProblem, Padding, same_padding
from .runtime.arrays import values_are_data

__all__ = [
    "FORWARD_RANKS",
    "INPUT_GRAD_RANKS",
    "NATIVE",
    "WEIGHT_GRAD_RANKS",
    "Options",
    "Refusal",
    "as_bias",
    "as_dtype",
    "as_input",
    "as_layout",
    "as_out",
    "as_planned",
    "as_shape",
    "check_accumulate",
    "check_bias",
    "check_dy",
    "common_dtype",
    "fail",
    "forward_problem",
    "input_grad_problem",
    "integer",
    "kernel_size_key",
    "kernel_sizes",
    "native",
    "no_samples",
    "pair",
    "prepare",
    "problem_for",
    "stand_in",
    "transposed_problem",
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


def native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return a dtype in native byte order: the object that NumPy's arrays have, so that `is` tells them alike."""
    return np.dtype(dtype.type)


def as_dtype(value: Any) -> np.dtype[Any]:
    """Return a dtype that nhwconv computes with, in native byte order."""
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        fail(f"dtype is {value!r}, expected {_DTYPES}", TypeError)
    if not _is_float(dtype):
        fail(f"dtype is {dtype}, expected {_DTYPES}", TypeError)
    return native(dtype)


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
    if native(array.dtype) != dtype:
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
    try:
        return native(dtypes.pop() if len(dtypes) == 1 else np.result_type(*inputs.values()))
    except np.exceptions.DTypePromotionError:
        each = ", ".join(f"{name} has {array.dtype}" for name, array in inputs.items())
        fail(f"NumPy has no common dtype for these ({each}); cast them to float32", TypeError)


@values_are_data
def _as_kernels_take_it(value: Any, dtype: np.dtype[Any]) -> Array:
    return np.require(value, dtype, ["C", "A"])


def prepare(array: Array, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return `array` as kernels take it: `dtype`, `shape`, C-contiguous, aligned; copied only if it must be."""
    if array.dtype != dtype or not (array.flags.c_contiguous and array.flags.aligned):
        array = _as_kernels_take_it(array, dtype)
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
            fail(f"{name} has {len(value)} values, expected an int or a pair{_of_images(value)}")
        first, second = value
        return integer(name, first, least), integer(name, second, least)
    number = integer(name, value, least)
    return number, number


def _of_images(value: Any) -> str:
    """Return the end of a message about four values, where they are TensorFlow's, one for each axis of a batch."""
    if len(value) == 4 and isinstance(value, (tuple, list)) and all(type(v) is int and v == 1 for v in value[::3]):
        return f"; of TensorFlow's four, pass {tuple(value[1:3])}"
    return ""


def _single(name: str, value: Any, least: int) -> tuple[int, int]:
    """Return an int, which may be alone in a tuple, for the columns; what rows have changes nothing for one row."""
    if isinstance(value, (tuple, list)) or (isinstance(value, np.ndarray) and value.ndim):
        if len(value) != 1:
            fail(f"{name} has {len(value)} values, expected an int")
        (value,) = value
    return least, integer(name, value, least)


def _padding(value: Any) -> Padding | str:
    """Return ``((top, bottom), (left, right))``, or a word, for whoever knows the sizes."""
    if isinstance(value, str):
        if value in ("same", "valid"):
            return str(value)
        fail(f'padding is {value!r}, expected "valid", "same", an int, a pair or a pair of pairs')
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (tuple, list)) and len(value) == 2 and any(isinstance(v, (tuple, list)) for v in value):
        if not all(isinstance(v, (tuple, list)) and len(v) == 2 for v in value):
            fail(f"padding is {value!r}, expected ((top, bottom), (left, right))")
        return pair("padding", value[0], 0), pair("padding", value[1], 0)
    rows, columns = pair("padding", value, 0)
    return (rows, rows), (columns, columns)


def _padding_of_one(value: Any) -> Padding | str:
    """Return the same for one dimension: ``((0, 0), (before, after))``."""
    if isinstance(value, str):
        if value in ("same", "valid"):
            return str(value)
        fail(f'padding is {value!r}, expected "valid", "same", an int or a pair (before, after)')
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (tuple, list)) and len(value) == 1:
        (value,) = value
    return (0, 0), pair("padding", value, 0)


def as_layout(layout: Any, w_layout: Any, dimensions: int = 2) -> Layout:
    """Return the order of axes that `layout` and `w_layout` name; with images as "NCHW", weights are OIHW."""
    if not isinstance(layout, str) or layout not in IMAGES:
        fail(f"layout is {layout!r}, expected {' or '.join(map(repr, IMAGES))}")
    if w_layout is None:
        return Layout(layout, "OHWI" if layout == "NHWC" else "OIHW", dimensions)
    if not isinstance(w_layout, str) or w_layout not in WEIGHTS:
        fail(f"w_layout is {w_layout!r}, expected {' or '.join(map(repr, WEIGHTS))}")
    if layout != "NHWC":
        fail(f'w_layout is {w_layout!r}, but with layout="{layout}" weights are OIHW')
    return Layout(layout, w_layout, dimensions)


@dataclass(frozen=True)
class Options:
    """The options of a call, checked; `padding` may still be a word, for whoever knows the sizes.

    `output_padding` is that of a transposed convolution.
    """

    stride: tuple[int, int]
    padding: Padding | str
    dilation: tuple[int, int]
    groups: int
    layout: Layout = PLAIN
    output_padding: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: Any,
        layout: Layout = PLAIN,
        output_padding: Any = None,
    ) -> Options:
        """Check what a caller gave."""
        read, pads = (pair, _padding) if layout.dimensions == 2 else (_single, _padding_of_one)
        return cls(
            read("stride", stride, 1),
            pads(padding),
            read("dilation", dilation, 1),
            integer("groups", groups, 1),
            layout,
            None if output_padding is None else read("output_padding", output_padding, 0),
        )

    def keywords(self) -> dict[str, Any]:
        """Return the options as the arguments of a public function, as simple as they can be said."""

        def simple(value: Any) -> Any:
            if isinstance(value, str) or self.layout.dimensions == 1:
                return value if isinstance(value, str) else value[1]
            first = value[0][0] if isinstance(value[0], tuple) else value[0]
            return first if value in ((first, first), ((first, first), (first, first))) else value

        found = {
            "stride": simple(self.stride), "padding": simple(self.padding), "dilation": simple(self.dilation),
            "groups": self.groups, "layout": self.layout.images,
            "w_layout": "HWIO" if self.layout.weights == "HWIO" else None,
        }  # fmt: skip
        if self.output_padding is not None:
            found["output_padding"] = simple(self.output_padding)
        return found

    def pads(self, size: tuple[int, int], kernel: tuple[int, int]) -> Padding:
        """Return the padding in numbers for an input of this size."""
        if self.padding == "same":
            rows, columns = (same_padding(*v) for v in zip(size, kernel, self.stride, self.dilation, strict=True))
            return rows, columns
        return self.numbers

    @property
    def numbers(self) -> Padding:
        """The padding that is no word, or none."""
        return ((0, 0), (0, 0)) if isinstance(self.padding, str) else self.padding


# ------------------------------------------------------------------------------------------ the problem

#: The ranks, in two dimensions, of the article's forms, and that of the third array: y, w and x.
FORWARD_RANKS = {(4, 4): 4, (3, 4): 3, (3, 3): 2, (2, 2): 2}
WEIGHT_GRAD_RANKS = {(4, 4): 4, (3, 3): 4, (3, 2): 3, (2, 2): 2}
INPUT_GRAD_RANKS = {(4, 4): 4, (3, 4): 3, (2, 3): 3, (2, 2): 2}


def _ranks(
    names: tuple[str, str],
    shapes: tuple[Shape, Shape],
    known: dict[tuple[int, int], int],
    layout: Layout,
    transposed: bool = False,
) -> tuple[int, int, int]:
    """Check that two arrays' ranks are one of the article's forms; return them, and that of the third."""
    if layout.images == "NCHW":  # where there are channels
        known = {pair: third for pair, third in known.items() if min(*pair, third) > 2 and (pair[1] == 4 or third == 4)}
    ranks = layout.rank(shapes[0]), layout.rank(shapes[1])
    if ranks in known:
        return *ranks, known[ranks]
    accepted = "; ".join(
        f"{names[0]} {layout.letters(names[0], a)} with {names[1]} {layout.letters(names[1], b, transposed)}"
        for a, b in known
    )
    hint = ""
    if ranks[0] == 3 and ranks[1] in (2, 3) and layout.images == "NHWC":
        hint = _no_channels(names[0], layout)
    given = f"{names[0]} of shape {shapes[0]} and {names[1]} of shape {shapes[1]}"
    fail(f"{given} do not go together; expected {accepted}{hint}")


def _no_channels(name: str, layout: Layout) -> str:
    letters = layout.letters(name, 4).rpartition(", ")[0]
    return f". A batch without a channel axis, {letters}), is not a form: pass {name}[..., None]"


def _other_order(w: Shape, channels: int, groups: int, layout: Layout) -> str:
    """Return the end of a message about the channels of weights, where they would fit in another order of axes."""
    if layout.rank(w) != 4:
        return ""
    for name in ("HWIO", "OHWI", "OIHW"):
        other = layout._replace(weights=name)
        if name != layout.weights and other.batched_weights(w)[3] * groups == channels:
            positions = other.weights_of(layout.batched_weights(tuple(range(len(w)))), 4)
            order = tuple(positions.index(i) for i in range(len(w)))
            option = f'w_layout="{name}", or ' if name in WEIGHTS and layout.images == "NHWC" else ""
            return f"; if w is {other.letters('w', 4)}, pass {option}w.transpose{order}"
    return ""


def _sized(whose: str, sizes: Iterable[tuple[str, int]]) -> None:
    """Check that no size is zero."""
    for name, value in sizes:
        if value < 1:
            fail(f"{whose} has {name} {value}, expected at least 1")


def _build(
    x: Shape,
    kernel: tuple[int, int],
    d: int,
    cg: int | None,
    options: Options,
    dtype: np.dtype[Any],
    whose: str = "x",
    hint: Callable[[], str] = str,
) -> ConvProblem:
    """Check sizes against one another and make the problem. `cg` is what w says, None where w isn't given."""
    n, h, w, c = x
    groups, layout = options.groups, options.layout
    _sized(whose, (*zip(layout.sizes, (h, w), strict=True), ("channels", c)))
    _sized("the kernel", zip(layout.sizes, kernel, strict=True))
    if d < 1:
        fail(f"the convolution has {d} output channels, expected at least 1")
    if c % groups:
        fail(f"{whose} has {c} channels, which {groups} groups do not divide")
    if d % groups:
        fail(f"the convolution has {d} output channels, which {groups} groups do not divide")
    if cg is not None and cg * groups != c:
        fail(
            f"w has {cg} input channels per group, but {whose} has {c} channels "
            f"in {groups} group{'s' * (groups > 1)}{hint()}",
        )
    problem = ConvProblem(
        n, h, w, c, d, *kernel, options.stride, options.pads((h, w), kernel), options.dilation, groups, dtype
    )
    for axis, size, out, length in ((0, h, problem.oh, kernel[0]), (1, w, problem.ow, kernel[1])):
        if out < 1:
            before, after = problem.padding[axis]
            reach = problem.dilation[axis] * (length - 1) + 1
            span = f"{reach} {layout.lines[axis]}"
            fail(f"the kernel spans {span}, but the padded input has only {size + before + after}")
    return _not_too_large(problem)


def _not_too_large(problem: ConvProblem) -> ConvProblem:
    if max(math.prod(shape) for shape in (problem.x_shape, problem.w_shape, problem.y_shape)) > LARGEST_ARRAY:
        fail(f"{problem} has an array of more than {LARGEST_ARRAY} elements")
    return problem


def _no_groups(options: Options) -> None:
    if options.groups != 1:
        fail(f"groups is {options.groups}, but arrays without a D axis need groups=1")


def problem_for(x: Shape, w: Shape, options: Options, dtype: np.dtype[Any]) -> ConvProblem:
    """Return the problem of ``x`` and ``w``."""
    return forward_problem(x, w, options, dtype)[0]


def forward_problem(x: Shape, w: Shape, options: Options, dtype: np.dtype[Any]) -> tuple[ConvProblem, Form]:
    """Return the problem of ``x`` and ``w``, whichever of the article's forms they have, and that form."""
    layout = options.layout
    x_rank, w_rank, y_rank = _ranks(("x", "w"), (x, w), FORWARD_RANKS, layout)
    if w_rank < 4:
        _no_groups(options)
    batched = layout.batched_images(x)
    d, kh, kw, cg = layout.batched_weights(w)
    if x_rank == w_rank == 3 and cg != batched[3]:
        letters = layout.letters("x", 3)[1:-1]
        fail(
            f"w of shape {w} has {cg} channels, but x of shape {x} (as {letters}) has {batched[3]}"
            f"{_no_channels('x', layout)}",
        )
    hint = partial(_other_order, w, batched[3], options.groups, layout)
    problem = _build(batched, (kh, kw), d, cg, options, dtype, hint=hint)
    y = layout.images_of(problem.y_shape, y_rank)
    return problem, Form(x, w, y, (d,) if w_rank == 4 else (), layout)


def check_dy(dy: Shape, expected: Shape, layout: Layout) -> None:
    """Check the shape of the gradient of an output."""
    if dy != expected:
        letters = f" (as {layout.letters('dy', layout.rank(dy))[1:-1]})" if len(dy) == len(expected) else ""
        fail(f"dy has shape {dy}{letters}, expected {expected}")


def kernel_size_key(kernel_size: Any, out: Shape | None = None) -> tuple[tuple[int, int] | None, Shape | None]:
    """Return what says (KH, KW): the argument, checked, or the shape of `out`."""
    return (None, out) if kernel_size is None else (pair("kernel_size", kernel_size, 1), None)


def kernel_sizes(kernel_size: Any, out: Shape | None, x: Shape, dy: Shape, options: Options) -> tuple[int, int]:
    """Return (KH, KW): as given, as `out` has them, or as the shapes imply them."""
    if kernel_size is not None:
        return pair("kernel_size", kernel_size, 1)
    if out is not None and len(out) in (2, 3, 4):
        kh, kw = options.layout.batched_weights(out)[1:3]
        return kh, kw
    if options.stride != (1, 1) or options.dilation != (1, 1) or options.padding == "same":
        fail(
            "kernel_size is needed: the shapes determine it only with stride 1, dilation 1 and padding in numbers",
        )
    (top, bottom), (left, right) = options.numbers
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
) -> tuple[ConvProblem, Form]:
    """Return the problem of ``x`` and ``dy``, and their form."""
    layout = options.layout
    _, dy_rank, w_rank = _ranks(("x", "dy"), (x, dy), WEIGHT_GRAD_RANKS, layout)
    if dy_rank == 2:
        _no_groups(options)
    x4, dy4 = layout.batched_images(x), layout.batched_images(dy)
    kernel = kernel_sizes(kernel_size, out, x4, dy4, options)
    problem = _build(x4, kernel, dy4[3], None, options, dtype)
    y = layout.images_of((x4[0], *problem.y_shape[1:]), dy_rank)
    check_dy(dy, y, layout)
    b = (problem.d,) if w_rank == 4 else ()
    return problem, Form(x, layout.weights_of(problem.w_shape, w_rank), y, b, layout)


def input_grad_problem(
    dy: Shape, w: Shape, input_size: Any, options: Options, dtype: np.dtype[Any]
) -> tuple[ConvProblem, Form]:
    """Return the problem of ``dy`` and ``w``, and their form."""
    layout = options.layout
    dy_rank, w_rank, x_rank = _ranks(("dy", "w"), (dy, w), INPUT_GRAD_RANKS, layout)
    if w_rank < 4:
        _no_groups(options)
    n, oh, ow, d = layout.batched_images(dy)
    wd, kh, kw, cg = layout.batched_weights(w)
    if wd != d:
        fail(f"w has {wd} output channels, but dy has {d}")
    if input_size is not None:
        h, width = pair("input_size", input_size, 1)
    else:
        h, width = _smallest_input((oh, ow), (kh, kw), options)
    problem = _build((n, h, width, cg * options.groups), (kh, kw), d, cg, options, dtype, whose="the input")
    y = layout.images_of(problem.y_shape, dy_rank)
    check_dy(dy, y, layout)
    x = layout.images_of(problem.x_shape, x_rank)
    return problem, Form(x, w, y, (d,) if w_rank == 4 else (), layout)


def _smallest_input(out: tuple[int, int], kernel: tuple[int, int], options: Options) -> tuple[int, int]:
    if options.padding == "same":
        size = tuple((o - 1) * s + 1 for o, s in zip(out, options.stride, strict=True))
    else:
        size = tuple(
            (o - 1) * s + d * (k - 1) + 1 - sum(p)
            for o, k, s, d, p in zip(out, kernel, options.stride, options.dilation, options.numbers, strict=True)
        )
    if min(size) < 1:
        fail(
            f"dy of {out[0]}x{out[1]} implies an input of {size[0]}x{size[1]}, expected at least 1x1",
        )
    return size[0], size[1]


# -------------------------------------------------------------------------------- transposed convolution


def transposed_problem(x: Shape, w: Shape, options: Options, dtype: np.dtype[Any]) -> tuple[ConvProblem, Form]:
    """Return the convolution whose transpose takes ``x`` and ``w``, and its form: its output is x, and y its input."""
    layout, groups = options.layout, options.groups
    _, w_rank, y_rank = _ranks(("x", "w"), (x, w), INPUT_GRAD_RANKS, layout, transposed=True)
    if w_rank < 4:
        _no_groups(options)
    n, h, width, c = layout.batched_images(x)
    wc, kh, kw, dg = layout.batched_weights(w)
    _sized("x", (*zip(layout.sizes, (h, width), strict=True), ("channels", c)))
    _sized("the kernel", zip(layout.sizes, (kh, kw), strict=True))
    if wc != c:
        fail(f"w has {wc} input channels, but x has {c}")
    if c % groups:
        fail(f"x has {c} channels, which {groups} groups do not divide")
    if dg < 1:
        fail(f"w has {dg} output channels per group, expected at least 1")
    rows, columns = (_transposed_axis(options, i, (h, width)[i], (kh, kw)[i]) for i in (0, 1))
    pads = rows[1], columns[1]
    problem = ConvProblem(
        n, rows[0], columns[0], dg * groups, c, kh, kw, options.stride, pads, options.dilation, groups, dtype
    )
    y = layout.images_of(problem.x_shape, y_rank)
    return _not_too_large(problem), Form(y, w, x, (dg * groups,) if y_rank > 2 else (), layout)


def _transposed_axis(options: Options, axis: int, size: int, kernel: int) -> tuple[int, tuple[int, int]]:
    """Return the size of the output along an axis, and the padding of the convolution that makes `size` of it."""
    stride, dilation, line = options.stride[axis], options.dilation[axis], options.layout.lines[axis]
    reach, more = dilation * (kernel - 1) + 1, options.output_padding
    extra = 0 if more is None else more[axis]
    if extra >= max(stride, dilation):
        fail(f"output_padding is {extra}, expected less than the stride, {stride}, or the dilation, {dilation}")
    if options.padding == "same":
        out = size * stride if more is None else (size - 1) * stride + reach - reach // 2 * 2 + extra
        if -(-out // stride) != size:
            fail(f'output_padding is {extra}, but with padding="same" no convolution makes {size} {line} of {out}')
        return out, same_padding(out, kernel, stride, dilation)
    before, after = options.numbers[axis]
    if options.padding == "valid" and more is None:
        reach = max(reach, stride)  # as Keras has it: no pixel of the output is left out
    out = (size - 1) * stride + reach - before - after + extra
    if out < 1:
        fail(f"x has {size} {line}, which give an output of {out}, expected at least 1")
    # What lies past the last kernel by a stride or more is no part of what the convolution reads.
    return out, (before, after - extra // stride * stride)


def as_shape(name: str, value: Any) -> Shape:
    """Return a shape as a tuple of ints."""
    if not isinstance(value, (tuple, list)):
        fail(f"{name} is {value!r}, expected a tuple of ints", TypeError)
    return tuple(integer(name, size, 0) for size in value)


def as_bias(value: Any, w: Array) -> Array:
    """Return b as an array; a Python number takes w's dtype, as NumPy's rules for weak scalars have it."""
    if type(value) is float or type(value) is int:
        try:
            return _as_kernels_take_it(value, w.dtype)
        except OverflowError:
            fail(f"b is {_shown(int(value))}, which {w.dtype} cannot hold")
    return as_input("b", value)


def check_bias(b: Array, expected: Shape) -> None:
    """Check that b has one value for each output channel: ``(D,)``, or 0-d where there is no D axis."""
    if b.shape != expected:
        fits = b.size == math.prod(expected) and b.ndim > 1
        fail(f"b has shape {b.shape}, expected {expected}{'; pass b.reshape(-1)' * fits}")
