"""What can be called in compiled code: the public functions and plans, by the arrays that they take and give."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .. import one_dimension, ops, transposed
from ..checks import FORWARD_RANKS, INPUT_GRAD_RANKS, WEIGHT_GRAD_RANKS
from ..planning import Plan
from . import layout

__all__ = ["FUNCTIONS", "PLANS", "Function"]

#: What a transposed convolution's program has for the names of its arrays, where they differ.
_EXCHANGED = {"x": "dy", "dy": "x", "y": "dx", "dx": "y"}
Ranks = Mapping[tuple[int, int], int]


@dataclass(frozen=True, eq=False)
class Function:
    """One of them.

    Attributes
    ----------
    public : callable
        What users call.
    inputs, results : tuple of str
        The names of arrays, in the order of the arguments, and of the results.
    ranks : mapping, optional
        The rank of the only result by those of the first two arrays, in two dimensions.
    dimensions : int
        Two, or one.
    exchanged : bool
        Whether the program has dy for what is called x here, and so on: that of a transposed convolution does.
    name : str
        What its messages begin with, where it is not the public one.
    """

    public: Callable[..., Any]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    ranks: Ranks | None = None
    dimensions: int = 2
    exchanged: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.public.__name__)

    @property
    def number(self) -> int:
        """What questions call it."""
        return layout.FUNCTIONS.index(self.name)

    @cached_property
    def parameters(self) -> inspect.Signature:
        """Its arguments, without `self`."""
        found = inspect.signature(self.public)
        return found.replace(parameters=[p for p in found.parameters.values() if p.name != "self"])

    @cached_property
    def folded(self) -> inspect.Signature:
        """The same as Numba takes them: all by position."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([p.replace(kind=kind) for p in self.parameters.parameters.values()])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What its arguments are called here: arrays, which come first, by `inputs`."""
        return *self.inputs, *list(self.parameters.parameters)[len(self.inputs) :]

    def role(self, name: str) -> int:
        """Return the place of an array among those of a program."""
        return layout.ARRAYS.index(_EXCHANGED.get(name, name) if self.exchanged else name)

    def rank(self, result: str, ranks: Mapping[str, int]) -> int:
        """Return the axes of a result, by those of the arrays; any, where no form has these."""
        more = 2 - self.dimensions
        if result == "db":
            return int(ranks["dy"] + more > 2)
        if self.ranks is None:  # a gradient of several is like what it is the gradient of
            return ranks[result[1:]]
        first, second = self.inputs[:2]
        return self.ranks.get((ranks[first] + more, ranks[second] + more), 4) - more


_FORWARD, _BACKWARD, _GRADIENTS = ("x", "w", "b"), ("x", "w", "dy"), ("dx", "dw", "db")

#: The public functions by their names.
FUNCTIONS = {
    function.name: function
    for function in (
        Function(ops.conv2d, _FORWARD, ("y",), FORWARD_RANKS),
        Function(ops.conv2d_weight_grad, ("x", "dy"), ("dw",), WEIGHT_GRAD_RANKS),
        Function(ops.conv2d_bias_grad, ("dy",), ("db",)),
        Function(ops.conv2d_input_grad, ("dy", "w"), ("dx",), INPUT_GRAD_RANKS),
        Function(ops.conv2d_backward, _BACKWARD, _GRADIENTS),
        Function(transposed.conv_transpose2d, _FORWARD, ("y",), INPUT_GRAD_RANKS, exchanged=True),
        Function(transposed.conv_transpose2d_backward, _BACKWARD, _GRADIENTS, exchanged=True),
        Function(one_dimension.conv1d, _FORWARD, ("y",), FORWARD_RANKS, 1),
        Function(one_dimension.conv1d_backward, _BACKWARD, _GRADIENTS, dimensions=1),
        Function(one_dimension.conv_transpose1d, _FORWARD, ("y",), INPUT_GRAD_RANKS, 1, exchanged=True),
        Function(one_dimension.conv_transpose1d_backward, _BACKWARD, _GRADIENTS, dimensions=1, exchanged=True),
    )
}

#: Calls of plans by their passes.
PLANS = {
    pass_: Function(Plan.__call__, (first, second, "b"), (result,), ranks, name="plan")
    for pass_, first, second, result, ranks in (
        ("forward", "x", "w", "y", FORWARD_RANKS),
        ("weight_grad", "x", "dy", "dw", WEIGHT_GRAD_RANKS),
        ("input_grad", "dy", "w", "dx", INPUT_GRAD_RANKS),
    )
}
