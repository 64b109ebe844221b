"""Half types: stored as float16 or bfloat16, computed and accumulated in float32, strip by strip.

A strip (`ConvProblem.strips`) is a smaller problem in float32. Its program runs between steps that widen what it reads
and round what it writes, so every strategy serves half types without knowing of them, and no call ever holds a whole
array twice. Conversions are integer arithmetic, right on any processor: to the nearest, ties to even.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from ..codegen.simd import at, fill_zero, integers, numbers
from ..problem import ConvProblem, Pass, Strip, name_of
from ..program import AnyStep, Call, Part, Place, Program, Step, places
from ..runtime.arrays import Array, values_are_data
from ..runtime.jit import Body, ceil_div, device
from ..runtime.records import Record, record
from .base import Strategy, Wanted
from .bias import column_steps

__all__ = ["bias_program", "program", "program_without_compiler", "round_numbers", "widen"]

#: Elements of x and y together that a strip converts at a time: 16 MiB in float32.
STRIP = 4 * 2**20
#: Elements of a task.
BLOCK = 32 * 1024

_FLOAT32 = np.dtype(np.float32)

# ------------------------------------------------------------------------------------------- conversions


def _cast(bits, number):
    @intrinsic
    def cast(typingctx, value):
        def codegen(context, builder, sig, args):
            return builder.bitcast(args[0], context.get_value_type(sig.return_type))

        return number(bits), codegen

    return cast


_bits32, _number32 = _cast(types.float32, types.uint32), _cast(types.uint32, types.float32)


@device
def _widen_float16(h):
    """Return the float32 of a float16, both as their bits; exact."""
    sign, magnitude = np.uint32(h & 0x8000) << np.uint32(16), np.uint32(h & 0x7FFF)
    # Shifted to float32's place, the exponent is too small by 112, also that of a subnormal number.
    number = _bits32(_number32(np.uint32(magnitude << np.uint32(13))) * _number32(np.uint32(0x77800000)))
    infinite = np.uint32(magnitude << np.uint32(13)) | np.uint32(0x7F800000)
    return sign | (infinite if magnitude >= 0x7C00 else number)


@device
def _round_float16(f):
    """Return the float16 nearest to a float32, both as their bits."""
    sign, f = np.uint32(f & np.uint32(0x80000000)), np.uint32(f & np.uint32(0x7FFFFFFF))
    if f >= 0x47800000:  # too large, infinite or NaN
        h = np.uint32(0x7C00) if f <= 0x7F800000 else np.uint32(0x7E00)
    elif f < 0x38800000:  # below the smallest normal number: the sum with 0.5 has its last place where it is needed
        h = np.uint32(_bits32(_number32(f) + np.float32(0.5)) - np.uint32(0x3F000000))
    else:
        odd = (f >> np.uint32(13)) & np.uint32(1)
        h = np.uint32((f + np.uint32(0xC8000FFF) + odd) >> np.uint32(13)) & np.uint32(0xFFFF)
    return np.uint16((sign >> np.uint32(16)) | h)


@device
def _widen_bfloat16(h):
    """Return the float32 of a bfloat16, both as their bits; exact."""
    return np.uint32(h) << np.uint32(16)


@device
def _round_bfloat16(f):
    """Return the bfloat16 nearest to a float32, both as their bits."""
    if np.uint32(f & np.uint32(0x7FFFFFFF)) > 0x7F800000:
        return np.uint16((f >> np.uint32(16)) | np.uint32(0x40))
    odd = (f >> np.uint32(16)) & np.uint32(1)
    return np.uint16((f + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@device
def _to_odd(x):
    """Return the bits of the float32 next to a float64, with the last one set where it is not exact.

    Rounded once more, to fewer places, it gives what rounding the float64 at once would have given.
    """
    f = np.float32(x)
    bits = _bits32(f)
    if np.float64(f) == x:
        return bits
    return np.uint32(bits - np.uint32(1) if abs(np.float64(f)) > abs(x) else bits) | np.uint32(1)


_WIDEN = {"float16": _widen_float16, "bfloat16": _widen_bfloat16}
_ROUND = {"float16": _round_float16, "bfloat16": _round_bfloat16}


class Numbers(Record):
    """So many numbers of each image, and from one image to the next in what is read and in what is written."""

    count: int
    source: int
    target: int


@device
def _block(geometry, task):
    """Decode a task, a block of an image: where it is read and written, and its numbers."""
    g = record(geometry, 0, Numbers)
    blocks = ceil_div(g.count, BLOCK)
    image, first = task // blocks, task % blocks * BLOCK
    return image * g.source + first, image * g.target + first, min(BLOCK, g.count - first)


@cache
def widen(NAME: str) -> Body:
    """Make the body that converts half numbers to float32; it takes them and the target."""
    convert = _WIDEN[NAME]

    def widen(operands, geometry, worker, task, fresh):
        table = integers(operands)
        read, written, count = _block(geometry, task)
        source, target = at(numbers(table[0], 2), read), at(numbers(table[1], 4), written)
        for i in range(count):
            target[i] = _number32(convert(source[i]))

    return Body(widen)


@cache
def round_numbers(NAME: str, ITEMSIZE: int) -> Body:
    """Make the body that rounds float32, or float64, to half numbers; it takes them and the target."""
    convert, narrowed = _ROUND[NAME], _bits32 if ITEMSIZE == 4 else _to_odd

    def round_numbers(operands, geometry, worker, task, fresh):
        table = integers(operands)
        read, written, count = _block(geometry, task)
        source, target = at(numbers(table[0], ITEMSIZE), read), at(numbers(table[1], 2), written)
        for i in range(count):
            target[i] = convert(narrowed(source[i]))

    return Body(round_numbers)


@cache
def _zeros() -> Body:
    def zeros(operands, geometry, worker, task, fresh):
        _, written, count = _block(geometry, task)
        fill_zero(at(numbers(integers(operands)[0], 4), written), count)

    return Body(zeros)


# ------------------------------------------------------------------------------------------------- steps


def _step(body: Body, count: int, *operands: str | Part | Place) -> Step:
    g = Numbers(count=count, source=0, target=0)
    return Step(body, (g,), math.ceil(count / BLOCK), places(*operands))


class _Rows:
    """Some images of a half array, or some rows of each, and the float32 part that holds them."""

    def __init__(self, name: str, array: str, shape: tuple[int, ...], part: Part) -> None:
        self.name, self.array, self.shape, self.part = name, array, shape, part

    def _step(self, body: Body, where: tuple[slice, slice], widens: bool) -> Step:
        images, rows = where
        n, h, row = self.shape[0], self.shape[1], math.prod(self.shape[2:])
        first, last, _ = rows.indices(h)
        start, stop, _ = images.indices(n)
        count, whole = (last - first) * row, h * row
        place = Place(self.array, 2 * (start * whole + first * row))
        source, target = (whole, count) if widens else (count, whole)
        g = Numbers(count=count, source=source, target=target)
        operands = (place, self.part) if widens else (self.part, place)
        return Step(body, (g,), (stop - start) * math.ceil(count / BLOCK), places(*operands))

    def widened(self, where: tuple[slice, slice]) -> Step:
        """Return the step that brings them into the part."""
        return self._step(widen(self.name), where, True)

    def rounded(self, where: tuple[slice, slice]) -> Step:
        """Return the step that brings the part back."""
        return self._step(round_numbers(self.name, 4), where, False)


# ---------------------------------------------------------------------------------------------- programs


def program(strategy: Strategy, fallback: Strategy, problem: ConvProblem, pass_: Pass, wanted: Wanted) -> Program:
    """Return a pass of a half problem: that of each strip, by the strategy or, where that cannot do it, the other."""
    single = replace(problem, dtype=_FLOAT32)
    strips = list(single.strips(pass_, STRIP))
    made: dict[ConvProblem, Program] = {}
    inner = Wanted(wanted.bias and pass_ != "weight_grad", pass_ == "weight_grad", wanted.workers, wanted.weights)
    for strip in strips:
        if strip.problem not in made:
            able = strategy if strategy.supports(strip.problem, pass_) is None else fallback
            made[strip.problem] = able.program(strip.problem, pass_, inner)
    if pass_ == "weight_grad":
        steps = list(_weight_grad(problem, strips, made, wanted))
    else:
        steps = list(_correlation(problem, pass_, strips, made, wanted))
    extra = max(p.extra for p in made.values())
    return Program(tuple(steps), wanted.workers, extra)


def program_without_compiler(strategy: Strategy, problem: ConvProblem, pass_: Pass, wanted: Wanted) -> Program:
    """Return a pass of a half problem as one call of Python code, which holds whole arrays in float32."""
    single = strategy.program(replace(problem, dtype=_FLOAT32), pass_, wanted)
    (call,) = single.steps
    assert isinstance(call, Call)
    results = [place.source in ("y", "dw", "db", "dx") for place in call.places]

    @values_are_data
    def converted(*halves: Array) -> None:
        wide = [half.astype(_FLOAT32) for half in halves]
        call.function(*wide)
        for half, number, is_result in zip(halves, wide, results, strict=True):
            if is_result:
                half[...] = number

    return Program((replace(call, function=converted, dtype=problem.dtype),), extra=single.extra)


def _strip_parts(problem: ConvProblem, strips: list[Strip], x: str, y: str) -> tuple[_Rows, _Rows]:
    """Return the parts that hold a strip's x and y (or dx and dy), as large as the largest strip needs."""
    largest_x = max(math.prod(strip.problem.x_shape) for strip in strips)
    largest_y = max(math.prod(strip.problem.y_shape) for strip in strips)
    name = problem.dtype_name
    return (
        _Rows(name, x, problem.x_shape, Part(4 * largest_x, "strip")),
        _Rows(name, y, problem.y_shape, Part(4 * largest_y, "strip")),
    )


def _correlation(
    problem: ConvProblem, pass_: Pass, strips: list[Strip], made: dict[ConvProblem, Program], wanted: Wanted
) -> Iterator[AnyStep]:
    """Yield the steps of a forward pass, or of an input gradient."""
    name, forward = problem.dtype_name, pass_ == "forward"
    channels = problem.d if forward else problem.c
    weights, bias = Part(4 * math.prod(problem.w_shape), "w"), Part(4 * channels, "b")
    yield _step(widen(name), math.prod(problem.w_shape), "w", weights)
    if wanted.bias:
        yield _step(widen(name), channels, "b", bias)
    x, y = _strip_parts(problem, strips, "x" if forward else "dx", "y" if forward else "dy")
    new = {x.array: Place(x.part), y.array: Place(y.part), "w": Place(weights), "b": Place(bias)}
    for strip in strips:
        yield x.widened(strip.x) if forward else y.widened(strip.y)
        yield from made[strip.problem].moved(new).steps
        yield y.rounded(strip.y) if forward else x.rounded(strip.x)


def _weight_grad(
    problem: ConvProblem, strips: list[Strip], made: dict[ConvProblem, Program], wanted: Wanted
) -> Iterator[AnyStep]:
    """Yield the steps of a weight gradient; strips are summed in float32 and rounded once."""
    name, count = problem.dtype_name, math.prod(problem.w_shape)
    total = Part(4 * count, "dw")
    yield _step(widen(name), count, "dw", total) if wanted.accumulate else _step(_zeros(), count, total)
    x, y = _strip_parts(problem, strips, "x", "dy")
    new = {"x": Place(x.part), "dy": Place(y.part), "dw": Place(total)}
    for strip in strips:
        yield x.widened(strip.x)
        yield y.widened(strip.y)
        yield from made[strip.problem].moved(new).steps
    yield _step(round_numbers(name, 4), count, total, "dw")
    if wanted.bias:
        yield from bias_program(math.prod(problem.y_shape[:3]), problem.d, problem.dtype, wanted.accumulate).steps


def bias_program(pixels: int, d: int, dtype: np.dtype[Any], accumulate: bool) -> Program:
    """Return the bias gradient: strips of ``dy (pixels, d)`` are widened, and their sums added in float64."""
    name, strip = name_of(dtype), max(1, STRIP // d)
    wide, total = Part(4 * min(strip, pixels) * d, "strip"), Part(8 * d, "db")
    steps: list[Step] = []
    for first in range(0, pixels, strip):
        count = min(strip, pixels - first)
        steps.append(_step(widen(name), count * d, Place("dy", 2 * first * d), wide))
        steps += column_steps(count, d, (4, 8), wide, Place(total), first > 0)
    if accumulate:
        before = Part(4 * d, "db before")
        steps += [_step(widen(name), d, "db", before), *column_steps(1, d, (4, 8), before, Place(total), True)]
    steps.append(_step(round_numbers(name, 8), d, total, "db"))
    return Program(tuple(steps))
