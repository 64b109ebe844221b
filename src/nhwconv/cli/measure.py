"""Measure strategies and peers on one pass of one layer: times in interleaved rounds, errors, memory, first calls.

A hot call finds its arrays where the call before left them; a cold one, as inside a network, has other arrays.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..checks import words_of
from ..planning import Plan, make_plan
from ..problem import ConvProblem, Pass
from ..runtime import arrays
from ..runtime.arrays import Array
from ..strategies import REGISTRY
from ..timing import LOW, ROUNDS, call_twice, other_data, public_call, time_calls, time_cold
from ..workloads import Data, make_data
from . import roofline
from .cases import Case
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
    network, count : str, int
        The network, or the log, that the layer belongs to, and how often it occurs there; empty and 1 for others.
    seconds, spread, median : float
        The 20th percentile of the hot calls' times, how far the 80th lies above it, and the 50th.
    cold : float or None
        The 50th percentile of the cold calls' times; None where there were none.
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
    network: str
    count: int
    seconds: float
    spread: float
    median: float
    cold: float | None
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

    def time_cold(self, seconds: float) -> list[float]:
        """Time calls for so many seconds, each with other arrays."""


class _Here:
    """A strategy, called in this process."""

    def __init__(self, problem: ConvProblem, pass_: Pass, data: Data, others: list[Data], strategy: str) -> None:
        self.call = public_call(problem, pass_, data, strategy)
        self.cold = [public_call(problem, pass_, other, strategy) for other in others]

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

    def time_cold(self, seconds: float) -> list[float]:
        return time_cold(self.cold, seconds)


class _There:
    """A peer, called in a process of its own."""

    def __init__(self, engine: EngineProcess, problem: ConvProblem, pass_: Pass) -> None:
        self.engine, self.problem, self.pass_ = engine, problem, pass_

    def begin(self) -> tuple[Array, float]:
        return self.engine.begin(self.problem, self.pass_)

    def time(self, seconds: float) -> list[float]:
        return self.engine.time(seconds)

    def time_cold(self, seconds: float) -> list[float]:
        return self.engine.time_cold(seconds)


class Comparison:
    """One pass of one layer under several strategies. It costs nothing until `steps` is run.

    Parameters
    ----------
    case : Case
        The layer and the pass.
    strategies : tuple of str
        Names from the registry.
    dtype : dtype
        Of the arrays.
    peers : mapping of str to EngineProcess
        Other libraries, by their names; they must have been started when `steps` is run.
    cold : bool
        Whether cold calls are timed, too.
    first_call : bool
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
        case: Case,
        strategies: tuple[str, ...],
        dtype: np.dtype[Any],
        peers: Mapping[str, EngineProcess] | None = None,
        cold: bool = False,
        first_call: bool = False,
    ) -> None:
        self.case, self.peers, self.cold, self.first_call = case, dict(peers or {}), cold, first_call
        self.problem, pass_ = case.layer.problem(dtype), case.pass_
        with words_of("compare"):
            self.chosen = make_plan(self.problem, pass_, "auto").strategy
        self.plans: dict[str, Plan] = {}
        self.refusals: dict[str, str] = {}
        for name in strategies:
            refusal = REGISTRY[name].supports(self.problem, pass_)
            if refusal is None:
                self.plans[name] = make_plan(self.problem, pass_, name)
            else:
                self.refusals[name] = refusal
        self.times: dict[str, list[float]] = {name: [] for name in (*self.plans, *self.peers)}
        self.cold_times: dict[str, list[float]] = {name: [] for name in self.times}
        self._starts: dict[str, _Start] = {}

    @property
    def step_count(self) -> int:
        """How many steps `steps` takes."""
        return 2 + len(self.times) * (1 + ROUNDS * (2 if self.cold else 1))

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
        reference = _reference(self.problem, self.case.pass_, data)
        others = other_data(data) if self.cold else []
        contenders: dict[str, _Contender] = {}
        for name in self.times:
            yield name
            with self._refusing(name):
                contenders[name] = self._begin(name, data, others, reference)
        for cold in (False, True) if self.cold else (False,):
            for _ in range(ROUNDS):
                for name in self.times:
                    yield f"{name} cold" if cold else name
                    if name not in self.refusals:
                        self._time(name, contenders[name], cold, seconds / ROUNDS)

    @contextmanager
    def _refusing(self, name: str) -> Iterator[None]:
        """Let what a peer cannot do be a refusal."""
        try:
            yield
        except EngineError as error:
            self.refusals[name] = str(error)

    def _time(self, name: str, contender: _Contender, cold: bool, seconds: float) -> None:
        with self._refusing(name):
            if cold:
                self.cold_times[name] += contender.time_cold(seconds)
            else:
                self.times[name] += contender.time(seconds)

    def _begin(self, name: str, data: Data, others: list[Data], reference: Array) -> _Contender:
        """Make the first calls, which compile or load whatever is needed: outside every timing."""
        pass_ = self.case.pass_
        if name in self.peers:
            peer = _There(self.peers[name], self.problem, pass_)
            result, compiling = peer.begin()
            self._starts[name] = _Start(_error(result, reference), compiling, None)
            return peer
        here = _Here(self.problem, pass_, data, others, name)
        result, compiling = here.begin()
        if self.first_call:
            compiling = first_call_in_new_process(self.problem, pass_, name)
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
        flops, start, cold = self.problem.flops, self._starts[name], self.cold_times[name]
        return Row(
            layer=self.case.layer.name,
            pass_=self.case.pass_,
            strategy=name,
            dtype=self.problem.dtype.name,
            network=self.case.network,
            count=self.case.count,
            seconds=low,
            spread=high - low,
            median=median,
            cold=float(np.median(cold)) if cold else None,
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
