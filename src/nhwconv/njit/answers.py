"""Python's side of calls from compiled code: the checks, plans and words of the public functions, and of plans."""

from __future__ import annotations

import ctypes
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import checks, ops, planning
from ..checks import Options, words_of
from ..layouts import IMAGES, WEIGHTS, Layout
from ..planning import Backward, Plan
from ..program import Program
from ..runtime.arrays import Array
from ..runtime.jit import compiler_lock
from . import layout, table
from .functions import FUNCTIONS, PLANS, Function
from .layout import (
    ACCUMULATE,
    ARRAYS,
    AXES_SHIFT,
    BLOCK,
    BLOCKS,
    CODE,
    DATA,
    DB,
    DILATION,
    DW,
    DX,
    FLAGS,
    FUNCTION,
    GROUPS,
    IMAGES_SHIFT,
    ITEMSIZE_SHIFT,
    OPERANDS,
    PADDING,
    PADDING_TEXT,
    READ_ONLY,
    SEPARATOR,
    SHAPE,
    SIZE,
    SIZED,
    STRIDE,
    STRIDES,
    TEXT_OF_PADDING,
    TEXT_OF_STRATEGY,
    WEIGHTS_SHIFT,
)

__all__ = ["number", "plans", "serve"]

Shape = tuple[int, ...]


class Answer(NamedTuple):
    """What a question's plan comes to.

    Attributes
    ----------
    program : Program or None
        What runs; None for an empty batch.
    arrays : dict
        The shapes of its arrays, as programs want them, and their dtype.
    results : list of tuple
        The shapes of the results, as the caller gets them.
    accumulate : bool
        Whether they are added to.
    """

    program: Program | None
    arrays: dict[str, Shape]
    dtype: np.dtype[Any]
    results: list[Shape]
    accumulate: bool

    def perform(self, operands: dict[str, int]) -> None:
        """Compute, on arrays at these addresses."""
        named = {}
        for name, address in operands.items():
            named[name] = _at(address, self.arrays[name], self.dtype, None)
        if self.program is not None:
            planning.execute(self.program, **named)
        elif not self.accumulate:
            for name in named.keys() & {"dw", "db"}:
                named[name][...] = 0


def _at(address: int, shape: Shape, dtype: np.dtype[Any], strides: Shape | None) -> Array:
    """Return the array that lies at an address; C-contiguous where strides are not given."""
    if 0 in shape or not address:
        return np.zeros(shape, dtype)
    if strides is None:
        strides = tuple(dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    reach = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    first = sum(min(r, 0) for r in reach)
    last = sum(max(r, 0) for r in reach) + dtype.itemsize
    memory = (ctypes.c_char * (last - first)).from_address(address + first)
    return np.ndarray(shape, dtype, memory, -first, strides)  # type: ignore[arg-type]  # it is a buffer


class Question:
    """What compiled code asks, as Python has it."""

    def __init__(self, address: int) -> None:
        self.words: Any = (ctypes.c_int64 * layout.QUESTION).from_address(address)
        name = layout.FUNCTIONS[self.words[FUNCTION]]
        self.plan = plans[self.words[SIZE]] if name == "plan" else None
        self.function: Function = FUNCTIONS[name] if self.plan is None else PLANS[self.plan.pass_]
        self.accumulate = bool(self.words[FLAGS] & ACCUMULATE)
        self.needs = tuple(n for n, flag in (("dx", DX), ("dw", DW), ("db", DB)) if self.words[FLAGS] & flag)

    def array(self, name: str) -> Array | None:
        """Return an array as the caller has it, None where there is none."""
        block = BLOCKS + self.function.role(name) * BLOCK
        code = self.words[block + CODE]
        if not code:
            return None
        axes = (code >> AXES_SHIFT) & 0xF
        shape = tuple(self.words[block + SHAPE : block + SHAPE + axes])
        strides = tuple(self.words[block + STRIDES : block + STRIDES + axes])
        dtype = np.dtype(f"f{(code >> ITEMSIZE_SHIFT) & 0xFF}")
        found = _at(self.words[block + DATA], shape, dtype, strides)
        if code & READ_ONLY:
            found.flags.writeable = False
        return found

    def arrays(self) -> Any:
        """Return the inputs, in the order in which the function takes them."""
        return [self.array(name) for name in self.function.inputs]

    def text(self, at: int) -> str:
        """Return a text; Python's strings have one, two or four bytes a character, as the last of them needs."""
        address, count, size = self.words[at : at + 3]
        encoding = {1: "latin-1", 2: "utf-16", 4: "utf-32"}[size]
        if size > 1:
            encoding += "-le" if np.little_endian else "-be"
        return ctypes.string_at(address, count * size).decode(encoding, "surrogatepass")

    @property
    def options(self) -> Options:
        """Stride, padding, dilation and groups, checked."""
        one = self.function.dimensions == 1
        top, bottom, left, right = self.words[PADDING : PADDING + 4]
        padding: Any = (top, left) if one else ((top, bottom), (left, right))
        if self.words[PADDING_TEXT]:
            padding = self.text(TEXT_OF_PADDING)
        stride, dilation = tuple(self.words[STRIDE : STRIDE + 2]), tuple(self.words[DILATION : DILATION + 2])
        if one:
            stride, dilation = stride[1:], dilation[1:]
        more: Any = self.size if self.function.exchanged else None
        if more is not None and one:
            more = more[1:]
        return Options.of(stride, padding, dilation, self.words[GROUPS], self.layout, more)

    @property
    def layout(self) -> Layout:
        """The order of axes."""
        flags, weights = self.words[FLAGS], self.words[FLAGS] >> WEIGHTS_SHIFT & 0xF
        images = IMAGES[flags >> IMAGES_SHIFT & 0xF]
        return checks.as_layout(images, WEIGHTS[weights - 1] if weights else None, self.function.dimensions)

    @property
    def strategy(self) -> str | tuple[str, ...]:
        """A name, or some of them."""
        text = self.text(TEXT_OF_STRATEGY)
        return tuple(text.split(SEPARATOR)[:-1]) if text.endswith(SEPARATOR) else text

    @property
    def size(self) -> tuple[int, int] | None:
        """Of a kernel or an input, or an output padding."""
        return tuple(self.words[SIZE : SIZE + 2]) if self.words[SIZED] else None

    @property
    def operands(self) -> dict[str, int]:
        """The addresses of what a program works on."""
        return {name: self.words[OPERANDS + i] for i, name in enumerate(ARRAYS) if self.words[OPERANDS + i]}


# ----------------------------------------------------------------------------------------------- answers


def _answer(plan: Plan | Backward, program: Callable[[], Program], results: list[Shape], accumulate: bool) -> Answer:
    problem = plan.problem
    x, w, y = problem.x_shape, problem.w_shape, problem.y_shape
    arrays = {"x": x, "w": w, "y": y, "dy": y, "dx": x, "dw": w}
    bias = {"b": plan.form.b, "db": plan.form.b}
    return Answer(program() if problem.n else None, arrays | bias, problem.dtype, results, accumulate)


def _pass(plan: Plan, inputs: dict[str, Array], accumulate: bool = False) -> Answer:
    return _answer(plan, lambda: plan.program("b" in inputs, accumulate), [plan.result_shape], accumulate)


def _forward(q: Question) -> Answer:
    make = ops.transposed_plan if q.function.exchanged else ops.forward_plan
    x, w, b = q.arrays()
    return _pass(*ops.check_forward(make, x, w, b, q.options, q.strategy, q.array("y")))


def _weight_grad(q: Question) -> Answer:
    x, dy = q.arrays()
    checked = ops.check_weight_grad(x, dy, q.size, q.options, q.strategy, q.array("dw"), q.accumulate)
    return _pass(*checked, q.accumulate)


def _bias_grad(q: Question) -> Answer:
    dy, shape, program = ops.check_bias_grad(q.array("dy"), q.layout, q.array("db"), q.accumulate)
    return Answer(program, {"dy": dy.shape, "db": shape}, dy.dtype, [shape], q.accumulate)


def _input_grad(q: Question) -> Answer:
    dy, w = q.arrays()
    return _pass(*ops.check_input_grad(dy, w, q.size, q.options, q.strategy, q.array("dx")))


def _backward(q: Question) -> Answer:
    make = ops.transposed_backward_plan if q.function.exchanged else ops.backward_plan
    x, w, dy = q.arrays()
    out = ops.Gradients(*map(q.array, q.function.results))
    checked = ops.check_backward(make, x, w, dy, q.needs, q.options, q.strategy, out, q.accumulate)
    plan = checked[0]
    shapes = [plan.shapes[name] for name in q.function.results]
    return _answer(plan, lambda: plan.program(q.accumulate), shapes, q.accumulate)


def _called(q: Question) -> Answer:
    assert q.plan is not None
    first, second, b = q.arrays()
    inputs = q.plan.check(first, second, b, q.array(q.function.results[0]), q.accumulate)
    return _pass(q.plan, inputs, q.accumulate)


_ANSWERS: dict[tuple[str, ...], Callable[[Question], Answer]] = {
    ("y",): _forward,
    ("dw",): _weight_grad,
    ("db",): _bias_grad,
    ("dx",): _input_grad,
    ("dx", "dw", "db"): _backward,
}

# ----------------------------------------------------------------------------------------------- plans

#: Plans that compiled code has had, by their numbers; 0 is none.
plans: dict[int, Plan] = {}
_numbers: dict[Plan, int] = {}


def number(plan: Plan) -> int:
    """Return the number of a plan; those that are equal have one."""
    with compiler_lock:
        found = _numbers.setdefault(plan, len(_numbers) + 1)
        plans.setdefault(found, plan)
    return found


# --------------------------------------------------------------------------------------------- requests

ops.forgetting.append(table.clear)


def _plan(question: int) -> int:
    """Check a question and plan; return the entry."""
    q = Question(question)
    with words_of(q.function.name):
        answer = (_ANSWERS[q.function.results] if q.plan is None else _called)(q)
    program = answer.program
    native = program if program is not None and program.native else None
    return table.insert(q.words, native, answer.results, answer)


def serve(version: int, request: int, question: int, entry: int) -> int:
    """Answer compiled code."""
    if version != layout.VERSION:
        raise RuntimeError(
            f"nhwconv: this function was compiled with another version of nhwconv (layout {version}, this one has "
            f"{layout.VERSION}); delete what Numba kept of it, in __pycache__ beside its file"
        )
    if request == layout.STATE:
        return table.state()
    if request == layout.NUMBER:
        return number(pickle.loads(ctypes.string_at(question, entry)))
    if request == layout.PLAN:
        return _plan(question)
    table.known(entry).perform(Question(question).operands)
    return 0
