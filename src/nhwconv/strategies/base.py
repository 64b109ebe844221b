"""What a strategy is: a name, what it can do, and the program that does it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ..problem import ConvProblem, Pass
from ..program import Program

__all__ = ["Strategy", "Wanted"]


class Wanted(NamedTuple):
    """What a program is wanted for, beside the pass and the problem.

    Attributes
    ----------
    bias : bool
        A forward pass or an input gradient adds ``b``, one number for each channel of its result; a weight gradient
        makes ``db`` as well.
    accumulate : bool
        A weight gradient is added to what ``dw`` and ``db`` hold.
    workers : int
        The threads that may be used. Bits do not depend on them.
    weights : str
        How w and dw lie: "OHWI", or "HWIO" where the registry says that a strategy takes these. Bits do not depend on
        it.
    """

    bias: bool = False
    accumulate: bool = False
    workers: int = 1
    weights: str = "OHWI"


class Strategy(Protocol):
    """One way to compute all three passes.

    Programs are made for checked problems of at least one image, in float32 or float64. They find arrays C-contiguous,
    aligned, of the shapes that the problem has, and results apart from inputs. A result may hold anything, NaN
    included.
    """

    name: str
    summary: str
    compiled: bool  #: whether it needs Numba's compiler

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return None where this strategy can do the problem, otherwise the reason why it cannot."""
        ...

    def program(self, problem: ConvProblem, pass_: Pass, wanted: Wanted) -> Program:
        """Return the program of a pass.

        It reads ``x, w`` and ``b`` and writes ``y`` (forward), reads ``x`` and ``dy`` and writes ``dw`` and ``db``
        (weight_grad), or reads ``dy``, ``w`` and ``b`` and writes ``dx`` (input_grad, whose bias is that of a
        transposed convolution). Its cycles are what the planner compares: predicted from the problem, never from the
        clock.
        """
        ...
