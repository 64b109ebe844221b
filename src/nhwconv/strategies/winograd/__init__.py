"""Winograd's minimal filtering: fewer multiplications than any direct algorithm, on the same micro-kernel.

F(4x4, 3x3) does in 36 products what a direct convolution does in 144, for the price of transforms that cost less the
more channels share them. It needs stride 1: a dilated convolution has it on each of the interleaved grids, and a
strided one in each of its phases, which the forward pass adds up.
"""

from __future__ import annotations

from ...problem import ConvProblem, Pass
from ...program import Program, Step
from ...runtime import machine
from ..base import Wanted
from .correlate import correlate_steps
from .forms import filtered
from .weight_grad import weight_grad_steps

__all__ = ["Winograd"]


class Winograd:
    """Winograd's minimal filtering F(4, 3) and its kin, blocked so that transformed data stay in L2."""

    name = "winograd"
    summary = "Winograd's minimal filtering, with transforms over channels and the same micro-kernel"
    compiled = True

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Small kernels, with a stride or without, and most of a vector of channels in each group."""
        lanes, channels = machine.lanes(problem.compute_dtype.itemsize), min(problem.cg, problem.dg)
        least = lanes if pass_ == "weight_grad" or problem.groups * channels < lanes else lanes * 3 // 4
        if channels < least:
            return f"it needs {least} channels in each group, of x and of y"
        found = filtered(problem, pass_)
        if not found:
            (sh, sw), kernels = problem.stride, f"{problem.kh}x{problem.kw} kernels"
            return f"it saves nothing on {kernels} with stride {sh}x{sw} and {problem.oh}x{problem.ow} outputs"
        if pass_ == "forward" and len(found) > 1 and problem.dg % lanes:
            return f"its strided forward pass needs a multiple of {lanes} channels of y in each group"
        return None

    def program(self, problem: ConvProblem, pass_: Pass, wanted: Wanted) -> Program:
        """Packed, and perhaps transformed weights, then correlations; or products over tiles, and their slices' sum."""
        if pass_ == "weight_grad":
            return Program(tuple(weight_grad_steps(problem, wanted)), wanted.workers)
        found, steps = filtered(problem, pass_), list[Step]()
        for phases in [found] if pass_ == "forward" else [[c] for c in found]:
            steps += correlate_steps(problem, phases, pass_ == "input_grad", wanted)
        return Program(tuple(steps), wanted.workers)
