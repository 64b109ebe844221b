"""The article's sums as plain loops over samples, rows, kernel positions and channels, compiled by Numba in parallel.

Each pass is one function, to be read beside the article: stride, padding, dilation and groups say which pixel ``(i,
j)`` a kernel position ``(h, v)`` meets from an output ``(p, q)``, and nothing else is clever. For comparison; never
chosen by "auto".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from numba import prange

from ..problem import ConvProblem, Pass
from ..program import Program, calls
from ..runtime.arrays import Array, values_are_data
from ..runtime.executor import launch
from ..runtime.jit import compiled
from .base import Wanted
from .bias import sum_pixels

__all__ = ["Plain"]

#: What a multiply-add costs here, in cycles: it is not vectorised over what the next one needs.
CYCLES = 1.0


def forward(x, w, y, stride, dilation, before, groups):
    """``y[n, p, q, d] += x[n, i, j, c] * w[d, h, v, c]``."""
    (_, rows, columns, _), (d, kh, kw, cg), (images, oh, ow, _) = x.shape, w.shape, y.shape
    for line in prange(images * oh):
        n, p = line // oh, line % oh
        for h in range(kh):
            i = p * stride[0] + h * dilation[0] - before[0]
            if 0 <= i < rows:
                for v in range(kw):
                    for q in range(ow):
                        j = q * stride[1] + v * dilation[1] - before[1]
                        if 0 <= j < columns:
                            for k in range(d):
                                first = k // (d // groups) * cg
                                for c in range(cg):
                                    y[n, p, q, k] += x[n, i, j, first + c] * w[k, h, v, c]


def weight_grad(x, dy, dw, stride, dilation, before, groups):
    """``dw[d, h, v, c] += dy[n, p, q, d] * x[n, i, j, c]``."""
    (images, rows, columns, _), (d, kh, kw, cg), (_, oh, ow, _) = x.shape, dw.shape, dy.shape
    for tap in prange(d * kh * kw):
        k, h, v = tap // (kh * kw), tap // kw % kh, tap % kw
        first = k // (d // groups) * cg
        for n in range(images):
            for p in range(oh):
                i = p * stride[0] + h * dilation[0] - before[0]
                if 0 <= i < rows:
                    for q in range(ow):
                        j = q * stride[1] + v * dilation[1] - before[1]
                        if 0 <= j < columns:
                            for c in range(cg):
                                dw[k, h, v, c] += dy[n, p, q, k] * x[n, i, j, first + c]


def input_grad(dy, w, dx, stride, dilation, before, groups):
    """``dx[n, i, j, c] += dy[n, p, q, d] * w[d, h, v, c]``."""
    (_, oh, ow, _), (d, kh, kw, cg), (images, rows, columns, _) = dy.shape, w.shape, dx.shape
    for n in prange(images):
        for h in range(kh):
            for p in range(oh):
                i = p * stride[0] + h * dilation[0] - before[0]
                if 0 <= i < rows:
                    for v in range(kw):
                        for q in range(ow):
                            j = q * stride[1] + v * dilation[1] - before[1]
                            if 0 <= j < columns:
                                for k in range(d):
                                    first = k // (d // groups) * cg
                                    for c in range(cg):
                                        dx[n, i, j, first + c] += dy[n, p, q, k] * w[k, h, v, c]


FORMS: dict[Pass, tuple[Any, Any]] = {
    "forward": (compiled(forward, parallel=True), compiled(forward)),
    "weight_grad": (compiled(weight_grad, parallel=True), compiled(weight_grad)),
    "input_grad": (compiled(input_grad, parallel=True), compiled(input_grad)),
}


class Plain:
    """Plain loops, compiled by Numba in parallel."""

    name = "plain"
    summary = "plain loops over kernel positions and channels, compiled by Numba in parallel"
    compiled = True

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Every problem."""
        return None

    def program(self, problem: ConvProblem, pass_: Pass, wanted: Wanted) -> Program:
        """One call of the loops, which start from zero, from the bias, or from what is there."""
        return calls(partial(_RUN[pass_], problem, wanted), problem, pass_, wanted.bias, CYCLES * problem.flops / 2, 0)


def _loop(pass_: Pass, problem: ConvProblem, wanted: Wanted, *arrays: Array) -> None:
    (top, _), (left, _) = problem.padding
    *inputs, result = arrays
    options = problem.stride, problem.dilation, (top, left), problem.groups
    launch(*FORMS[pass_], wanted.workers, *map(_as_read_only, inputs), result, *options)


def _as_read_only(array: Array) -> Array:
    """Return a view that Numba sees as one type, whether or not the caller may write to the array."""
    view = array.view()
    view.flags.writeable = False
    return view


def _forward(problem: ConvProblem, wanted: Wanted, x: Array, w: Array, y: Array, b: Array | None = None) -> None:
    y[...] = 0 if b is None else b
    _loop("forward", problem, wanted, x, w, y)


@values_are_data
def _weight_grad(problem: ConvProblem, wanted: Wanted, x: Array, dy: Array, dw: Array, db: Array | None = None) -> None:
    if not wanted.accumulate:
        dw[...] = 0
    if db is not None:
        sum_pixels(wanted.accumulate, dy.reshape(-1, problem.d), db)
    _loop("weight_grad", problem, wanted, x, dy, dw)


def _input_grad(problem: ConvProblem, wanted: Wanted, dy: Array, w: Array, dx: Array, b: Array | None = None) -> None:
    dx[...] = 0 if b is None else b
    _loop("input_grad", problem, wanted, dy, w, dx)


_RUN: dict[Pass, Callable[..., None]] = {
    "forward": _forward,
    "weight_grad": _weight_grad,
    "input_grad": _input_grad,
}
