"""The matrices of Winograd's minimal filtering, in exact fractions, from one list of points.

``F(m, r)`` computes m outputs of a correlation with r taps in ``alpha = m + r - 1`` products:

    y = A^T ((G w) * (B^T x))

After Lavin and Gray, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308, section 4), by the
Toom-Cook construction: row i of B^T holds the coefficients of ``prod over k != i of (t - a_k)`` for the points a, and
the point at infinity comes last.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import NamedTuple

__all__ = ["POINTS", "Matrices", "matrices"]

Matrix = tuple[tuple[Fraction, ...], ...]

#: Finite points in the order in which they are taken: small, and in pairs of opposite sign, which share work.
POINTS = tuple(Fraction(p) for p in ("0", "1", "-1", "2", "-2", "1/2", "-1/2", "4/3", "-4/3"))


class Matrices(NamedTuple):
    """B^T ``(alpha, alpha)``, G ``(alpha, r)`` and A^T ``(m, alpha)`` of one F(m, r)."""

    input: Matrix
    weights: Matrix
    output: Matrix


def _polynomial(roots: tuple[Fraction, ...]) -> list[Fraction]:
    """Return the coefficients of the monic polynomial with these roots, lowest first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


@cache
def matrices(m: int, r: int) -> Matrices:
    """Return the matrices of F(m, r); those of one tap are identities."""
    alpha = m + r - 1
    if r == 1:
        identity = tuple(tuple(Fraction(i == j) for j in range(m)) for i in range(m))
        return Matrices(identity, ((Fraction(1),),) * m, identity)
    points = POINTS[: alpha - 1]
    if len(points) < alpha - 1:
        raise ValueError(f"F({m}, {r}) needs {alpha - 1} points, but only {len(POINTS)} are listed")
    inputs, weights = [], []
    for i, a in enumerate(points):
        others = points[:i] + points[i + 1 :]
        scale = Fraction(1)
        for b in others:
            scale *= a - b
        inputs.append((*_polynomial(others), Fraction(0)))
        weights.append(tuple(a**j / scale for j in range(r)))
    inputs.append(tuple(_polynomial(points)))
    weights.append(tuple(Fraction(j == r - 1) for j in range(r)))
    output = tuple((*(a**j for a in points), Fraction(j == m - 1)) for j in range(m))
    return Matrices(tuple(inputs), tuple(weights), output)
