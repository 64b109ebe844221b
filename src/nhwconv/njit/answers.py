"""Python's side of calls from compiled code: the checks, plans and words of the public functions.

This is all that knows the inside of `nhwconv.ops`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import checks, ops, planning
from ..checks import Options, words_of
from ..problem import ConvProblem
from ..program import Program
from ..runtime.arrays import Array
from . import layout, table
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
)

__all__ = ["serve"]

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
        self.function: int = self.words[FUNCTION]
        self.accumulate = bool(self.words[FLAGS] & ACCUMULATE)
        self.needs = tuple(n for n, flag in (("dx", DX), ("dw", DW), ("db", DB)) if self.words[FLAGS] & flag)

    def array(self, name: str) -> Array | None:
        """Return an array as the caller has it, None where there is none."""
        block = BLOCKS + ARRAYS.index(name) * BLOCK
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

    def given(self, *names: str) -> dict[str, Array]:
        """Return those of some arrays that there are."""
        found = ((name, self.array(name)) for name in names)
        return {name: array for name, array in found if array is not None}

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
        top, bottom, left, right = self.words[PADDING : PADDING + 4]
        padding = self.text(TEXT_OF_PADDING) if self.words[PADDING_TEXT] else ((top, bottom), (left, right))
        stride, dilation = tuple(self.words[STRIDE : STRIDE + 2]), tuple(self.words[DILATION : DILATION + 2])
        return Options.of(stride, padding, dilation, self.words[GROUPS])

    @property
    def strategy(self) -> str | tuple[str, ...]:
        """A name, or some of them."""
        text = self.text(TEXT_OF_STRATEGY)
        return tuple(text.split(SEPARATOR)[:-1]) if text.endswith(SEPARATOR) else text

    @property
    def size(self) -> tuple[int, int] | None:
        """Of a kernel or an input."""
        return tuple(self.words[SIZE : SIZE + 2]) if self.words[SIZED] else None

    @property
    def operands(self) -> dict[str, int]:
        """The addresses of what a program works on."""
        return {name: self.words[OPERANDS + i] for i, name in enumerate(ARRAYS) if self.words[OPERANDS + i]}


# ------------------------------------------------------------------------------------- the public functions


def _answer(
    problem: ConvProblem, program: Callable[[], Program], results: list[Shape], accumulate: bool = False
) -> Answer:
    x, w, y, d = problem.x_shape, problem.w_shape, problem.y_shape, (problem.d,)
    arrays = {"x": x, "w": w, "b": d, "y": y, "dy": y, "dx": x, "dw": w, "db": d}
    return Answer(program() if problem.n else None, arrays, problem.dtype, results, accumulate)


def _check_out(q: Question, name: str, shape: Shape, dtype: np.dtype[Any], inputs: dict[str, Array]) -> None:
    out = q.array(name)
    if out is not None:
        checks.as_out("out", out, shape, dtype, inputs)


def _conv2d(q: Question) -> Answer:
    inputs = q.given("x", "w", "b")
    x, w = inputs["x"], inputs["w"]
    dtype = checks.common_dtype(**inputs)
    plan = ops._plan("forward", x.shape, w.shape, dtype, q.options, q.strategy)
    if "b" in inputs:
        checks.check_bias(inputs["b"], plan.form.b)
    _check_out(q, "y", plan.form.y, dtype, inputs)
    return _answer(plan.problem, lambda: plan.program("b" in inputs), [plan.form.y])


def _conv2d_weight_grad(q: Question) -> Answer:
    inputs = q.given("x", "dy")
    x, dy, out = inputs["x"], inputs["dy"], q.array("dw")
    checks.check_accumulate(q.accumulate, out)
    dtype = checks.common_dtype(**inputs)
    options = q.options
    sizes = checks.kernel_size_key(q.size, None if out is None else out.shape)
    plan = ops._weight_grad_plan(x.shape, dy.shape, dtype, options, sizes, q.strategy)
    _check_out(q, "dw", plan.form.w, dtype, inputs)
    return _answer(plan.problem, lambda: plan.program(False, q.accumulate), [plan.form.w], q.accumulate)


def _conv2d_bias_grad(q: Question) -> Answer:
    inputs = q.given("dy")
    dy, out = inputs["dy"], q.array("db")
    if dy.ndim not in (2, 3, 4):
        checks.fail(f"dy has shape {dy.shape}, expected (N, OH, OW, D), (OH, OW, D) or (OH, OW)")
    checks.check_accumulate(q.accumulate, out)
    shape = dy.shape[-1:] if dy.ndim > 2 else ()
    _check_out(q, "db", shape, dy.dtype, inputs)
    d = dy.shape[-1] if dy.ndim > 2 else 1
    pixels = dy.size // d if d else 0
    program = planning.bias_program(pixels, d, dy.dtype, q.accumulate) if pixels else None
    return Answer(program, {"dy": (pixels, d), "db": (d,)}, dy.dtype, [shape], q.accumulate)


def _conv2d_input_grad(q: Question) -> Answer:
    inputs = q.given("dy", "w")
    dy, w, out, size = inputs["dy"], inputs["w"], q.array("dx"), q.size
    dtype = checks.common_dtype(**inputs)
    if size is None and out is not None and out.ndim == {4: 4, 3: 3}.get(dy.ndim, w.ndim):
        size = out.shape[1:3] if out.ndim == 4 else out.shape[:2]
    sizes = None if size is None else checks.pair("input_size", size, 1)
    plan = ops._input_grad_plan(dy.shape, w.shape, dtype, q.options, sizes, q.strategy)
    _check_out(q, "dx", plan.form.x, dtype, inputs)
    return _answer(plan.problem, plan.program, [plan.form.x])


def _conv2d_backward(q: Question) -> Answer:
    inputs = q.given("x", "w", "dy")
    x, w, dy = inputs["x"], inputs["w"], inputs["dy"]
    outs = q.given("dx", "dw", "db")
    for name in outs:
        if name not in q.needs:
            checks.fail(f"out.{name} is given, but {name} is not in needs")
    for name in ("dw", "db"):
        if name in q.needs:
            checks.check_accumulate(q.accumulate, outs.get(name), f"out.{name}")
    dtype = checks.common_dtype(**inputs)
    options = q.options
    plan = ops.backward_plan(x.shape, w.shape, dtype, options, q.needs, q.strategy)
    checks.check_dy(dy.shape, plan.dy, options.layout)
    for name in q.needs:
        if name in outs:
            checks.as_out(f"out.{name}", outs[name], plan.shapes[name], dtype, inputs)
            inputs[f"out.{name}"] = outs[name]
    shapes = [plan.shapes[name] for name in ("dx", "dw", "db")]
    return _answer(plan.problem, lambda: plan.program(q.accumulate), shapes, q.accumulate)


_FUNCTIONS: dict[int, Callable[[Question], Answer]] = {
    layout.FORWARD: _conv2d,
    layout.WEIGHT_GRAD: _conv2d_weight_grad,
    layout.BIAS_GRAD: _conv2d_bias_grad,
    layout.INPUT_GRAD: _conv2d_input_grad,
    layout.BACKWARD: _conv2d_backward,
}

# --------------------------------------------------------------------------------------------- requests

ops.forgetting.append(table.clear)


def _plan(question: int) -> int:
    """Check a question and plan; return the entry."""
    q = Question(question)
    function = _FUNCTIONS[q.function]
    with words_of(function.__name__[1:]):
        answer = function(q)
    program = answer.program
    native = program if program is not None and program.native else None
    return table.insert(q.words, native, answer.results, answer)


def _perform(question: int, entry: int) -> int:
    """Run what compiled code cannot."""
    table.known(entry).perform(Question(question).operands)
    return 0


def serve(version: int, request: int, question: int, entry: int) -> int:
    """Answer compiled code."""
    if version != layout.VERSION:
        raise RuntimeError(
            f"nhwconv: this function was compiled with another version of nhwconv (layout {version}, this one has "
            f"{layout.VERSION}); delete what Numba kept of it, in __pycache__ beside its file"
        )
    if request == layout.STATE:
        return table.state()
    return _plan(question) if request == layout.PLAN else _perform(question, entry)
