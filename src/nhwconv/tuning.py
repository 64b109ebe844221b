"""Measure what the planner only predicts, and remember the fastest strategy of each problem."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from . import checks, choices, ops, planning
from .ops import Padding, Size, StrategyName
from .planning import Plan
from .problem import ConvProblem, Pass
from .strategies import AUTO
from .timing import ROUNDS, low, public_call, time_calls
from .workloads import make_data

__all__ = ["Contest", "tune"]

#: A candidate is dropped after the first round where it took this many times as long as the fastest.
HOPELESS = 1.5


def tune(
    pass_: str,
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    *,
    dtype: npt.DTypeLike = np.float32,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    strategies: StrategyName | None = None,
    seconds: float = 0.2,
) -> Plan:
    """Measure which strategy is the fastest for a pass of a problem, and remember it as the choice of "auto".

    Calls with this problem take the winner from now on, in this process and in later ones, where their `strategy` is
    "auto" or a tuple that has it. Another strategy gives other bits, within the same error bound. Where fewer than two
    candidates can do the problem, nothing is measured or remembered.

    Parameters
    ----------
    pass_ : {"forward", "weight_grad", "input_grad"}
        The pass.
    x_shape, w_shape : tuple of int
        Shapes of x and w, in any form that `conv2d` takes.
    dtype : dtype_like
        Of the arrays.
    stride, padding, dilation, groups
        As in `conv2d`.
    strategies : str or tuple of str, optional
        The candidates, among those that "auto" chooses from; all of these where it is not given.
    seconds : float
        How long each candidate is timed, after a warm-up that compiles it. One that is 1.5 times slower than the best
        in the first of five rounds is timed no more.

    Returns
    -------
    Plan
        What runs from now on.

    Raises
    ------
    ValueError
        Where shapes, sizes or options do not fit together, no candidate can do the problem, or the environment
        variable NHWCONV_TUNING is neither "off", "read" nor "write".
    TypeError
        Where a dtype or the type of an argument is not accepted.

    Warns
    -----
    RuntimeWarning
        Where the choice cannot be written to disk; this process remembers it all the same.

    Notes
    -----
    Measured are calls of the public functions with standard-normal arrays, on as many threads as Numba uses now. The
    choice serves any number of threads.

    It is kept in the cache folder, by CPU, Numba's and nhwconv's version; later processes look there when they plan a
    problem. ``NHWCONV_TUNING=read`` writes nothing, and ``NHWCONV_TUNING=off`` does not look there either; what a
    process tunes itself, it remembers until it ends.

    Examples
    --------
    >>> import nhwconv as nc
    >>> plan = nc.tune("forward", (3, 14, 14, 32), (32, 3, 3, 32), padding=1, seconds=0.01)
    >>> plan.reason
    'it was measured to be the fastest here by nhwconv.tune'
    """
    allowed: StrategyName = "auto" if strategies is None else strategies
    with checks.words_of("tune"):
        for name in planning.strategy_names(allowed):
            if name not in AUTO:
                checks.fail(f'strategies has "{name}", expected any of {", ".join(AUTO)}')
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float, np.integer, np.floating)):
            checks.fail(f"seconds is {seconds!r}, expected a number", TypeError)
        if not (math.isfinite(seconds) and seconds > 0):
            checks.fail(f"seconds is {seconds}, expected more than 0")
        choices.mode()
        planned = ops.plan_for(pass_, x_shape, w_shape, dtype, stride, padding, dilation, groups, allowed)
    contest = Contest(planned)
    for _ in contest.steps(float(seconds)):
        pass
    contest.keep()
    return planning.make_plan(planned.problem, planned.pass_, allowed, planned.form)


class Contest:
    """The candidates for one pass of a problem, measured in alternating rounds. It costs nothing until `steps` is run.

    Parameters
    ----------
    plan : Plan
        Of the problem; its candidates compete.

    Attributes
    ----------
    names : tuple of str
        The candidates; none where there are fewer than two, or where the batch is empty.
    predicted : str
        The one that the planner chooses untuned.
    """

    def __init__(self, plan: Plan) -> None:
        self.problem: ConvProblem = plan.problem
        self.pass_: Pass = plan.pass_
        costs = dict(plan.costs)
        self.predicted = min(costs, key=lambda name: costs[name])
        self.names = tuple(costs) if len(costs) > 1 and self.problem.n else ()
        self._times: dict[str, list[float]] = {}

    @property
    def step_count(self) -> int:
        """How many steps `steps` takes at most."""
        return len(self.names) * (1 + ROUNDS)

    def steps(self, seconds: float) -> Iterator[str]:
        """Measure; before each step, yield the candidate that is next.

        Parameters
        ----------
        seconds : float
            How long each is timed, all rounds together.
        """
        if not self.names:
            return
        data = make_data(self.problem)
        calls = {name: public_call(self.problem, self.pass_, data, name) for name in self.names}
        for name, call in calls.items():
            yield name
            # Whatever is compiled or loaded happens in these two calls, outside every timing.
            call()
            call()
        times: dict[str, list[float]] = {name: [] for name in self.names}
        running = self.names
        for _ in range(ROUNDS):
            for name in running:
                yield name
                times[name] += time_calls(calls[name], seconds / ROUNDS)
            best = min(low(times[name]) for name in running)
            if running == self.names:
                running = tuple(name for name in running if low(times[name]) <= HOPELESS * best)
            if len(running) == 1:
                break
        self._times = times

    @property
    def seconds(self) -> dict[str, float]:
        """What a call of each candidate took; empty before all of `steps` was run."""
        return {name: low(times) for name, times in self._times.items()}

    @property
    def winner(self) -> str:
        """The fastest candidate; the planner's choice where nothing was measured."""
        seconds = self.seconds
        return min(seconds, key=lambda name: seconds[name]) if seconds else self.predicted

    def keep(self) -> None:
        """Remember the winner, if anything was measured."""
        if self._times:
            choices.keep(self.pass_, self.problem, self.winner, self.seconds)
            ops.forget_plans()
