"""The article's own form: one `numpy.tensordot` for each kernel position. The reference; short, not fast.

With stride ``s`` and dilation ``l`` the window of x that kernel position ``(h, v)`` meets is
``x[:, h*l : h*l + (oh-1)*s + 1 : s, ...]``. The article has ``s = l = 1``: ``x[:, h : h+oh, v : v+ow, :]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from ..problem import ConvProblem, Pass
from ..program import Program, calls
from ..runtime import machine
from ..runtime.arrays import Array, values_are_data
from .base import Wanted

__all__ = ["Tensordot"]


class Tensordot:
    """NumPy's tensordot over kernel positions, as the article derives the gradients."""

    name = "tensordot"
    summary = "NumPy's tensordot over kernel positions, as in the article"
    compiled = False

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Every problem."""
        return None

    def program(self, problem: ConvProblem, pass_: Pass, wanted: Wanted) -> Program:
        """One call of NumPy code."""
        if pass_ == "forward":
            function = partial(_forward, problem)
        elif pass_ == "weight_grad":
            function = partial(_weight_grad, problem, wanted.accumulate)
        else:
            function = partial(_input_grad, problem)
        return calls(function, problem, pass_, wanted.bias, _price(problem), _workspace(problem))


def _workspace(problem: ConvProblem) -> int:
    """Padded x, and the copies of a window and of dy that tensordot makes for BLAS."""
    p = problem
    padded = p.n * (p.h + sum(p.padding[0])) * (p.w + sum(p.padding[1])) * p.c
    return (padded + p.n * p.oh * p.ow * (p.cg + 2 * p.dg)) * p.dtype.itemsize


def _price(problem: ConvProblem) -> float:
    """A BLAS product, and for each kernel position a copy of the window, of dy, and a pass over the result."""
    copied = 3 * problem.kh * problem.kw * problem.bytes
    return problem.flops / machine.flops_a_cycle(problem.dtype.itemsize) + copied / machine.BYTES_A_CYCLE


@values_are_data
def _forward(problem: ConvProblem, x: Array, w: Array, y: Array, b: Array | None = None) -> None:
    """``y = sum over (h, v) of x_window(h, v) . w[:, h, v, :]``."""
    y[...] = 0 if b is None else b
    padded = _pad(problem, x)
    for g, h, v, window in _windows(problem):
        y[..., g.d] += np.tensordot(padded[window], w[g.d, h, v, :], ([3], [1]))


@values_are_data
def _weight_grad(
    problem: ConvProblem, accumulate: bool, x: Array, dy: Array, dw: Array, db: Array | None = None
) -> None:
    """``dw[:, h, v, :] = tensordot(dy, x_window(h, v), ([0, 1, 2], [0, 1, 2]))``: the article's last step."""
    if db is not None:
        total = dy.sum((0, 1, 2), dtype=np.float64)
        db[...] = total + db if accumulate else total
    if not accumulate:
        dw[...] = 0
    padded = _pad(problem, x)
    for g, h, v, window in _windows(problem):
        dw[g.d, h, v, :] += np.tensordot(dy[..., g.d], padded[window], ([0, 1, 2], [0, 1, 2]))


@values_are_data
def _input_grad(problem: ConvProblem, dy: Array, w: Array, dx: Array, b: Array | None = None) -> None:
    """Each window of dx receives ``dy . w[:, h, v, :]``: the forward pass read backwards."""
    (top, _), (left, _) = problem.padding
    padded = _pad(problem, np.zeros_like(dx))
    for g, h, v, window in _windows(problem):
        padded[window] += np.tensordot(dy[..., g.d], w[g.d, h, v, :], ([3], [0]))
    dx[...] = padded[:, top : top + problem.h, left : left + problem.w, :]
    if b is not None:
        dx += b


class _Group:
    """The channels of one group, in x and in y."""

    def __init__(self, problem: ConvProblem, g: int) -> None:
        self.c = slice(g * problem.cg, (g + 1) * problem.cg)
        self.d = slice(g * problem.dg, (g + 1) * problem.dg)


def _pad(problem: ConvProblem, x: Array) -> Array:
    rows, columns = ((before, max(after, 0)) for before, after in problem.padding)
    return np.pad(x, ((0, 0), rows, columns, (0, 0)))


def _windows(problem: ConvProblem) -> Iterator[tuple[_Group, int, int, tuple[slice, ...]]]:
    """For each group and kernel position: the window of the padded x that meets the output there."""
    (sh, sw), (lh, lw) = problem.stride, problem.dilation
    for g in (_Group(problem, g) for g in range(problem.groups)):
        for h in range(problem.kh):
            for v in range(problem.kw):
                rows = slice(h * lh, h * lh + (problem.oh - 1) * sh + 1, sh)
                columns = slice(v * lw, v * lw + (problem.ow - 1) * sw + 1, sw)
                yield g, h, v, (slice(None), rows, columns, g.c)
