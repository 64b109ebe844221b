"""Half types: stored as float16 or bfloat16, computed and accumulated in float32, strip by strip.

A strip (`ConvProblem.strips`) is a smaller problem, so every strategy serves half types without knowing of them,
and no call ever holds a whole array twice.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from . import arrays
from .bias import bias_grad
from .planning import Plan
from .problem import ConvProblem, Pass, narrow
from .strategies import REGISTRY, Strategy
from .strategies.base import Array

__all__ = ["forward", "input_grad", "weight_grad"]

#: Elements of x and y together that a strip converts at a time: 16 MiB in float32.
STRIP = 4 * 2**20

_FLOAT32 = np.dtype(np.float32)


def _single(problem: ConvProblem) -> ConvProblem:
    return replace(problem, dtype=_FLOAT32)


def _wide(part: Array) -> Array:
    wide = arrays.empty(part.shape, _FLOAT32)
    np.copyto(wide, part, casting="unsafe")
    return wide


def _store(part: Array, wide: Array) -> None:
    np.copyto(part, wide, casting="unsafe")


def _able(strategy: Strategy, problem: ConvProblem, pass_: Pass) -> Strategy:
    """Return the plan's strategy, or loop, which takes everything: a strip of few rows may not suit Winograd."""
    return strategy if strategy.supports(problem, pass_) is None else REGISTRY["loop"]


def forward(plan: Plan, x: Array, w: Array, b: Array | None, y: Array) -> None:
    """Run the plan's forward pass on arrays of any dtype that nhwconv takes."""
    strategy, problem = REGISTRY[plan.strategy], plan.problem
    if narrow(problem.dtype):
        _narrow_forward(strategy, problem, x, w, b, y)
    else:
        strategy.forward(problem, x, w, b, y)


@arrays.values_are_data
def _narrow_forward(strategy: Strategy, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
    w, b = _wide(w), None if b is None else _wide(b)
    for strip in _single(problem).strips("forward", STRIP):
        part = arrays.empty(strip.problem.y_shape, _FLOAT32)
        _able(strategy, strip.problem, "forward").forward(strip.problem, _wide(x[strip.x]), w, b, part)
        _store(y[strip.y], part)


def weight_grad(plan: Plan, x: Array, dy: Array, dw: Array, accumulate: bool, db: Array | None = None) -> None:
    """Run the plan's weight gradient; strips are summed in float32 and rounded once."""
    strategy, problem = REGISTRY[plan.strategy], plan.problem
    if narrow(problem.dtype):
        _narrow_weight_grad(strategy, problem, x, dy, dw, accumulate)
        if db is not None:
            bias_grad(dy.reshape(-1, problem.d), db, accumulate)
    else:
        strategy.weight_grad(problem, x, dy, dw, accumulate, db)


@arrays.values_are_data
def _narrow_weight_grad(
    strategy: Strategy, problem: ConvProblem, x: Array, dy: Array, dw: Array, accumulate: bool
) -> None:
    total = _wide(dw) if accumulate else np.zeros(dw.shape, _FLOAT32)
    for strip in _single(problem).strips("weight_grad", STRIP):
        _able(strategy, strip.problem, "weight_grad").weight_grad(
            strip.problem, _wide(x[strip.x]), _wide(dy[strip.y]), total, True
        )
    _store(dw, total)


def input_grad(plan: Plan, dy: Array, w: Array, dx: Array) -> None:
    """Run the plan's input gradient on arrays of any dtype that nhwconv takes."""
    strategy, problem = REGISTRY[plan.strategy], plan.problem
    if narrow(problem.dtype):
        _narrow_input_grad(strategy, problem, dy, w, dx)
    else:
        strategy.input_grad(problem, dy, w, dx)


@arrays.values_are_data
def _narrow_input_grad(strategy: Strategy, problem: ConvProblem, dy: Array, w: Array, dx: Array) -> None:
    w = _wide(w)
    for strip in _single(problem).strips("input_grad", STRIP):
        part = arrays.empty(strip.problem.x_shape, _FLOAT32)
        _able(strategy, strip.problem, "input_grad").input_grad(strip.problem, _wide(dy[strip.y]), w, part)
        _store(dx[strip.x], part)
