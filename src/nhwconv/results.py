"""Results: where they go, and which gradients are needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from . import checks
from .planning import Backward
from .runtime import arrays
from .runtime.arrays import Array

__all__ = ["Gradients", "check_gradients", "check_needs", "run_gradients"]


class Gradients(NamedTuple):
    """The gradients of one convolution; None where one was not asked for.

    Attributes
    ----------
    dx : ndarray or None
        Gradient of the input, in x's shape.
    dw : ndarray or None
        Gradient of the weights, in w's shape.
    db : ndarray or None
        Gradient of the bias, ``(D,)``; 0-d where w has no D axis.
    """

    dx: Array | None = None
    dw: Array | None = None
    db: Array | None = None


def check_needs(needs: object) -> tuple[str, ...]:
    """Return the names of the gradients that are needed, in their order."""
    names = (needs,) if isinstance(needs, str) else tuple(needs) if isinstance(needs, Iterable) else (needs,)
    for name in names:
        if name not in Gradients._fields:
            checks.fail(f'needs has {name!r}, expected any of "dx", "dw", "db"')
    return tuple(name for name in Gradients._fields if name in names)


def check_gradients(out: object, needs: tuple[str, ...]) -> Gradients:
    """Check that there is a place for gradients that are needed, and for no others."""
    if out is None:
        return Gradients()
    if not isinstance(out, tuple) or len(out) != 3:
        checks.fail(f"out is of type {type(out).__name__}, expected Gradients(dx, dw, db)", TypeError)
    out = Gradients(*out)
    for name in Gradients._fields:
        if getattr(out, name) is not None and name not in needs:
            checks.fail(f"out.{name} is given, but {name} is not in needs")
    return out


def run_gradients(
    plan: Backward, x: Array, w: Array, dy: Array, results: dict[str, Array], accumulate: bool
) -> Gradients:
    """Run the program of all gradients; those that have no place yet get one."""
    for name in plan.needs:
        if name not in results:
            results[name] = arrays.empty(plan.shapes[name], plan.problem.dtype)
    gradients = Gradients(results.get("dx"), results.get("dw"), results.get("db"))
    if plan.problem.n:
        plan.run(x, w, dy, *gradients, accumulate)
    else:
        for name in ("dw", "db"):
            if name in results and not accumulate:
                results[name][...] = 0
    return gradients
