"""The plain loops: the article's sums, in one thread and in several, never chosen by "auto"."""

import numpy as np
import pytest

import fresh
import nhwconv as nc
from cases import PASSES, Case, data_of, exact_of, run
from nhwconv.runtime import executor
from nhwconv.strategies import AUTO, REGISTRY, plain
from tolerance import assert_close

CASE = Case(n=3, h=9, w=8, c=6, d=8, kh=3, kw=2, stride=(2, 1), padding=((1, 0), (2, 1)), dilation=(1, 2), groups=2)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("pass_", PASSES)
def test_both_forms(pass_, workers):
    """Stride, padding, dilation and groups at once; both forms give the same bits."""
    with fresh.workers(workers):
        got = run(CASE, data_of(CASE, np.float64), pass_, "plain")
    assert_close(got, *exact_of(CASE, np.float64, pass_), CASE.length(pass_), "plain")
    assert got.tobytes() == run(CASE, data_of(CASE, np.float64), pass_, "plain").tobytes()


def test_it_is_launched_as_all_else(monkeypatch):
    """By the executor's `launch`, which knows whether that is safe now, for as many threads as there are."""
    seen = []

    def launch(parallel_form, serial_form, workers, *arguments):
        seen.append(workers)
        executor.launch(parallel_form, serial_form, workers, *arguments)

    monkeypatch.setattr(plain, "launch", launch)
    with fresh.workers(4):
        for pass_ in PASSES:
            run(CASE, data_of(CASE, np.float64), pass_, "plain")
    assert seen == [4, 4, 4]


def test_it_is_there_to_be_compared():
    """Listed, but not among those that "auto" chooses from; it takes no memory of its own."""
    assert "plain" in nc.strategies()
    assert "plain" not in AUTO
    assert REGISTRY["plain"].compiled
    plan = nc.plan("forward", CASE.x_shape, CASE.w_shape, **CASE.options, strategy="plain")
    assert plan.workspace == 0
