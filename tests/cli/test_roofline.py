"""The machine's limits: what is made of what was timed, and what that is."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from nhwconv.cli import roofline
from nhwconv.cli.roofline import Roofline, measure, peak_call
from nhwconv.runtime import machine
from nhwconv.workloads import parse_layer


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What calls take, whatever they are; nothing is remembered from before, and nothing afterwards."""
    times = [0.5, 0.25, 1.0]
    monkeypatch.setattr(roofline, "time_calls", lambda call, seconds: (call(), times)[1])
    for remembered in (roofline._peak, roofline._bandwidth):
        remembered.cache_clear()
    yield times
    for remembered in (roofline._peak, roofline._bandwidth):
        remembered.cache_clear()


def test_the_least_time_is_that_of_the_arithmetic_or_of_the_bytes() -> None:
    problem = parse_layer("n1h4w4c2d3k1").problem()  # 2 * 16 * 6 FLOPs; 32 + 6 + 48 numbers
    assert Roofline(1, peak=192.0, bandwidth=1e9).seconds(problem) == 1.0
    assert Roofline(1, peak=1e9, bandwidth=43.0).seconds(problem) == 8.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits_are_work_over_the_least_time(dtype: type, seconds: list[float]) -> None:
    """Of as many threads as Numba uses; and copying, which moves twice as much, wins where it takes as long."""
    limits = measure(np.dtype(dtype))
    _, flops = peak_call(np.dtype(dtype), machine.threads())
    assert limits == Roofline(machine.threads(), flops / 0.25, 2 * roofline.STREAM / 0.25)


def test_the_work_grows_with_the_threads() -> None:
    one, three = (peak_call(np.dtype(np.float32), threads)[1] for threads in (1, 3))
    assert three == 3 * one


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
    timed: list[Callable[[], object]] = []
    monkeypatch.setattr(roofline, "time_calls", lambda call, _: timed.append(call) or seconds)
    assert measure(np.dtype(np.float32)) == measure(np.dtype(np.float32))
    assert len(timed) == 3  # multiplying, reading, copying
