"""im2col: patches gathered into a matrix, a block of images at a time, then one BLAS product a block.

The classic, for comparison: it moves each pixel ``kh * kw`` times to buy a matrix product that BLAS knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from ...problem import ConvProblem, Pass, Strip
from ...program import AnyStep, Call, Part, Place, Program, Step, places
from ...runtime import machine
from ...runtime.arrays import Array, values_are_data
from ..base import Wanted
from ..bias import bias_steps
from .patches import Patches, col2im, im2col

__all__ = ["Im2col"]

#: Elements of patches that a block gathers at most: 16 MiB in float32.
BLOCK = 4 * 2**20
#: Patches are moved by the calling thread. Numba's threads and BLAS's, taking turns, spin on each other's cores: the
#: product then waits for the scheduler, several times as long as a second thread saves.
WORKERS = 1


class Im2col:
    """Patches gathered in blocks of images, then one BLAS product a block."""

    name = "im2col"
    summary = "patches gathered in blocks of images, then one BLAS product a block"
    compiled = True

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Every problem."""
        return None

    def program(self, problem: ConvProblem, pass_: Pass, wanted: Wanted) -> Program:
        """For each block and group, patches and a product."""
        steps: list[AnyStep] = []
        if pass_ == "weight_grad":
            steps += (
                bias_steps(math.prod(problem.y_shape[:3]), problem.d, problem.dtype.itemsize, wanted.accumulate)
                if wanted.bias
                else []
            )
            if not wanted.accumulate:
                steps.append(_call(_clear, problem, [("dw", problem.w_shape)]))
        blocks = list(problem.strips(pass_, _block_limit(problem)))
        largest = max(_pixels(b.problem) for b in blocks)
        patches = Part(largest * _depth(problem) * problem.dtype.itemsize, "patches")
        for block in blocks:
            for g in range(problem.groups):
                steps += _block_steps(problem, pass_, wanted.bias, block, g, patches)
        product = largest * problem.dg * problem.dtype.itemsize
        return Program(tuple(steps), WORKERS, product)


def _depth(problem: ConvProblem) -> int:
    return problem.kh * problem.kw * problem.cg


def _pixels(problem: ConvProblem) -> int:
    return problem.n * problem.oh * problem.ow


def _block_limit(problem: ConvProblem) -> int:
    """Return the elements of x and y of a block, so that its patches and product are about `BLOCK`."""
    image = math.prod(problem.x_shape[1:]) + math.prod(problem.y_shape[1:])
    patches = problem.oh * problem.ow * (_depth(problem) + problem.dg)
    return max(1, BLOCK * image // patches)


def _call(
    function: object, problem: ConvProblem, operands: list[tuple[str | Part, tuple[int, ...]]], cycles: float = 0.0
) -> Call:
    sources, shapes = zip(*operands, strict=True)
    return Call(function, places(*sources), shapes, problem.dtype, cycles)  # type: ignore[arg-type]


def _patches(problem: ConvProblem, g: int, image_h: int) -> Patches:
    (top, _), (left, _) = problem.padding
    return Patches(
        n=problem.n, h=problem.h, w=problem.w, c=problem.c, image_h=image_h, c_0=g * problem.cg, cg=problem.cg,
        p=problem.oh, q=problem.ow, R=problem.kh, Q=problem.kw, stride_h=problem.stride[0], stride_w=problem.stride[1],
        dilation_h=problem.dilation[0], dilation_w=problem.dilation[1], top=top, left=left,
    )  # fmt: skip


def _block_steps(whole: ConvProblem, pass_: Pass, bias: bool, block: Strip, g: int, patches: Part) -> Iterator[AnyStep]:
    """Yield the steps of one block and group. Their price: a BLAS product, and patches written and read once."""
    problem, itemsize = block.problem, whole.dtype.itemsize
    moved = 2 * _pixels(problem) * _depth(problem) * itemsize / machine.BYTES_A_CYCLE
    price = problem.flops / machine.flops_a_cycle(itemsize) / problem.groups + moved
    g_patches = (_patches(problem, g, whole.h),)
    x_at = ((block.x[0].start * whole.h) + block.x[1].start) * whole.w * whole.c * itemsize
    rows: tuple[str | Part, tuple[int, ...]] = (patches, (_pixels(problem), _depth(problem)))
    w, y, dy = ("w", whole.w_shape), ("y", whole.y_shape), ("dy", whole.y_shape)
    if pass_ == "input_grad":
        yield _call(partial(_input_grad, whole, block, g), whole, [dy, w, rows], price)
        yield Step(col2im(itemsize), g_patches, problem.n * problem.h, places(patches, Place("dx", x_at)))
        return
    yield Step(im2col(itemsize), g_patches, problem.n * problem.oh, places(Place("x", x_at), patches))
    if pass_ == "forward":
        more: list[tuple[str | Part, tuple[int, ...]]] = [("b", (whole.d,))] if bias else []
        yield _call(partial(_forward, whole, block, g), whole, [rows, w, y, *more], price)
    else:
        yield _call(partial(_weight_grad, whole, block, g), whole, [rows, dy, ("dw", whole.w_shape)], price)


# ------------------------------------------------------------------------------------------------ products


def _channels(problem: ConvProblem, g: int) -> slice:
    return slice(g * problem.dg, (g + 1) * problem.dg)


def _matrix(problem: ConvProblem, w: Array, g: int) -> Array:
    """View a group's weights as a ``(dg, kh*kw*cg)`` matrix."""
    return w.reshape(problem.groups, problem.dg, _depth(problem))[g]


def _rows(block: Strip, y: Array) -> Array:
    """View a block of y as ``(pixels, d)``."""
    return y[block.y].reshape(-1, y.shape[-1])


def _clear(dw: Array) -> None:
    dw[...] = 0


@values_are_data
def _forward(
    problem: ConvProblem, block: Strip, g: int, patches: Array, w: Array, y: Array, b: Array | None = None
) -> None:
    """``y = patches . w^T + b``."""
    rows, channels = _rows(block, y), _channels(problem, g)
    product = np.matmul(patches, _matrix(problem, w, g).T, out=rows if problem.groups == 1 else None)
    rows[:, channels] = product if b is None else product + b[channels]


@values_are_data
def _weight_grad(problem: ConvProblem, block: Strip, g: int, patches: Array, dy: Array, dw: Array) -> None:
    """``dw += dy^T . patches``."""
    _matrix(problem, dw, g)[...] += _rows(block, dy)[:, _channels(problem, g)].T @ patches


@values_are_data
def _input_grad(problem: ConvProblem, block: Strip, g: int, dy: Array, w: Array, patches: Array) -> None:
    """``patches = dy . w``, which `col2im` then sums into dx."""
    np.matmul(_rows(block, dy)[:, _channels(problem, g)], _matrix(problem, w, g), out=patches)
