"""What a strategy is: a name, what it can do, what it needs, and the three passes."""

from __future__ import annotations

from typing import Protocol

from ..arrays import Array
from ..problem import ConvProblem, Pass

__all__ = ["Array", "Strategy"]


class Strategy(Protocol):
    """One way to compute all three passes.

    Arrays arrive checked: float32 or float64 as `problem.dtype` says, C-contiguous, aligned, of the shapes
    that the problem has, and the output apart from the inputs. The output may hold anything, NaN included.
    """

    name: str
    summary: str

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Return None where this strategy can do the problem, otherwise the reason why it cannot."""
        ...

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Return the bytes of extra memory that a call allocates."""
        ...

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """Return the predicted cycles of one core: from FLOPs, bytes and waste, never from the clock."""
        ...

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Write ``conv(x, w) + b`` into y."""
        ...

    def weight_grad(
        self, problem: ConvProblem, x: Array, dy: Array, dw: Array, accumulate: bool, db: Array | None = None
    ) -> None:
        """Write the gradient of w into dw, and that of the bias into db; or add them where `accumulate`."""
        ...

    def input_grad(self, problem: ConvProblem, dy: Array, w: Array, dx: Array) -> None:
        """Write the gradient of x into dx."""
        ...
