"""The machine's limits: what they mean, and that what is measured is possible."""

from __future__ import annotations

import numpy as np
import pytest

from nhwconv.compare.roofline import Roofline, measure
from nhwconv.runtime import machine
from nhwconv.timing import low, public_call, time_calls
from nhwconv.workloads import make_data, parse_layer


def test_the_least_time_is_that_of_the_arithmetic_or_of_the_bytes() -> None:
    problem = parse_layer("n1h4w4c2d3k1").problem()  # 2 * 16 * 6 FLOPs; 32 + 6 + 48 numbers
    assert Roofline(1, peak=192.0, bandwidth=1e9).seconds(problem) == 1.0
    assert Roofline(1, peak=1e9, bandwidth=43.0).seconds(problem) == 8.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_peak_is_one_that_this_cpu_can_have_and_no_call_passes_it(dtype: type) -> None:
    limits = measure(np.dtype(dtype))
    assert limits.threads == machine.threads()
    a_cycle = machine.flops_a_cycle(np.dtype(dtype).itemsize) * limits.threads
    assert limits.peak < a_cycle * 7e9  # no CPU has 7 GHz
    assert limits.bandwidth > 1e8
    problem = parse_layer("n4h16w16c64d64k3").problem(dtype)
    call = public_call(problem, "forward", make_data(problem), "loop")
    call()
    # A direct convolution; 10% for a clock that has changed between the two.
    assert problem.flops / low(time_calls(call, 0.2)) < 1.1 * limits.peak


def test_it_is_measured_once() -> None:
    assert measure(np.dtype(np.float32)) == measure(np.dtype(np.float32))
