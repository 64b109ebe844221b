"""Loops over kernel positions and channels around the register-tile micro-kernel; no im2col.

In NHWC, for one row of the kernel, the ``(kw, c)`` values that an output pixel reads lie side by side, in x and in
w. So each pass is a short sum of plain matrix products (`nhwconv.codegen.tile`) on the arrays as they are:

- forward: a correlation of x with w (`correlate`, or `narrow` for few channels of y);
- input_grad: a correlation of dy with the flipped w, once for every phase of the stride;
- weight_grad: a product of dy and x whose long axis is the pixels.

Where outputs share no pixels, as in patches, a row of taps is one pixel of more channels (`ConvProblem.folded`).
"""

from __future__ import annotations

from ...problem import ConvProblem, Pass
from ...program import Place, Program, Step
from ...runtime import machine
from ..axes import Axis, forward_axes, input_grad_axes
from ..base import Wanted
from ..bias import repeat_step
from ..turning import with_weights
from .correlate import correlate_steps
from .narrow import narrow_steps
from .weight_grad import weight_grad_steps

__all__ = ["Loop"]


class Loop:
    """Loops over kernel positions and channels around the micro-kernel, without im2col."""

    name = "loop"
    summary = "loops over kernel positions and channels around a register-tile micro-kernel"
    compiled = True

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Every problem."""
        return None

    def program(self, problem: ConvProblem, pass_: Pass, wanted: Wanted) -> Program:
        """Packed weights, then correlations; or a product over all pixels, and the sum of its slices."""
        channels, problem = problem.c, problem.folded
        if pass_ == "forward":
            steps = _correlations(problem, [forward_axes(problem)], False, wanted)
        elif pass_ == "input_grad":
            steps = _correlations(problem, input_grad_axes(problem), True, wanted)
            if wanted.bias and problem.c > channels:  # each of the pixels has it
                repeated, bias = repeat_step(channels, problem.c // channels, problem.dtype.itemsize)
                own = Program(tuple(steps)).moved({"b": Place(bias)})
                return Program((repeated, *own.steps), wanted.workers)
        elif problem.groups > 1:
            # Parts have the channels of a group together, and weights as "HWIO" those of all groups.
            steps = weight_grad_steps(problem, wanted._replace(weights="OHWI"))
            return with_weights(Program(tuple(steps), wanted.workers), problem, wanted.weights, wanted)
        else:
            steps = weight_grad_steps(problem, wanted)
        return Program(tuple(steps), wanted.workers)


def _correlations(problem: ConvProblem, phases: list[tuple[Axis, Axis]], backward: bool, wanted: Wanted) -> list[Step]:
    """Return the steps of the correlations of all phases: of x with w forward, of dy with w in each phase backward."""
    lanes = machine.lanes(problem.dtype.itemsize)
    channels = problem.cg if backward else problem.dg
    # Where channels of y are few, pixels go on the vectors, for all phases at once.
    few = channels < lanes and all(columns.stride == 1 for _, columns in phases)
    if few and max(columns.out for _, columns in phases) >= lanes // 2:
        return narrow_steps(problem, phases, backward, wanted)
    return correlate_steps(problem, phases, backward, wanted)
