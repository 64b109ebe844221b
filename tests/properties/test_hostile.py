"""Hostile arguments: each works as NumPy would have it, or is refused at once, by the right error, `out` untouched.

Exact texts are the business of test_checks.py; here every kind of thing that people pass by accident, or on purpose,
is put in the place of one argument.
"""

import enum
import fractions
import math
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import nhwconv as nc
from extent import amount
from nhwconv.cli.app import app
from nhwconv.workloads import parse_layer

F = np.float32
X = np.arange(180, dtype=F).reshape(2, 5, 6, 3) / 64
W = np.arange(72, dtype=F).reshape(4, 3, 2, 3) / 16
DY = np.arange(120, dtype=F).reshape(2, 3, 5, 4) / 32
B = np.arange(4, dtype=F)

#: An error is told within this many seconds.
AT_ONCE = 1e-3


class Subclass(np.ndarray):
    """An array of a class of its own."""


class OnlyInterface:
    """What NumPy reads through `__array__`."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array


class Index:
    """An integer for `operator.index` alone."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class Two(enum.IntEnum):
    TWO = 2


def itself() -> list[Any]:
    """A list that has itself as its element."""
    endless: list[Any] = []
    endless.append(endless)
    return endless


def unaligned(a: np.ndarray) -> np.ndarray:
    memory = np.zeros(a.nbytes + 1, np.uint8)
    view = np.ndarray(a.shape, a.dtype, memory, 1)
    view[...] = a
    return view


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


FUNCTIONS = {"conv2d": nc.conv2d, "weight_grad": nc.conv2d_weight_grad, "input_grad": nc.conv2d_input_grad,
             "bias_grad": nc.conv2d_bias_grad}  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "conv2d": {"x": X, "w": W, "b": B},
    "weight_grad": {"x": X, "dy": DY, "kernel_size": (3, 2)},
    "input_grad": {"dy": DY, "w": W, "input_size": (5, 6)},
    "bias_grad": {"dy": DY},
}
SHAPES = {"conv2d": DY.shape, "weight_grad": W.shape, "input_grad": X.shape, "bias_grad": B.shape}


@dataclass(frozen=True)
class Row:
    """One argument of one function replaced. Expected: an error and a part of its text, or the arguments it equals."""

    function: str
    argument: str
    value: Any
    error: type[Exception] | None = None
    text: str = ""
    same: Any = None

    def __str__(self) -> str:
        value, kind = self.value, type(self.value)
        if kind is int and abs(value) > 10**100:
            text = "long"
        elif hasattr(value, "dtype"):
            text = f"{kind.__name__} of {value.dtype} {np.shape(value)}"
        else:
            text = kind.__name__ if " at 0x" in repr(value) else repr(value)[:40]
        return f"{self.function}-{self.argument}={text}"


def refused(function: str, argument: str, value: Any, error: type[Exception], text: str) -> Row:
    return Row(function, argument, value, error, text)


def taken(function: str, argument: str, value: Any, same: Any) -> Row:
    return Row(function, argument, value, same=same)


FLOATS = "expected float32, float64, float16 or bfloat16"
HUGE = np.broadcast_to(np.float32(1), (2**20, 2**20, 2**10, 3))
TABLE = [
    # ------------------------------------------------------------------------ what is not an array of floats
    *(refused("conv2d", "x", value, TypeError, FLOATS) for value in (
        None, "x", b"x", object(), {}, {1.0}, X.astype(object), X.astype(int), X.astype(bool), X.astype(complex),
        X.astype("U8"), X.astype("S8"), np.zeros(X.shape, "datetime64[s]"), np.zeros(X.shape, "timedelta64[s]"),
        np.zeros(X.shape, [("a", F)]), np.zeros(X.shape, np.longdouble), X.astype(ml_dtypes.float8_e4m3fn),
        X.astype(ml_dtypes.int4), np.zeros(X.shape, np.uint16), 1, True, 1j, print, X.tolist, ...,
        np.datetime64("2020"), range(4), iter([1.0]), memoryview(b"abcd"), fractions.Fraction(1, 2),
    )),
    *(refused("weight_grad", "dy", value, TypeError, FLOATS) for value in (None, DY.astype(object), "dy", 3)),
    *(refused("bias_grad", "dy", value, TypeError, FLOATS) for value in (None, DY.astype(int), "dy", {})),
    refused("conv2d", "x", itself(), ValueError, "x is not an array|x has dtype|expected x"),
    refused("conv2d", "x", [[1.0, 2.0], [3.0]], ValueError, "x is not an array"),
    refused("conv2d", "x", np.ma.array(X), TypeError, "masked array, whose mask would be lost"),
    refused("conv2d", "w", np.ma.array(W, mask=W > 1), TypeError, "masked array, whose mask would be lost"),
    refused("conv2d", "b", np.ma.array(B), TypeError, "masked array, whose mask would be lost"),
    refused("conv2d", "w", W.astype(ml_dtypes.bfloat16).astype(object), TypeError, FLOATS),
    refused("conv2d", "b", "bias", TypeError, FLOATS),
    refused("conv2d", "b", [1, 2, 3, 4], TypeError, "cast it first"),
    refused("conv2d", "b", True, TypeError, FLOATS),
    # ------------------------------------------------------------------------ ranks and sizes
    *(refused("conv2d", "x", value, ValueError, "do not go together; expected x") for value in (
        1.0, F(1), np.float64(math.nan), np.array(1.0, F), X[0, 0], X[None], [], 2.5,
    )),
    *(refused("conv2d", "x", np.zeros(shape, F), ValueError, "expected at least 1") for shape in (
        (2, 0, 6, 3), (2, 5, 0, 3), (0, 0, 0, 3), (2, 5, 6, 0),
    )),
    refused("conv2d", "w", np.zeros((0, 3, 2, 3), F), ValueError, "has 0 output channels"),
    refused("conv2d", "w", np.zeros((4, 0, 2, 3), F), ValueError, "the kernel has height 0"),
    refused("conv2d", "w", np.zeros((4, 3, 2, 0), F), ValueError, "w has 0 input channels"),
    refused("conv2d", "w", np.zeros((4, 6, 2, 3), F), ValueError, "spans 6 rows, but the padded input has only 5"),
    refused("conv2d", "b", B[:3], ValueError, r"b has shape \(3,\), expected \(4,\)"),
    refused("conv2d", "b", B[None], ValueError, r"b has shape \(1, 4\)"),
    refused("conv2d", "b", np.broadcast_to(F(1), (4, 1)), ValueError, r"b has shape \(4, 1\)"),
    refused("bias_grad", "dy", DY[None], ValueError, "dy has shape"),
    refused("bias_grad", "dy", DY[0, 0, 0], ValueError, "dy has shape"),
    refused("weight_grad", "dy", DY[:1], ValueError, r"expected \(2, 3, 5, 4\)"),
    refused("input_grad", "dy", DY[..., :3], ValueError, "w has 4 output channels, but dy has 3"),
    refused("conv2d", "x", HUGE, ValueError, "an array of more than"),
    # ------------------------------------------------------------------------ integers
    *(refused("conv2d", name, value, TypeError, f"{name} is .*, expected an integer")
      for name in ("stride", "dilation", "groups")
      for value in (math.nan, math.inf, 1.0, True, np.True_, "1", None, 1j, object(), np.float64(1), np.array(1.0),
                    np.array([1.0])[0], fractions.Fraction(1), b"1", {}, ...)),
    *(refused("conv2d", "stride", value, ValueError, "stride (is|has)") for value in (
        0, -1, (0, 1), (1, -1), [], (), (1, 1, 1), np.ones((3,), int), -(2**63), 2**31, 2**63, 2**64, 10**30,
        (1, 2**40), np.uint64(2**63),
    )),
    *(refused("conv2d", "stride", value, TypeError, "expected an integer") for value in (
        ((1, 1), (1, 1)), [[1], [2]], (1, None), (1, math.nan), np.ones((2, 2), int), (True, 1), [1, 2.0],
    )),
    *(refused("conv2d", "dilation", value, ValueError, "dilation is|the kernel spans") for value in (
        0, -3, 2**31, 10**20, 2**31 - 1, (2**31 - 1, 1), 4, (1, 100), 2**30,
    )),
    *(refused("conv2d", "groups", value, ValueError, "groups is|groups do not divide|w has 3 input channels")
      for value in (0, -1, 2, 3, 5, 2**31, 10**30)),
    refused("conv2d", "groups", (1, 1), TypeError, "expected an integer"),
    refused("conv2d", "stride", 10**5000, ValueError, "."),
    *(refused("conv2d", "padding", value, TypeError, "expected an integer") for value in (
        math.nan, 0.5, None, True, object(), (None, 1), ((0, 0.5), (0, 0)), {"top": 1}, np.zeros((2, 2)),
        ((True, 0), (0, 0)), 1j,
    )),
    *(refused("conv2d", "padding", value, ValueError, "padding (is|has)") for value in (
        -1, (0, -1), ((0, 0), (0, -1)), "SAME", "same ", "", "full", (1, 2, 3), (), ((1, 2), 3), ((1,), (2,)),
        ((1, 2), (3, 4), (5, 6)), 2**31, 10**20, [[1, 2], [3]],
    )),
    refused("conv2d", "padding", 2**31 - 1, ValueError, "an array of more than"),
    *(refused("weight_grad", "kernel_size", value, error, "kernel") for value, error in (
        (0, ValueError), (-1, ValueError), (1.5, TypeError), (math.nan, TypeError), ((1, 2, 3), ValueError),
        (True, TypeError), (2**31, ValueError), (7, ValueError), ("3", TypeError),
        ([0, None, 0, np.array([1, 2])], ValueError), ((np.ones(2), 1, 1, np.ones(2)), ValueError),
    )),
    *(refused("input_grad", "input_size", value, error, "input_size|dy has shape|the kernel spans|array of more")
      for value, error in (
        (0, ValueError), ((-5, 6), ValueError), (1.5, TypeError), ((5, math.nan), TypeError), (2, ValueError),
        ((6, 6), ValueError), ((5, 6, 3), ValueError), (2**31 - 1, ValueError), (2**62, ValueError),
    )),
    # ------------------------------------------------------------------------ strategies and flags
    *(refused("conv2d", "strategy", value, ValueError, "strategy") for value in (
        "", "LOOP", "loop ", (), ("auto",), "winograd", ("winograd", "depthwise"),
    )),
    *(refused("conv2d", "strategy", value, TypeError, "expected a name or a tuple of names") for value in (
        None, 1, ["loop"], ("loop", 1), b"loop", math.nan, {"loop"}, np.array(["loop"]),
    )),
    *(refused("weight_grad", "accumulate", value, TypeError, "expected True or False") for value in (
        1, 0, None, "yes", 1.0, math.nan, [], np.ones(2, bool),
    )),
    # ------------------------------------------------------------------------ out, with good inputs
    *(refused("conv2d", "out", value, TypeError, "out is an?|out has dtype") for value in (
        [], (), 0, "out", object(), DY.tolist(), np.ma.zeros(DY.shape, F), np.zeros(DY.shape), np.zeros(DY.shape, int),
        np.zeros(DY.shape, object), np.zeros(DY.shape, ">f4"), memoryview(bytearray(480)),
    )),
    *(refused("conv2d", "out", value, ValueError, "out (has shape|is read-only|must be C-contiguous)") for value in (
        np.zeros(0, F), np.zeros((), F), DY[0].copy(), DY[None].copy(), read_only(DY), np.asfortranarray(DY),
        np.zeros((2, 3, 5, 8), F)[..., ::2], np.zeros(DY.shape, F)[::-1], unaligned(DY),
        np.broadcast_to(F(1), DY.shape), np.lib.stride_tricks.as_strided(np.zeros(4, F), DY.shape, (0, 0, 0, 4)),
    )),
    # ------------------------------------------------------------------------ what NumPy would take, and so do we
    *(taken("conv2d", "x", value, X) for value in (
        X[::-1].copy()[::-1], np.asfortranarray(X), X.astype(">f4"), unaligned(X), read_only(X), X.view(Subclass),
        OnlyInterface(X), np.repeat(X, 2, 3)[..., ::2], memoryview(X), np.moveaxis(np.moveaxis(X, 3, 1).copy(), 1, 3),
    )),
    taken("conv2d", "x", np.broadcast_to(F(3), X.shape), np.full(X.shape, 3, F)),
    taken("conv2d", "x", np.full(X.shape, np.nan, F), np.full(X.shape, np.nan, F)),
    taken("conv2d", "b", B[::-1].copy()[::-1], B),
    taken("conv2d", "b", None, np.zeros(4, F)),
    *(taken("conv2d", "stride", value, 2) for value in (
        np.int8(2), np.uint64(2), np.array(2), Index(2), Two.TWO, (2, 2), [2, 2], np.array([2, 2]),
        (np.int32(2), Two.TWO),
    )),
    *(taken("conv2d", "padding", value, 1) for value in (
        (1, 1), [1, 1], ((1, 1), (1, 1)), [[1, 1], [1, 1]], np.ones((2, 2), int), np.int64(1), Index(1),
        np.array([1, 1]), [(1, 1), np.array([1, 1]).tolist()],
    )),
    taken("conv2d", "padding", "valid", 0),
    taken("conv2d", "groups", Index(1), 1),
    taken("conv2d", "groups", np.array(1), 1),
    taken("conv2d", "strategy", ("loop", "loop"), "loop"),
    taken("conv2d", "strategy", np.str_("loop"), "loop"),
    taken("weight_grad", "kernel_size", np.array([3, 2]), (3, 2)),
    taken("weight_grad", "accumulate", np.False_, False),
    taken("input_grad", "input_size", [5, Index(6)], (5, 6)),
    taken("bias_grad", "dy", np.asfortranarray(DY), DY),
]  # fmt: skip
REFUSED = [row for row in TABLE if row.error]
TAKEN = [row for row in TABLE if not row.error]


def test_the_table_is_a_table():
    """There is enough of it, and each function and argument is in it."""
    assert len(REFUSED) >= 80
    assert len(TAKEN) >= 20
    assert {row.function for row in REFUSED} == set(FUNCTIONS)
    assert {"x", "w", "b", "dy", "stride", "padding", "dilation", "groups", "strategy", "out"} <= {
        row.argument for row in REFUSED
    }


def seconds_of(call: Any) -> float:
    """Return how long the fastest of several calls takes to raise; the machine may be busy."""
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        with pytest.raises((ValueError, TypeError)):
            call()
        best = min(best, time.perf_counter() - start)
        if best < AT_ONCE:
            break
    return best


@pytest.mark.parametrize("row", REFUSED, ids=str)
def test_it_is_refused_at_once(row):
    """By the expected error and text, in less than a millisecond, with `out` as it was."""
    arguments = {**GOOD[row.function], row.argument: row.value}
    out = np.full(SHAPES[row.function], 7, F)
    if row.argument != "out":
        arguments["out"] = out

    def call() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            FUNCTIONS[row.function](**arguments)

    with pytest.raises(row.error, match=row.text) as caught:
        call()
    assert type(caught.value) is row.error
    assert str(caught.value).startswith(("conv2d: ", "conv2d_"))
    assert (out == 7).all()
    assert seconds_of(call) < AT_ONCE


@pytest.mark.parametrize("row", TAKEN, ids=str)
def test_it_is_taken_as_numpy_would(row):
    """The bits are those of the plain argument."""
    function, good = FUNCTIONS[row.function], {**GOOD[row.function], "strategy": "loop"}
    if row.function == "bias_grad":
        del good["strategy"]
    accumulate = {"out": np.zeros(SHAPES[row.function], F)} if row.argument == "accumulate" else {}
    got = function(**{**good, row.argument: row.value}, **accumulate).tobytes()
    assert got == function(**{**good, row.argument: row.same}).tobytes()


@pytest.mark.parametrize("kind", [Subclass, np.matrix, np.memmap], ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_out_of_a_subclass_is_filled(kind, tmp_path):
    """What is returned is `out` itself; a matrix, which knows two axes alone, works where the result has two."""
    expected = nc.conv2d(X[0, :, :, 0], W[0, :, :, 0])
    out: Any = np.zeros(expected.shape, F).view(kind) if kind is not np.memmap else None
    if out is None:
        out = np.memmap(tmp_path / "out", F, "w+", shape=expected.shape)
    assert nc.conv2d(X[0, :, :, 0], W[0, :, :, 0], out=out) is out
    np.testing.assert_array_equal(np.asarray(out), expected)


# ------------------------------------------------------------------------------------------------- fuzzing

numbers = st.one_of(
    st.integers(-3, 9), st.integers(-(2**65), 2**65), st.floats(), st.booleans(), st.none(), st.text(max_size=5),
    st.sampled_from([np.int8(1), np.uint64(2), np.float32(1), np.True_, np.array(1), np.array([1, 2]), Two.TWO]),
)  # fmt: skip
anything = st.recursive(numbers, lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner), max_leaves=6)
dtypes = st.sampled_from([F, F, np.float64, np.float16, ml_dtypes.bfloat16, np.int32, np.complex64, bool, object])
shapes = st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 6]), max_size=5).map(tuple)
arrays_of_any_kind = st.builds(np.zeros, shapes, dtypes)


def options() -> st.SearchStrategy[dict[str, Any]]:
    """Any of the options, each of any kind."""
    names = ("stride", "padding", "dilation", "groups", "strategy")
    mostly = st.one_of(st.integers(1, 3), anything)
    return st.fixed_dictionaries({}, optional=dict.fromkeys(names, mostly))


def outcome(function: Any, *arguments: Any, **more: Any) -> str:
    """Call; return what it says where it refuses. Nothing but a ValueError or TypeError of the package may come out."""
    try:
        function(*arguments, **more)
    except (ValueError, TypeError) as error:
        assert str(error).startswith(f"{function.__name__}: "), repr(error)  # noqa: PT017 - not every call raises
        return str(error)
    return ""


EXAMPLES = amount(150, 5000)


@pytest.mark.parametrize("function", [nc.conv2d, nc.conv2d_weight_grad, nc.conv2d_input_grad])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # NumPy's, of 65520 as a float16
@settings(max_examples=EXAMPLES)
@given(first=arrays_of_any_kind, second=arrays_of_any_kind, options=options(), third=st.none() | anything)
def test_any_arguments_are_taken_or_refused(function, first, second, options, third):
    """Whatever is passed, the answer is a result or an error of ours; `out` is untouched where it is an error."""
    outcome(function, first, second, third, **options)
    out = np.full((2, 2, 2, 2), 7, F)
    if outcome(function, first, second, third, **options, out=out):
        assert (out == 7).all()


@settings(max_examples=EXAMPLES)
@given(options=options(), x=shapes, w=shapes, pass_=st.sampled_from(["forward", "input_grad", "x", None]))
def test_any_plan_is_made_or_refused(options, x, w, pass_):
    """Plans know no arrays, so here the sizes are anything too."""
    outcome(nc.plan, pass_, x, w, **options)


@given(layer=st.text(alphabet="nhwcdksplgx0123456789-", max_size=24))
def test_any_text_is_a_layer_or_one_line_of_the_command(layer):
    """`nhwconv compare --layer TEXT` ends with exit code 2 and one line, or the text is a layer."""
    try:
        parse_layer(layer)
    except ValueError:
        result = CliRunner().invoke(app, ["compare", "--layer", layer, "--seconds", "0.001"])
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit)


def test_integers_too_long_to_print_are_refused_in_words():
    """Python refuses to print them; the message says what it can."""
    assert sys.get_int_max_str_digits() < 5000
    with pytest.raises(ValueError, match=r"^conv2d: stride is an integer of 16610 bits, expected at most"):
        nc.conv2d(X, W, stride=10**5000)
    with pytest.raises(ValueError, match=r"^conv2d: b is an integer of 16610 bits, which float32 cannot hold"):
        nc.conv2d(X, W, 10**5000)
