"""Stand-ins for other libraries, which a process of their own can import: one that works, and ones that do not."""

from __future__ import annotations

import os
from typing import Any

import numba
import numpy as np
import threadpoolctl

from clock import Clock
from nhwconv.cli.peers import Calls
from nhwconv.cli.threads import set_threads
from nhwconv.problem import ConvProblem, Pass
from nhwconv.timing import public_call
from nhwconv.workloads import Data

#: How long the stand-in's first call takes, and each later one, by a clock that nothing else moves.
FIRST, LATER = 0.3, 0.001


def _same(result: Any) -> Any:
    return result


def honest(problem: ConvProblem, pass_: Pass, threads: int) -> Calls:
    """The reference, with a first call that takes longer, and calls with other arrays than before that do, too."""
    clock, used = Clock(), []

    def call(data: Data) -> Any:
        clock.pass_(LATER if data.w is used[-1] else 2 * LATER) if used else clock.pass_(FIRST)
        used.append(data.w)
        return public_call(problem, pass_, data, "tensordot")()

    return Calls(lambda data: (data,), call, _same)


def refusing(problem: ConvProblem, pass_: Pass, threads: int) -> Calls:
    """Do forward passes only."""
    if pass_ != "forward":
        raise RuntimeError("no gradients here\nand a second line")
    return honest(problem, pass_, threads)


def forgetful(problem: ConvProblem, pass_: Pass, threads: int) -> Calls:
    """Have no room for arrays of cold calls."""
    calls, prepared = honest(problem, pass_, threads), []

    def prepare(data: Data) -> tuple[Any, ...]:
        if prepared:
            raise MemoryError("no room")
        prepared.append(data)
        return (data,)

    return Calls(prepare, calls.call, _same)


def dying(problem: ConvProblem, pass_: Pass, threads: int) -> Calls:
    """End the process in the middle of a call."""
    return Calls(lambda data: (), lambda: os._exit(7), _same)


def process_id(problem: ConvProblem, pass_: Pass, threads: int) -> Calls:
    """Return the process and the number of threads in place of a result."""
    return Calls(lambda data: (), lambda: (os.getpid(), threads), _same)


def thread_counts(problem: ConvProblem, pass_: Pass, threads: int) -> Calls:
    """Set the threads of this process; return Numba's number and BLAS's in place of a result."""
    set_threads(threads)
    blas = [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return Calls(lambda data: (), lambda: np.array([numba.get_num_threads(), *blas]), _same)
