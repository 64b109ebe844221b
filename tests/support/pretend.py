"""Comparisons of calls that compute nothing and take as long as they are told, by a clock that only they move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from clock import Clock
from nhwconv.cli import measure
from nhwconv.cli.roofline import Roofline
from nhwconv.problem import ConvProblem, Pass
from nhwconv.workloads import Data

__all__ = ["LIMITS", "pretend"]

#: Of the machine that is pretended.
LIMITS = Roofline(threads=2, peak=200e9, bandwidth=40e9)

#: Given a problem, a pass, a strategy, and whether the call is cold: its seconds.
Seconds = Callable[[ConvProblem, Pass, str, bool], float]


def pretend(set_attribute: Callable[[Any, str, Any], None], seconds: Seconds) -> Clock:
    """Let `nhwconv.cli.measure` call what takes so long."""
    clock, hot = Clock(set_attribute), Data(*[np.ones(3)] * 4)

    def public_call(problem: ConvProblem, pass_: Pass, data: Data, strategy: str) -> Callable[[], Any]:
        def call() -> Any:
            clock.pass_(seconds(problem, pass_, strategy, data is not hot))
            return np.ones(3)

        return call

    set_attribute(measure, "public_call", public_call)
    set_attribute(measure, "make_data", lambda problem: hot)
    set_attribute(measure, "other_data", lambda data: [Data(*data) for _ in range(3)])
    set_attribute(measure.roofline, "measure", lambda dtype: LIMITS)
    return clock
