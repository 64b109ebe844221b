"""Arrays whose axes come in another order than strategies take them: turned by a step before or after a program.

Every such order is a matrix whose rows and columns change places: ``(C, H*W)`` of each image with its channels first,
``(KH*KW*C/groups, D)`` for weights as "HWIO", ``(C/groups, KH*KW)`` of each kernel as "OIHW".
Arrays are turned in blocks that stay in L1, by any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from ..codegen.simd import at, integers, numbers, transpose, transpose_exact
from ..problem import ConvProblem
from ..program import AnyStep, Part, Place, Program, Step, places
from ..runtime import machine
from ..runtime.jit import Body, ceil_div, device
from ..runtime.records import Record, record
from .base import Wanted

__all__ = ["transpose_matrix", "turn", "turn_step", "with_images", "with_weights"]

#: Rows and columns of a task.
BLOCK = 64
#: Bytes of images that are turned at a time.
TOGETHER = 8 * 2**20


class Turned(Record):
    """Some matrices, one behind the other, each of which is transposed."""

    rows: int
    columns: int


class _Block(NamedTuple):
    """A task: where it is read and where it is written, and its rows and columns."""

    source: int
    target: int
    rows: int
    columns: int


@device
def _block_of_task(g, task):
    """Decode a task."""
    down, right = ceil_div(g.rows, BLOCK), ceil_div(g.columns, BLOCK)
    j, rest = task % right * BLOCK, task // right
    i, first = rest % down * BLOCK, rest // down * g.rows * g.columns
    rows, columns = min(BLOCK, g.rows - i), min(BLOCK, g.columns - j)
    return _Block(first + i * g.columns + j, first + j * g.rows + i, rows, columns)


@device
def transpose_matrix(source, s_row, rows, columns, target, t_row, LANES):
    """Write the transpose of a matrix, ``target[k*t_row + r] = source[r*s_row + k]``, and nothing beside it."""
    for r in range(0, rows, LANES):
        count = min(LANES, rows - r)
        for k in range(0, columns, LANES):
            of, to, width = at(source, r * s_row + k), at(target, k * t_row + r), min(LANES, columns - k)
            if count == LANES:
                transpose(of, s_row, count, width, to, t_row)
            else:
                transpose_exact(of, s_row, count, width, False, of, to, t_row)


@cache
def turn(LANES: int, ITEMSIZE: int) -> Body:
    """Make the body that transposes matrices; it takes them and where they go."""

    def turn(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, Turned)
        table = integers(operands)
        block = _block_of_task(g, task)
        source, target = at(numbers(table[0], ITEMSIZE), block.source), at(numbers(table[1], ITEMSIZE), block.target)
        transpose_matrix(source, g.columns, block.rows, block.columns, target, g.rows, LANES)

    def turn_half(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, Turned)
        table = integers(operands)
        block = _block_of_task(g, task)
        source, target = at(numbers(table[0], 2), block.source), at(numbers(table[1], 2), block.target)
        for j in range(block.columns):
            for i in range(block.rows):
                target[j * g.rows + i] = source[i * g.columns + j]

    return Body(turn if ITEMSIZE > 2 else turn_half)


def turn_step(
    sizes: tuple[int, int, int], itemsize: int, source: str | Part | Place, target: str | Part | Place
) -> Step:
    """Return the step that transposes so many matrices of so many rows and columns."""
    count, rows, columns = sizes
    tasks = count * math.ceil(rows / BLOCK) * math.ceil(columns / BLOCK)
    cycles = 2 * count * rows * columns * itemsize / machine.BYTES_A_CYCLE
    body = turn(machine.lanes(max(itemsize, 4)), itemsize)
    return Step(body, (Turned(rows=rows, columns=columns),), tasks, places(source, target), cycles)


def _sources(program: Program) -> set[str | Part]:
    """Return what the steps of a program work on."""
    return {place.source for step in program.steps for place in step.places}


def with_images(
    make: Callable[[int, bool], Program],
    shapes: Mapping[str, tuple[int, ...]],
    first: Container[str],
    itemsize: int,
    accumulate: bool = False,
    least: int = 0,
) -> Program:
    """Return a program for images ``(n, h, w, c)``, of which the arrays of these names have their channels first.

    These are turned in blocks of images, which stay in a cache until their results are turned back; so no call holds a
    whole array twice. A block has `least` bytes or more. ``make(images, accumulate)`` returns the program of so many
    images with their channels last, whose gradients of weights and bias are added to what is there.
    """
    n = next(iter(shapes.values()))[0]
    program = make(n, accumulate)
    used = _sources(program)
    sizes = {name: math.prod(shape[1:]) * itemsize for name, shape in shapes.items() if name in used}
    turned = [name for name in sizes if name in first]
    if not turned:
        return program
    whole = n * sum(sizes[name] for name in turned)
    # Half types are one block: a gradient is rounded wherever it is stored.
    several = program.native and n and itemsize > 2
    blocks = min(n, math.ceil(whole / max(TOGETHER, least))) if several else 1
    bounds = [i * n // blocks for i in range(blocks + 1)]
    parts = {name: Part(max(b - a for a, b in pairwise(bounds)) * sizes[name], name) for name in turned}
    made: dict[tuple[int, bool], Program] = {}
    steps: list[AnyStep] = []
    for start, end in pairwise(bounds):
        kind = end - start, accumulate or start > 0
        block = made[kind] if kind in made else make(*kind)
        arrays = {name: Place(name, start * size) for name, size in sizes.items()}
        matrices = {name: (end - start, shapes[name][3], math.prod(shapes[name][1:3])) for name in turned}
        for name, (images, channels, pixels) in matrices.items():
            if name in ("x", "dy"):
                steps.append(turn_step((images, channels, pixels), itemsize, arrays[name], parts[name]))
        ready = _of_weights(block) if kind in made else set()
        moved = block.moved(arrays | {name: Place(part) for name, part in parts.items()})
        steps += [step for i, step in enumerate(moved.steps) if i not in ready]
        for name, (images, channels, pixels) in matrices.items():
            if name in ("dx", "y"):
                steps.append(turn_step((images, pixels, channels), itemsize, parts[name], arrays[name]))
        made[kind] = block
    programs = made.values()
    workers, extra = (max(getattr(p, name) for p in programs) for name in ("workers", "extra"))
    return Program(tuple(steps), workers, extra, program.ran, program.problem)


def _of_weights(program: Program) -> set[int]:
    """Return the numbers of the steps that prepare weights, and so do the same for every block of images."""
    prepared: set[str | Part] = {"w", "b"}
    others: set[str | Part] = set()
    found = set()
    for i, step in enumerate(program.steps):
        sources = {place.source for place in step.places}
        if sources & prepared and all(s in prepared or (isinstance(s, Part) and s not in others) for s in sources):
            prepared |= sources
            found.add(i)
        else:
            others |= sources
    return found


def with_weights(
    program: Program, problem: ConvProblem, weights: str, wanted: Wanted, names: Container[str] = ("w", "dw")
) -> Program:
    """Return a program for weights that lie as this layout says; a gradient that is added to is turned twice."""
    if weights == "OHWI":
        return program
    d, kh, kw, cg = problem.w_shape
    count, rows, columns = (1, kh * kw * cg, d) if weights == "HWIO" else (d, cg, kh * kw)
    itemsize, used = problem.dtype.itemsize, _sources(program)
    parts = {
        name: Part(count * rows * columns * itemsize, name) for name in ("w", "dw") if name in names and name in used
    }
    before, after = [], []
    for name, part in parts.items():
        if name == "w" or wanted.accumulate:
            before.append(turn_step((count, rows, columns), itemsize, name, part))
        if name == "dw":
            after.append(turn_step((count, columns, rows), itemsize, part, name))
    inner = program.moved({name: Place(part) for name, part in parts.items()})
    return replace(inner, steps=(*before, *inner.steps, *after), _images={})
