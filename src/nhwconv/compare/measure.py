"""Measure the strategies on one pass of one layer: times in interleaved rounds, and errors against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..planning import Plan, make_plan
from ..problem import ConvProblem, Pass
from ..strategies import REGISTRY
from ..timing import LOW, ROUNDS, public_call, time_calls
from ..workloads import Data, Layer, make_data

__all__ = ["Comparison", "Row"]

Array = npt.NDArray[Any]

#: The spread of a call's times reaches up to this percentile.
HIGH = 80


@dataclass(frozen=True)
class Row:
    """What was measured of one strategy.

    Attributes
    ----------
    layer, pass_, strategy, dtype : str
        What was run.
    seconds, spread : float
        The 20th percentile of the calls' times, and how far the 80th lies above it.
    gflops : float
        10^9 operations a second, as a direct convolution counts them.
    error : float
        l2, relative, against float64.
    workspace_bytes : int
        Extra memory of a call, as the plan tells it.
    chosen : bool
        Whether "auto" would choose this strategy.
    """

    layer: str
    pass_: Pass
    strategy: str
    dtype: str
    seconds: float
    spread: float
    gflops: float
    error: float
    workspace_bytes: int
    chosen: bool

    def as_json(self) -> dict[str, Any]:
        """Return the row with the names that the JSON output has."""
        return {"pass" if key == "pass_" else key: value for key, value in vars(self).items()}


class Comparison:
    """One pass of one layer under several strategies. It costs nothing until `steps` is run.

    Parameters
    ----------
    layer : Layer
        The layer.
    pass_ : {"forward", "weight_grad", "input_grad"}
        The pass.
    strategies : tuple of str
        Names from the registry.
    dtype : dtype
        Of the arrays.

    Attributes
    ----------
    plans : dict
        For each strategy that can do the problem, its plan.
    refusals : dict
        For each that cannot, why.
    """

    def __init__(self, layer: Layer, pass_: Pass, strategies: tuple[str, ...], dtype: np.dtype[Any]) -> None:
        self.layer, self.pass_ = layer, pass_
        self.problem = layer.problem(dtype)
        self.chosen = make_plan("compare", self.problem, pass_, "auto").strategy
        self.plans: dict[str, Plan] = {}
        self.refusals: dict[str, str] = {}
        for name in strategies:
            refusal = REGISTRY[name].supports(self.problem, pass_)
            if refusal is None:
                self.plans[name] = make_plan("compare", self.problem, pass_, name)
            else:
                self.refusals[name] = refusal
        self.errors: dict[str, float] = {}
        self.times: dict[str, list[float]] = {name: [] for name in self.plans}

    @property
    def step_count(self) -> int:
        """How many steps `steps` takes."""
        return 1 + len(self.plans) * (1 + ROUNDS)

    def steps(self, seconds: float) -> Iterator[str]:
        """Measure; before each step, yield what it is. Stopping early leaves what was measured in `rows`.

        Parameters
        ----------
        seconds : float
            How long each strategy is timed, all rounds together.
        """
        yield "float64"
        data = make_data(self.problem)
        reference = _reference(self.problem, self.pass_, data)
        calls = {name: public_call(self.problem, self.pass_, data, name) for name in self.plans}
        for name, call in calls.items():
            yield name
            # Whatever is compiled or loaded happens in these two calls, outside every timing.
            self.errors[name] = _error(call(), reference)
            call()
        for _ in range(ROUNDS):
            for name, call in calls.items():
                yield name
                self.times[name] += time_calls(call, seconds / ROUNDS)

    def rows(self) -> list[Row]:
        """Return a row for each strategy that has been timed, in the order in which they were asked for."""
        return [self._row(name) for name, times in self.times.items() if times]

    def _row(self, name: str) -> Row:
        low, high = (float(v) for v in np.percentile(self.times[name], (LOW, HIGH)))
        return Row(
            layer=self.layer.name,
            pass_=self.pass_,
            strategy=name,
            dtype=self.problem.dtype.name,
            seconds=low,
            spread=high - low,
            gflops=self.problem.flops / low / 1e9,
            error=self.errors[name],
            workspace_bytes=self.plans[name].workspace,
            chosen=name == self.chosen,
        )


def _reference(problem: ConvProblem, pass_: Pass, data: Data) -> Array:
    """The article's tensordot on the same numbers in float64."""
    double = Data(*(array.astype(np.float64) for array in data))
    return public_call(problem, pass_, double, "tensordot")()


def _error(got: Array, reference: Array) -> float:
    norm = max(float(np.linalg.norm(reference)), float(np.finfo(np.float64).tiny))
    return float(np.linalg.norm(got.astype(np.float64) - reference)) / norm
