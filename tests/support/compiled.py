"""Users' functions that call the public ones in compiled code, and what is done with them in processes of their own."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np

import nhwconv as nc
import threaded
from cases import Case, Data, data_of

# Options are values here, so that one compilation serves all cases.


@numba.njit
def forward(x, w, b, stride, padding, dilation, groups, strategy):
    return nc.conv2d(x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups, strategy=strategy)


@numba.njit
def weight_grad(x, dy, size, stride, padding, dilation, groups, strategy):
    return nc.conv2d_weight_grad(
        x, dy, size, stride=stride, padding=padding, dilation=dilation, groups=groups, strategy=strategy
    )


@numba.njit
def input_grad(dy, w, size, stride, padding, dilation, groups, strategy):
    return nc.conv2d_input_grad(
        dy, w, size, stride=stride, padding=padding, dilation=dilation, groups=groups, strategy=strategy
    )


@numba.njit
def backward(x, w, dy, stride, padding, dilation, groups, strategy):
    return nc.conv2d_backward(
        x, w, dy, stride=stride, padding=padding, dilation=dilation, groups=groups, strategy=strategy
    )


@numba.njit
def bias_grad(dy):
    return nc.conv2d_bias_grad(dy)


@numba.njit(nogil=True)
def padded(x, w):
    return nc.conv2d(x, w, padding=1)


def options(case: Case, strategy: str = "auto") -> tuple[Any, ...]:
    """Return the options of a case, by position."""
    return case.stride, case.padding, case.dilation, case.groups, strategy


def run(case: Case, data: Data, pass_: str, strategy: str) -> np.ndarray:
    """Run one pass in compiled code."""
    if pass_ == "forward":
        return forward(data.x, data.w, None, *options(case, strategy))
    if pass_ == "weight_grad":
        return weight_grad(data.x, data.dy, (case.kh, case.kw), *options(case, strategy))
    return input_grad(data.dy, data.w, (case.h, case.w), *options(case, strategy))


#: Small enough for one thread, and large enough for several.
SMALL = Case(n=1, h=8, w=8, c=4, d=8, padding=((1, 1), (1, 1)))
LARGE = Case(n=8, h=28, w=28, c=32, d=32, padding=((1, 1), (1, 1)))


def count_of_questions() -> list[int]:
    """Return a list whose only number is how often Python is asked from now on."""
    from nhwconv.njit import answers

    asked, serve = [0], answers.serve

    def counting(*arguments: int) -> int:
        asked[0] += 1
        return serve(*arguments)

    answers.serve = counting
    return asked


# --------------------------------------------------------------------------------------------- threads


@numba.njit(parallel=True)
def each_image(x, w, y):
    """Workers call themselves."""
    for i in numba.prange(len(x)):
        y[i] = nc.conv2d(x[i], w, padding=1)


@numba.njit(parallel=True)
def each_batch(x, w, y):
    """Workers call what calls, with batches large enough for several threads."""
    for i in numba.prange(4):
        y[i] = padded(x, w)


def print_workers() -> None:
    """Call from workers of users' loops, from many threads, and from children; print the threading layer."""
    threaded.load_tbb()
    data = data_of(LARGE, np.float32)
    expected = nc.conv2d(data.x, data.w, padding=1)
    y = np.zeros_like(expected)
    each_image(data.x, data.w, y)
    np.testing.assert_array_equal(y, expected)
    ys = np.zeros((4, *expected.shape), np.float32)
    each_batch(data.x, data.w, ys)
    assert nc.plan("forward", data.x.shape, data.w.shape, padding=1).program().workers > 1
    for y in ys:
        np.testing.assert_array_equal(y, expected)
    with ThreadPoolExecutor(8) as pool:
        for y in pool.map(lambda _: padded(data.x, data.w), range(64)):
            np.testing.assert_array_equal(y, expected)
    print(numba.threading_layer())


def print_children() -> None:
    """Call in children of a process that has launched: in a new shape, and in a known one."""
    threaded.load_tbb()
    data = data_of(LARGE, np.float32)
    expected = padded(data.x, data.w)

    def work() -> None:
        np.testing.assert_array_equal(padded(data.x, data.w), expected)
        np.testing.assert_array_equal(padded(data.x[:5], data.w), expected[:5])

    threaded.in_child(work)
    threaded.in_child(lambda: threaded.in_child(work))
    work()
    print(numba.threading_layer())


@numba.njit(nogil=True)
def calls_behind(started, x, w, count):
    """Say that it runs, and then call so often."""
    total = 0.0
    started[0] = 1
    for _ in range(count):
        total += nc.conv2d(x, w, padding=1)[0, 0, 0, 0]
    started[1] = 1
    return total


def print_behind_the_gil() -> None:
    """Hold the GIL until calls in another thread have ended; print whether they did."""
    data = data_of(SMALL, np.float32)
    calls_behind(np.zeros(2), data.x, data.w, 1)
    started = np.zeros(2)
    thread = threading.Thread(target=calls_behind, args=(started, data.x, data.w, 20_000))
    sys.setswitchinterval(1e-6)
    thread.start()
    while not started[0]:
        time.sleep(0)
    sleep = ctypes.PyDLL(None).usleep  # which keeps the GIL
    for _ in range(600):
        sleep(100_000)
        if started[1]:
            break
    print(bool(started[1]))
    thread.join()


# ---------------------------------------------------------------------------------------------- caches

#: A user's module, whose function Numba keeps.
MODULE = """
import numba
import nhwconv as nc

PLAN = nc.plan("forward", (1, 8, 8, 4), (8, 3, 3, 4), padding=1)

@numba.njit(cache=True)
def gradients(x, w, dy):
    return nc.conv2d(x, w, padding="same"), nc.conv2d_backward(x, w, dy, padding=1, strategy=("loop", "winograd"))

@numba.njit(cache=True)
def planned(plan, x, w, dy):
    return PLAN(x, w), plan(x, dy)
"""


def print_kept(folder: str) -> None:
    """Call a function that Numba keeps; print whether it was loaded, and from where the package is."""
    sys.path.insert(0, folder)
    import kept

    data = data_of(SMALL, np.float32)
    y, gradients = kept.gradients(data.x, data.w, data.dy)
    np.testing.assert_array_equal(y, nc.conv2d(data.x, data.w, padding=1))
    expected = nc.conv2d_backward(data.x, data.w, data.dy, padding=1, strategy=("loop", "winograd"))
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    plan = nc.plan("weight_grad", data.x.shape, data.w.shape, padding=1)
    got, want = (f(plan, data.x, data.w, data.dy) for f in (kept.planned, kept.planned.py_func))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    print(
        min(len(f.stats.cache_hits) for f in (kept.gradients, kept.planned)),
        nc.__version__,
        Path(nc.__file__).parents[1],
    )


def print_other_layout(folder: str) -> None:
    """Call a function that was compiled for another layout; print what it says."""
    sys.path.insert(0, folder)
    import kept

    data = data_of(SMALL, np.float32)
    try:
        kept.gradients(data.x, data.w, data.dy)
    except RuntimeError as error:
        print(error)


# ---------------------------------------------------------------------------------------------- memory


@numba.njit
def many(x, w, dy, count):
    total = 0.0
    for _ in range(count):
        y = nc.conv2d(x, w)
        gradients = nc.conv2d_backward(x, w, dy)
        total += y[0, 0, 0, 0] + gradients.dx[0, 0, 0, 0]
    return total


def print_leaks(count: str) -> None:
    """Print how many allocations of so many calls are not freed, and how many there are."""
    from numba.core.runtime import rtsys

    x, w, dy = (np.ones(shape, np.float32) for shape in ((1, 3, 3, 1), (1, 3, 3, 1), (1, 1, 1, 1)))
    many(x, w, dy, 1)
    before = rtsys.get_allocation_stats()
    many(x, w, dy, int(count) // 2)
    after = rtsys.get_allocation_stats()
    made, freed = after.mi_alloc - before.mi_alloc, after.mi_free - before.mi_free
    print(made - freed, made >= int(count))
