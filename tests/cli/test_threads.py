"""Threads of Numba and of BLAS are set together, and put back."""

import numba
import pytest
import threadpoolctl

from nhwconv.cli.threads import blas_follows, threads


def blas() -> set[int]:
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}


def test_both_are_limited_and_put_back() -> None:
    before = numba.get_num_threads(), blas()
    with threads(1):
        assert numba.get_num_threads() == 1
        assert blas() == ({1} if blas_follows() else set())
    assert (numba.get_num_threads(), blas()) == before


def test_without_a_number_blas_follows_numba() -> None:
    with threads(1), threadpoolctl.threadpool_limits(2, user_api="blas"), threads(None):
        assert numba.get_num_threads() == 1
        assert blas() <= {1}


def test_a_number_that_numba_cannot_have_changes_nothing() -> None:
    before = numba.get_num_threads(), blas()
    with pytest.raises(ValueError, match="must be between"), threads(0):
        pass
    assert (numba.get_num_threads(), blas()) == before
