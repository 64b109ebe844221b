"""Groups of few channels, down to one: channels of y on the lanes, taps in registers, no packing of x.

- forward: a correlation of x with w, group by group;
- input_grad: a correlation of dy with the flipped w, once for every phase of the stride;
- weight_grad: for every tap and channel of a group, a sum over the pixels of products of dy and x.

A vector holds several groups (`lanes`), so that no multiply-add is spent on a zero between groups. Depthwise is the
case of one channel a group; with a channel multiplier m, output channel j reads input channel ``j // m``.
"""

from __future__ import annotations

from ...problem import ConvProblem, Pass
from ...program import Program
from ..axes import forward_axes, input_grad_axes
from ..base import Wanted
from .constants import CUT
from .correlate import correlate_steps
from .weight_grad import weight_grad_steps

__all__ = ["Grouped"]


class Grouped:
    """Groups of few channels, down to one: channels on the lanes, taps in registers."""

    name = "depthwise"  # the case that most people look for
    summary = "groups of few channels, down to one: several groups on the lanes, taps in registers"
    compiled = True

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Problems with one input channel a group, or with several groups of few channels, as many of x as of y."""
        # Others would be right, too. But each size has functions of its own, which take a second to compile.
        if problem.cg == 1 or (problem.groups > 1 and problem.cg == problem.dg <= CUT.most_channels):
            return None
        return (
            f"it needs one channel of x a group, or several groups of at most {CUT.most_channels} channels, as many of "
            f"x as of y, but groups is {problem.groups}, of {problem.cg} and {problem.dg} channels"
        )

    def program(self, problem: ConvProblem, pass_: Pass, wanted: Wanted) -> Program:
        """Packed weights, then a correlation; or the sums of all slices, added up."""
        if pass_ == "forward":
            steps = correlate_steps(problem, [forward_axes(problem)], False, wanted.bias, wanted.workers)
        elif pass_ == "input_grad":
            steps = correlate_steps(problem, input_grad_axes(problem), True, wanted.bias, wanted.workers)
        else:
            steps = weight_grad_steps(problem, wanted)
        return Program(tuple(steps), wanted.workers)
