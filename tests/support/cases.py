"""Convolutions to test: a record of one, random ones, and their arrays and exact results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import hypothesis.strategies as st
import numpy as np

import nhwconv as nc
import oracle
from nhwconv.problem import ConvProblem
from nhwconv.strategies import REGISTRY

#: Around one and two vectors of float64 and float32 lanes, for every width from SSE to AVX-512, and around a panel.
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65)
PASSES = ("forward", "weight_grad", "input_grad")
DTYPES = (np.float32, np.float64)


@dataclass(frozen=True)
class Case:
    """One batched convolution."""

    n: int = 2
    h: int = 5
    w: int = 7
    c: int = 3
    d: int = 4
    kh: int = 3
    kw: int = 3
    stride: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that every function takes."""
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self.n, self.h, self.w, self.c

    @property
    def w_shape(self) -> tuple[int, ...]:
        return self.d, self.kh, self.kw, self.c // self.groups

    @property
    def y_shape(self) -> tuple[int, ...]:
        oh = oracle.output_size(self.h, self.kh, self.stride[0], self.padding[0], self.dilation[0])
        ow = oracle.output_size(self.w, self.kw, self.stride[1], self.padding[1], self.dilation[1])
        return self.n, oh, ow, self.d

    @property
    def output_padding(self) -> tuple[int, ...]:
        """What a transposed convolution of arrays like y lacks, in rows and columns, to be like x."""
        found = []
        for axis, kernel in enumerate((self.kh, self.kw)):
            reach = self.dilation[axis] * (kernel - 1) + 1
            smallest = (self.y_shape[1 + axis] - 1) * self.stride[axis] + reach - sum(self.padding[axis])
            found.append(self.x_shape[1 + axis] - smallest)
        return tuple(found)

    def shape(self, pass_: str) -> tuple[int, ...]:
        """The shape of a pass's result."""
        return {"forward": self.y_shape, "weight_grad": self.w_shape, "input_grad": self.x_shape}[pass_]

    def length(self, pass_: str) -> int:
        """How many products are summed into one element of a pass's result."""
        if pass_ == "forward":
            return self.kh * self.kw * self.c // self.groups
        if pass_ == "weight_grad":
            return self.n * self.y_shape[1] * self.y_shape[2]
        return self.kh * self.kw * self.d // self.groups

    def __str__(self) -> str:
        default = asdict(Case())
        text = f"x{self.n}x{self.h}x{self.w}x{self.c}-w{self.d}x{self.kh}x{self.kw}"
        for name, letter in (("stride", "s"), ("padding", "p"), ("dilation", "l"), ("groups", "g")):
            value = getattr(self, name)
            if value != default[name]:
                text += f"-{letter}{value}".replace(" ", "").replace("(", "").replace(")", "").replace(",", ".")
        return text


def make_case(integer: Callable[[int, int], int], choice: Callable[[Sequence[Any]], Any]) -> Case:
    """Make a random case from a source of integers and a source of choices.

    Sizes follow from the output's, so that rows of 1 to 18 outputs, around every register tile, are equally likely.
    """
    kind = choice(("dense", "dense", "groups", "depthwise", "wide", "wide"))
    kernel = choice((1, 1, 2, 3, 3, 4, 5, 7)), choice((1, 1, 2, 3, 3, 4, 5, 7))
    stride = choice((1, 1, 1, 2, 2, 3, 4, 6)), choice((1, 1, 1, 2, 2, 3, 4, 6))
    dilation = choice((1, 1, 1, 2, 3, 4)), choice((1, 1, 1, 2, 3, 4))
    groups, outputs = 1, (integer(1, 5), integer(1, choice((18, 18, 18, 70))))
    if kind == "wide":  # what Winograd takes: often with tiles of a few sizes, as each has code of its own
        stride, groups = choice(((1, 1), (1, 1), stride)), choice((1, 1, 2))
        kernel = choice(((3, 3), (3, 3), (3, 3), (2, 2), (5, 5), kernel))
        outputs = choice(((3, 4), (4, 8), (5, 6), (7, 8), (12, 15), outputs))
    if kind == "groups":
        groups = integer(2, 5)
    if kind == "depthwise":
        groups = choice(CHANNELS)
        c, d = groups, groups * integer(1, 3)
    else:
        some = {"dense": CHANNELS, "groups": CHANNELS[:13], "wide": CHANNELS[10:]}[kind]
        c, d = groups * choice(some), groups * choice(some)
    most = choice((0, 0, 1, 2, 3, 7))
    padding = tuple((integer(0, most), integer(0, most)) for _ in range(2))
    sizes = []
    for axis, out in enumerate(outputs):
        size = (out - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1 - sum(padding[axis])
        sizes.append(max(1, size) + integer(0, stride[axis] - 1))
    n = choice((0, 1, 1, 2, 2, 3))
    return Case(n, *sizes, c, d, *kernel, stride, padding, dilation, groups)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any convolution."""
    return make_case(lambda low, high: draw(st.integers(low, high)), lambda s: draw(st.sampled_from(s)))


def random_case(rng: np.random.Generator) -> Case:
    """Any convolution, from NumPy's generator."""
    return make_case(lambda low, high: int(rng.integers(low, high + 1)), lambda s: s[rng.integers(len(s))])


class Data(NamedTuple):
    """Standard-normal arrays for a case."""

    x: np.ndarray
    w: np.ndarray
    b: np.ndarray
    dy: np.ndarray


def draw_data(case: Case, dtype: Any, seed: int = 0) -> Data:
    """Return arrays for a case."""
    rng = np.random.default_rng(seed)
    shapes = case.x_shape, case.w_shape, (case.d,), case.y_shape
    return Data(*(rng.standard_normal(shape).astype(dtype) for shape in shapes))


def exact(case: Case, data: Data, pass_: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the oracle's result of a pass (forward without bias), and its sum of absolute values."""
    if pass_ == "forward":
        return oracle.with_absolute(oracle.forward, data.x, data.w, **case.options)
    if pass_ == "weight_grad":
        return oracle.with_absolute(oracle.weight_grad, data.x, data.dy, kernel=(case.kh, case.kw), **case.options)
    return oracle.with_absolute(oracle.input_grad, data.dy, data.w, size=(case.h, case.w), **case.options)


@cache
def data_of(case: Case, dtype: Any) -> Data:
    """Return a case's arrays; the same ones each time."""
    data = draw_data(case, dtype)
    for array in data:
        array.flags.writeable = False
    return data


@cache
def exact_of(case: Case, dtype: Any, pass_: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact result of a pass on `data_of` a case."""
    return exact(case, data_of(case, dtype), pass_)


def run(case: Case, data: Data, pass_: str, strategy: str, **options: Any) -> np.ndarray:
    """Run one pass through the public functions."""
    if pass_ == "forward":
        return nc.conv2d(data.x, data.w, **case.options, strategy=strategy, **options)
    if pass_ == "weight_grad":
        return nc.conv2d_weight_grad(data.x, data.dy, (case.kh, case.kw), **case.options, strategy=strategy, **options)
    return nc.conv2d_input_grad(data.dy, data.w, (case.h, case.w), **case.options, strategy=strategy, **options)


def problem_of(case: Case, dtype: Any = np.float32) -> ConvProblem:
    """Return the package's own record of a case."""
    return nc.plan("forward", case.x_shape, case.w_shape, dtype=dtype, **case.options, strategy="tensordot").problem


def refusal(case: Case, pass_: str, strategy: str, dtype: Any = np.float32) -> str | None:
    """Return why a strategy cannot do a pass of a case; None where it can."""
    return REGISTRY[strategy].supports(problem_of(case, dtype), pass_)


def supporting(case: Case, *passes: str, dtype: Any = np.float32) -> list[str]:
    """Return the strategies that can do these passes of a case."""
    return [name for name in REGISTRY if all(refusal(case, p, name, dtype) is None for p in passes)]


#: Everything at once, and for the strategies that do not take that: one convolution a channel, and many channels.
TYPICAL = (
    Case(n=2, h=7, w=9, c=6, d=8, kh=3, kw=2, stride=(1, 2), padding=((1, 0), (2, 1)), groups=2),
    Case(n=2, h=7, w=9, c=6, d=12, kh=3, kw=2, stride=(1, 2), padding=((1, 0), (2, 1)), groups=6),
    Case(n=2, h=13, w=11, c=34, d=38, padding=((2, 0), (1, 1)), groups=2),
)


def typical(strategy: str, *passes: str, dtype: Any = np.float32) -> Case:
    """Return a case that a strategy can do; every strategy must be able to do one of them."""
    return next(c for c in TYPICAL if strategy in supporting(c, *passes, dtype=dtype))
