"""Races whose winner is known: strategies that take as long as they are told, and leave their mark in y."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import nhwconv as nc
from nhwconv.problem import ConvProblem, Pass
from nhwconv.program import Program
from nhwconv.program import calls as calls_of
from nhwconv.strategies import AUTO, REGISTRY, Wanted

#: A problem that loop and winograd can do, and depthwise cannot.
X, W = (2, 12, 12, 64), (64, 3, 3, 64)
FAST, SLOW = 0.0002, 0.03


def rig(set_attribute: Callable[[Any, str, Any], None], **seconds: float) -> dict[str, int]:
    """Let the forward pass of these strategies take so long; return how often each has been called, to be."""
    calls = dict.fromkeys(seconds, 0)
    for name, pause in seconds.items():

        def forward(*arrays, name=name, pause=pause):  # type: ignore[no-untyped-def]
            calls[name] += 1
            time.sleep(pause)
            arrays[2][...] = AUTO.index(name)

        set_attribute(REGISTRY[name], "program", replaced(name, forward))
    # Plans of its own; afterwards those of before are there again.
    set_attribute(nc.ops, "_plans", {})
    set_attribute(nc.ops, "_calls", {})
    return calls


def replaced(name: str, forward: Callable[..., None]) -> Callable[..., Program]:
    """Return what makes a strategy's programs, but for forward passes: those are one call, of the same price."""
    ordinary = REGISTRY[name].program

    def program(problem: ConvProblem, pass_: Pass, wanted: Wanted) -> Program:
        made = ordinary(problem, pass_, wanted)
        return calls_of(forward, problem, pass_, wanted.bias, made.cycles, 0) if pass_ == "forward" else made

    return program


def ran() -> str:
    """Call conv2d with "auto" and return the name of the strategy that ran."""
    return AUTO[int(nc.conv2d(np.ones(X, np.float32), np.ones(W, np.float32), padding=1)[0, 0, 0, 0])]


def race(winner: str, images: int = X[0]) -> str:
    """Tune with this winner, which is a child's whole work."""
    rig(setattr, **{name: FAST if name == winner else SLOW for name in ("loop", "winograd")})
    return nc.tune("forward", (images, *X[1:]), W, padding=1, seconds=0.01).strategy
