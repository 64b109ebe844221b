"""What a pass is expected to take: counted multiply-adds, and loads and shuffles of x, or bytes."""

from __future__ import annotations

from ...problem import ConvProblem
from ...runtime import machine
from .constants import CUT
from .lanes import Spread
from .rows import Literal, columns

__all__ = ["price"]


def price(
    problem: ConvProblem, spread: Spread, literal: Literal, tiles: tuple[int, ...], product: float, copies: float
) -> float:
    """Return the cycles of any pass: of its instructions and copies, or of its bytes, whichever take longer."""
    n, oh, ow, _ = problem.y_shape
    outputs = n * oh * ow * spread.vectors
    products = outputs * problem.kh * problem.kw * spread.cg
    pixels = next((p for p in tiles if p <= ow), 1)
    # A column of x is brought in once for all of its taps.
    brought = products * len(columns(literal, pixels, literal.q1)) / (pixels * literal.q1)
    moves = brought * spread.pattern.moves(spread.lanes)
    cycles = outputs * CUT.output + products * product + moves * CUT.move + copies
    if literal.q2:
        cycles += outputs / pixels * problem.kh * spread.cg * sum(literal.split(problem.kw)) * CUT.chunk
    return max(cycles, problem.bytes / machine.BYTES_A_CYCLE)
