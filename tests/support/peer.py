"""Stand-ins for other libraries, which a process of their own can import: one that works, and ones that do not."""

from __future__ import annotations

import os
import time
from typing import Any

from nhwconv.compare.peers import Calls
from nhwconv.problem import ConvProblem, Pass
from nhwconv.timing import public_call
from nhwconv.workloads import Data


def honest(problem: ConvProblem, pass_: Pass, data: Data, threads: int) -> Calls:
    """The reference, with a first call that takes longer."""
    call, calls = public_call(problem, pass_, data, "tensordot"), []

    def slow_at_first() -> Any:
        if not calls:
            time.sleep(0.3)
        calls.append(1)
        return call()

    return slow_at_first, lambda result: result


def refusing(problem: ConvProblem, pass_: Pass, data: Data, threads: int) -> Calls:
    """Do forward passes only."""
    if pass_ != "forward":
        raise RuntimeError("no gradients here\nand a second line")
    return honest(problem, pass_, data, threads)


def dying(problem: ConvProblem, pass_: Pass, data: Data, threads: int) -> Calls:
    """End the process in the middle of a call."""
    return lambda: os._exit(7), lambda result: result


def process_id(problem: ConvProblem, pass_: Pass, data: Data, threads: int) -> Calls:
    """Return the process and the number of threads in place of a result."""
    return lambda: (os.getpid(), threads), lambda result: result
