"""How calls are timed: as a user makes them, in rounds, by a low percentile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import cycle
from time import perf_counter, process_time, sleep
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from . import ops
from .problem import ConvProblem, Pass
from .workloads import Data

__all__ = ["LOW", "ROUNDS", "call_twice", "low", "other_data", "public_call", "settle", "time_calls", "time_cold"]

T = TypeVar("T")

#: Each strategy's time is cut into this many slices, so that a slow spell of the machine meets all of them.
ROUNDS = 5

#: Bytes of the arrays that cold calls go through, more than caches hold; and how many sets of arrays that may be.
COLD, FEWEST, MOST = 192 * 2**20, 3, 64

#: The percentile that is a call's time: what disturbs a call only ever makes it slower.
LOW = 20


def public_call(problem: ConvProblem, pass_: Pass, data: Data, strategy: str) -> Callable[[], npt.NDArray[Any]]:
    """Return the call of the public function, as a user would make it, with a new result each time."""
    x, w, b, dy = data
    options: dict[str, Any] = {
        "stride": problem.stride, "padding": problem.padding, "dilation": problem.dilation, "groups": problem.groups,
        "strategy": strategy,
    }  # fmt: skip
    if pass_ == "forward":
        return lambda: ops.conv2d(x, w, b, **options)
    if pass_ == "weight_grad":
        return lambda: ops.conv2d_weight_grad(x, dy, (problem.kh, problem.kw), **options)
    return lambda: ops.conv2d_input_grad(dy, w, (problem.h, problem.w), **options)


def call_twice(call: Callable[[], T]) -> tuple[T, float]:
    """Call twice; return the second result, and how many seconds longer the first took: what it compiled."""
    start = perf_counter()
    call()
    middle = perf_counter()
    result = call()
    return result, max(0.0, 2 * middle - start - perf_counter())


def time_calls(call: Callable[[], Any], seconds: float) -> list[float]:
    """Time one call after another for so many seconds, at least one."""
    times: list[float] = []
    end = perf_counter() + seconds
    while not times or perf_counter() < end:
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    settle()
    return times[1:] or times  # the first finds another strategy's data in cache, and its own threads asleep


def other_data(data: Data) -> list[Data]:
    """Return copies of arrays, so many that all together fit no cache: what cold calls take in turn."""
    count = min(MOST, max(FEWEST, -(-COLD // max(1, sum(array.nbytes for array in data)))))
    return [Data(*(array.copy() for array in data)) for _ in range(count)]


def time_cold(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Time calls in turn, each at least once, for so many seconds, as a network makes them.

    Each call finds its arrays in memory, not in a cache, if each has arrays of its own, and results live until as many
    calls later.
    """
    turn = cycle(calls)
    alive = deque((next(turn)() for _ in range(len(calls) + 1)), maxlen=len(calls))
    times: list[float] = []
    end = perf_counter() + seconds
    while len(times) < len(calls) or perf_counter() < end:
        call = next(turn)
        start = perf_counter()
        result = call()
        times.append(perf_counter() - start)
        alive.append(result)
        del result  # the oldest is dropped with the next call's end, outside of its time
    settle()
    return times


def settle() -> None:
    """Wait until the threads of this process sleep: BLAS's spin for tens of milliseconds, on others' cores."""
    for _ in range(50):
        busy = process_time()
        sleep(0.005)
        if process_time() - busy < 0.001:
            return


def low(times: list[float]) -> float:
    """Return the time that many calls' times stand for."""
    return float(np.percentile(times, LOW))
