"""im2col: patches gathered into a matrix, a block of images at a time, then one BLAS product a block.

The classic, for comparison: it moves each pixel ``kh * kw`` times to buy a matrix product that BLAS knows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .. import arrays, machine
from ..bias import bias_grad
from ..kernels.patches import PATCHES, col2im, im2col
from ..problem import ConvProblem, Pass, Strip
from .base import Array

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

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Every problem."""
        return None

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """The patches of one block, and its product for one group."""
        problem = replace(problem, dtype=problem.compute_dtype)
        pixels = max((_pixels(strip.problem) for strip in _blocks(problem, pass_)), default=0)
        return pixels * (_depth(problem) + problem.dg) * problem.dtype.itemsize

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """A BLAS product, and patches that are written and read once."""
        patches = _pixels(problem) * _depth(problem) * problem.groups * problem.dtype.itemsize
        return problem.flops / machine.flops_a_cycle(problem.dtype.itemsize) + 2 * patches / machine.BYTES_A_CYCLE

    @arrays.values_are_data
    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """``y = patches . w^T + b``."""
        kernels = _matrices(problem, w)
        for block in _blocks(problem, "forward"):
            rows = y[block.y].reshape(_pixels(block.problem), problem.d)
            for g, channels in enumerate(_groups(problem)):
                product = np.matmul(
                    _gather(block.problem, x[block.x], g), kernels[g].T, out=_contiguous(rows, channels)
                )
                rows[:, channels] = product if b is None else product + b[channels]

    @arrays.values_are_data
    def weight_grad(
        self, problem: ConvProblem, x: Array, dy: Array, dw: Array, accumulate: bool, db: Array | None = None
    ) -> None:
        """``dw = dy^T . patches``, summed over blocks."""
        if db is not None:
            bias_grad(dy.reshape(-1, problem.d), db, accumulate)
        if not accumulate:
            dw[...] = 0
        for block in _blocks(problem, "weight_grad"):
            rows = dy[block.y].reshape(_pixels(block.problem), problem.d)
            for g, channels in enumerate(_groups(problem)):
                _matrices(problem, dw)[g] += rows[:, channels].T @ _gather(block.problem, x[block.x], g)

    @arrays.values_are_data
    def input_grad(self, problem: ConvProblem, dy: Array, w: Array, dx: Array) -> None:
        """``dx = col2im(dy . w)``."""
        kernels = _matrices(problem, w)
        for block in _blocks(problem, "input_grad"):
            rows = dy[block.y].reshape(_pixels(block.problem), problem.d)
            for g, channels in enumerate(_groups(problem)):
                _scatter(block.problem, rows[:, channels] @ kernels[g], dx[block.x], g)


def _depth(problem: ConvProblem) -> int:
    return problem.kh * problem.kw * problem.cg


def _pixels(problem: ConvProblem) -> int:
    return problem.n * problem.oh * problem.ow


def _groups(problem: ConvProblem) -> list[slice]:
    return [slice(g * problem.dg, (g + 1) * problem.dg) for g in range(problem.groups)]


def _matrices(problem: ConvProblem, w: Array) -> Array:
    """View weights as one ``(dg, kh*kw*cg)`` matrix a group."""
    return w.reshape(problem.groups, problem.dg, _depth(problem))


def _contiguous(rows: Array, channels: slice) -> Array | None:
    """Return where a product may go directly: the rows of y where there is one group."""
    return rows if channels.stop - channels.start == rows.shape[1] else None


def _blocks(problem: ConvProblem, pass_: Pass) -> list[Strip]:
    image = math.prod(problem.x_shape[1:]) + math.prod(problem.y_shape[1:])
    patches = problem.oh * problem.ow * (_depth(problem) + problem.dg)
    return list(problem.strips(pass_, max(1, BLOCK * image // patches)))


def _gather(problem: ConvProblem, x: Array, g: int) -> Array:
    patches = arrays.empty((_pixels(problem), _depth(problem)), problem.dtype)
    geometry = _geometry(problem, g, problem.n * problem.oh)
    im2col().run(x.reshape(-1), patches.reshape(-1), geometry=geometry, workers=WORKERS)
    return patches


def _scatter(problem: ConvProblem, patches: Array, dx: Array, g: int) -> None:
    geometry = _geometry(problem, g, problem.n * problem.h)
    col2im().run(patches.reshape(-1), dx.reshape(-1), geometry=geometry, workers=WORKERS)


def _geometry(problem: ConvProblem, g: int, tasks: int) -> Array:
    (top, _), (left, _) = problem.padding
    return PATCHES.record(
        {
            "n": problem.n, "h": problem.h, "w": problem.w, "c": problem.c, "c_0": g * problem.cg, "cg": problem.cg,
            "p": problem.oh, "q": problem.ow, "R": problem.kh, "Q": problem.kw,
            "stride_h": problem.stride[0], "stride_w": problem.stride[1],
            "dilation_h": problem.dilation[0], "dilation_w": problem.dilation[1],
            "top": top, "left": left, "tasks": tasks,
        }
    )  # fmt: skip
