"""How calls are timed, by clocks that only the tests move: hot, cold, and not disturbed by what was before."""

from itertools import pairwise

import numpy as np
import pytest

from clock import Clock
from nhwconv import timing
from nhwconv.workloads import Data


def settled(monkeypatch: pytest.MonkeyPatch, busy: list[float]) -> int:
    """Return how often `settle` sleeps where this process computes for so long in each sleep, the last for ever."""
    spent, sleeps = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal spent, sleeps
        spent += busy[min(sleeps, len(busy) - 1)]
        sleeps += 1

    monkeypatch.setattr(timing, "sleep", sleep)
    monkeypatch.setattr(timing, "process_time", lambda: spent)
    timing.settle()
    return sleeps


def test_threads_that_spin_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would take a core from what is timed next."""
    assert settled(monkeypatch, [0.005, 0.005, 0.002, 0.0]) == 4
    assert settled(monkeypatch, [0.0]) == 1


def test_threads_that_never_sleep_are_not_waited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that computes meanwhile is timed as it is."""
    assert settled(monkeypatch, [0.005]) == 50


def test_the_first_of_several_calls_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds cold caches, and threads asleep."""
    clock = Clock(monkeypatch.setattr)
    calls = iter([0.5, *[0.25] * 9])
    assert timing.time_calls(lambda: clock.pass_(next(calls)), 1.0) == [0.25, 0.25]
    assert timing.time_calls(lambda: clock.pass_(2.0), 1.0) == [2.0]


def test_a_first_call_is_what_it_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch.setattr)
    calls = iter([(0.75, "first"), (0.25, "second")])

    def call() -> str:
        seconds, result = next(calls)
        clock.pass_(seconds)
        return result

    assert timing.call_twice(call) == ("second", 0.5)


class Result:
    """Counts those that live."""

    alive = 0

    def __init__(self) -> None:
        Result.alive += 1

    def __del__(self) -> None:
        Result.alive -= 1


def test_cold_calls_take_turns_and_their_results_live_until_the_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, made, living = Clock(monkeypatch.setattr), [], []

    def call(index: int) -> Result:
        made.append(index)
        living.append(Result.alive)
        clock.pass_(0.25 * (1 + index))
        return Result()

    times = timing.time_cold([lambda i=i: call(i) for i in range(3)], 3.0)
    assert all(after == (before + 1) % 3 for before, after in pairwise(made))
    assert times == [0.5, 0.75, 0.25, 0.5, 0.75, 0.25]  # until 3 s have passed, after one turn and a call unmeasured
    assert max(living) == 3
    assert Result.alive == 0


def test_each_cold_call_is_timed_once_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch.setattr)
    assert timing.time_cold([lambda: clock.pass_(2.0)] * 4, 0.5) == [2.0] * 4


@pytest.mark.parametrize(("elements", "sets"), [(1, 64), (2**20, 12), (10**8, 3)])
def test_arrays_of_cold_calls_fit_no_cache_together(elements: int, sets: int) -> None:
    """Four arrays of so many float32 elements each: 192 MiB of them, and at least 3 sets, at most 64."""

    class Sized(np.ndarray):
        """Says to be larger than it is."""

        @property
        def nbytes(self) -> int:  # type: ignore[override]
            return 4 * elements

    data = Data(*(np.arange(3.0).view(Sized) for _ in range(4)))
    others = timing.other_data(data)
    assert len(others) == sets
    for other in others:
        for copied, array in zip(other, data, strict=True):
            np.testing.assert_array_equal(copied, array)
            assert not np.shares_memory(copied, array)
