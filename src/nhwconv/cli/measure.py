"""Measure strategies and peers on one pass of one layer: times in interleaved rounds, errors, memory, first calls."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .. import arrays
from ..arrays import Array
from ..planning import Plan, make_plan
from ..problem import ConvProblem, Pass
from ..strategies import REGISTRY
from ..timing import LOW, ROUNDS, call_twice, public_call, time_calls
from ..workloads import Data, Layer, make_data
from . import roofline
from .engines import EngineError, EngineProcess, first_call_in_new_process
from .roofline import Roofline

__all__ = ["Comparison", "Row"]

#: The spread of a call's times reaches up to this percentile.
HIGH = 80


@dataclass(frozen=True)
class Row:
    """What was measured of one strategy, or of a peer.

    Attributes
    ----------
    layer, pass_, strategy, dtype : str
        What was run; a peer's name stands in the place of a strategy's.
    seconds, spread, median : float
        The 20th percentile of the calls' times, how far the 80th lies above it, and the 50th.
    gflops : float
        10^9 operations a second, as a direct convolution counts them.
    peak_fraction, roofline_fraction : float
        The part of this machine's peak, and the part that the roofline's time is of `seconds`. More than 1 is possible:
        Winograd multiplies less than a direct convolution, and small arrays stay in the caches.
    error : float
        l2, relative, against float64.
    workspace_bytes : int or None
        Extra memory of a call, as the plan tells it.
    peak_bytes : int or None
        The most memory in NumPy arrays that a call held at a time, other than its arguments and its result: measured.
    compile_seconds : float
        What the first call took longer than the second.
    chosen : bool
        Whether "auto" would choose this strategy.
    """

    layer: str
    pass_: Pass
    strategy: str
    dtype: str
    seconds: float
    spread: float
    median: float
    gflops: float
    peak_fraction: float
    roofline_fraction: float
    error: float
    workspace_bytes: int | None
    peak_bytes: int | None
    compile_seconds: float
    chosen: bool

    def as_json(self) -> dict[str, Any]:
        """Return the row with the names that files have."""
        return {"pass" if key == "pass_" else key: value for key, value in vars(self).items()}


@dataclass(frozen=True)
class _Start:
    """What the first calls of a contender told."""

    error: float
    compile_seconds: float
    peak_bytes: int | None


class _Contender(Protocol):
    def begin(self) -> tuple[Array, float]:
        """Call twice; return a result, and how much longer the first call took than the second."""

    def time(self, seconds: float) -> list[float]:
        """Time call after call for so many seconds."""


class _Here:
    """A strategy, called in this process."""

    def __init__(self, problem: ConvProblem, pass_: Pass, data: Data, strategy: str) -> None:
        self.call = public_call(problem, pass_, data, strategy)

    def begin(self) -> tuple[Array, float]:
        return call_twice(self.call)

    def peak_bytes(self) -> int:
        """Return the most memory in NumPy arrays beside arguments and result; buffers kept for reuse count as new."""
        arrays.release()
        tracemalloc.start()
        try:
            result = self.call()
            return max(0, tracemalloc.get_traced_memory()[1] - result.nbytes)
        finally:
            tracemalloc.stop()

    def time(self, seconds: float) -> list[float]:
        return time_calls(self.call, seconds)


class _There:
    """A peer, called in a process of its own."""

    def __init__(self, engine: EngineProcess, problem: ConvProblem, pass_: Pass) -> None:
        self.engine, self.problem, self.pass_ = engine, problem, pass_

    def begin(self) -> tuple[Array, float]:
        return self.engine.begin(self.problem, self.pass_)

    def time(self, seconds: float) -> list[float]:
        return self.engine.time(seconds)


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
    peers : mapping of str to EngineProcess
        Other libraries, by their names; they must have been started when `steps` is run.
    cold : bool
        Whether the first call is measured in a process of its own with nothing compiled, not in this one.

    Attributes
    ----------
    plans : dict
        For each strategy that can do the problem, its plan.
    refusals : dict
        For each strategy or peer that cannot, why.
    """

    def __init__(
        self,
        layer: Layer,
        pass_: Pass,
        strategies: tuple[str, ...],
        dtype: np.dtype[Any],
        peers: Mapping[str, EngineProcess] | None = None,
        cold: bool = False,
    ) -> None:
        self.layer, self.pass_, self.peers, self.cold = layer, pass_, dict(peers or {}), cold
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
        self.times: dict[str, list[float]] = {name: [] for name in (*self.plans, *self.peers)}
        self._starts: dict[str, _Start] = {}

    @property
    def step_count(self) -> int:
        """How many steps `steps` takes."""
        return 2 + len(self.times) * (1 + ROUNDS)

    @property
    def limits(self) -> Roofline:
        """The machine's peak and bandwidth, measured once a process and number of threads."""
        return roofline.measure(self.problem.compute_dtype)

    def steps(self, seconds: float) -> Iterator[str]:
        """Measure; before each step, yield what it is. Stopping early leaves what was measured in `rows`.

        Parameters
        ----------
        seconds : float
            How long each strategy is timed, all rounds together.
        """
        yield "this machine's peak"
        _ = self.limits
        yield "float64"
        data = make_data(self.problem)
        reference = _reference(self.problem, self.pass_, data)
        contenders: dict[str, _Contender] = {}
        for name in self.times:
            yield name
            try:
                contenders[name] = self._begin(name, data, reference)
            except EngineError as error:
                self.refusals[name] = str(error)
        for _ in range(ROUNDS):
            for name in self.times:
                yield name
                if name in contenders:
                    self.times[name] += contenders[name].time(seconds / ROUNDS)

    def _begin(self, name: str, data: Data, reference: Array) -> _Contender:
        """Make the first calls, which compile or load whatever is needed: outside every timing."""
        if name in self.peers:
            peer = _There(self.peers[name], self.problem, self.pass_)
            result, compiling = peer.begin()
            self._starts[name] = _Start(_error(result, reference), compiling, None)
            return peer
        here = _Here(self.problem, self.pass_, data, name)
        result, compiling = here.begin()
        if self.cold:
            compiling = first_call_in_new_process(self.problem, self.pass_, name)
        self._starts[name] = _Start(_error(result, reference), compiling, here.peak_bytes())
        return here

    def rows(self) -> list[Row]:
        """Return a row for each contender that has been timed, in the order in which they were asked for."""
        return [self._row(name) for name, times in self.times.items() if times]

    def undecided(self) -> list[str]:
        """Return the fastest and those that its spread does not tell from it; nothing where it is clear."""
        rows = sorted(self.rows(), key=lambda row: row.seconds)
        near = [row.strategy for row in rows if row.seconds <= rows[0].seconds + rows[0].spread]
        return near if len(near) > 1 else []

    def _row(self, name: str) -> Row:
        low, median, high = (float(v) for v in np.percentile(self.times[name], (LOW, 50, HIGH)))
        flops, start = self.problem.flops, self._starts[name]
        return Row(
            layer=self.layer.name,
            pass_=self.pass_,
            strategy=name,
            dtype=self.problem.dtype.name,
            seconds=low,
            spread=high - low,
            median=median,
            gflops=flops / low / 1e9,
            peak_fraction=flops / low / self.limits.peak,
            roofline_fraction=self.limits.seconds(self.problem) / low,
            error=start.error,
            workspace_bytes=self.plans[name].workspace if name in self.plans else None,
            peak_bytes=start.peak_bytes,
            compile_seconds=start.compile_seconds,
            chosen=name == self.chosen,
        )


def _reference(problem: ConvProblem, pass_: Pass, data: Data) -> Array:
    """The article's tensordot on the same numbers in float64."""
    double = Data(*(array.astype(np.float64) for array in data))
    return public_call(problem, pass_, double, "tensordot")()


def _error(got: Array, reference: Array) -> float:
    norm = max(float(np.linalg.norm(reference)), float(np.finfo(np.float64).tiny))
    return float(np.linalg.norm(got.astype(np.float64) - reference)) / norm
