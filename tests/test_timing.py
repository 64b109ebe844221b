"""How calls are timed: what one leaves behind does not disturb the next."""

import threading
import time

from nhwconv import timing


def spin(until):
    while time.perf_counter() < until:
        pass


def test_threads_that_spin_are_waited_for():
    """They would take a core from what is timed next."""
    end = time.perf_counter() + 0.1
    spinning = threading.Thread(target=spin, args=(end,))
    spinning.start()
    timing.settle()
    assert time.perf_counter() >= end
    spinning.join()


def test_threads_that_never_sleep_are_not_waited_for_ever():
    """A program that computes meanwhile is timed as it is."""
    stop = threading.Event()
    busy = threading.Thread(target=lambda: [None for _ in iter(stop.is_set, True)])
    busy.start()
    start = time.perf_counter()
    timing.settle()
    assert time.perf_counter() - start < 10
    stop.set()
    busy.join()


def test_the_first_of_several_calls_does_not_count():
    """It finds cold caches, and threads asleep."""
    calls = []
    assert len(timing.time_calls(lambda: calls.append(time.sleep(0.001)), 0.05)) == len(calls) - 1
    assert len(timing.time_calls(lambda: time.sleep(0.02), 0.01)) == 1
