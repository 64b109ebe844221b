"""Depthwise convolution, one input channel a group: channels on the lanes, taps in registers, no packing of x.

- forward: a correlation of x with w, channel by channel;
- input_grad: a correlation of dy with the flipped w, once for every phase of the stride;
- weight_grad: for every tap, a sum over the pixels of products of dy and x.

With a channel multiplier m, output channel j reads input channel ``j // m``.
"""

from __future__ import annotations

from ...problem import ConvProblem, Pass
from ...program import Program
from ..axes import forward_axes, input_grad_axes
from ..base import Wanted
from .correlate import correlate_steps
from .weight_grad import weight_grad_steps

__all__ = ["Depthwise"]


class Depthwise:
    """One input channel a group: channels on the lanes, taps in registers."""

    name = "depthwise"
    summary = "one input channel a group: channels on the lanes, taps in registers"
    compiled = True

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Problems with one input channel a group."""
        if problem.cg == 1:
            return None
        return f"it needs groups equal to the channels of x, which are {problem.c}, but groups is {problem.groups}"

    def program(self, problem: ConvProblem, pass_: Pass, wanted: Wanted) -> Program:
        """Packed weights, then a correlation; or the sums of all slices, added up."""
        if pass_ == "forward":
            steps = correlate_steps(problem, [forward_axes(problem)], False, wanted.bias)
        elif pass_ == "input_grad":
            steps = correlate_steps(problem, input_grad_axes(problem), True, wanted.bias)
        else:
            steps = weight_grad_steps(problem, wanted)
        return Program(tuple(steps), wanted.workers)
