"""The executor: it runs steps in order, each task once, in the form that can run now; and operands are what is named.

The bodies here are made for the tests: they write what they were given.
"""

import threading
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest

from nhwconv.codegen.simd import integers, numbers
from nhwconv.program import ARRAYS, Call, Part, Place, Program, Step, places
from nhwconv.runtime import arrays, executor
from nhwconv.runtime.jit import Body
from nhwconv.runtime.records import Record, record


class Scale(Record):
    """What the bodies here know."""

    factor: int
    count: int


@cache
def scale():
    """``target[task] = source[task] * factor + worker-independent rest``; a task is an element."""

    def scale(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, Scale)
        table = integers(operands)
        numbers(table[1], 8)[task] = numbers(table[0], 8)[task] * g.factor + task

    return Body(scale)


@cache
def count_tasks():
    """Count a task's runs, and for each worker its first tasks: (tasks, workers)."""

    def count_tasks(operands, geometry, worker, task, fresh):
        table = integers(operands)
        integers(table[0])[task] += 1
        integers(table[1])[worker] += fresh

    return Body(count_tasks)


@cache
def sum_addresses():
    """Write where all eight operands are."""

    def sum_addresses(operands, geometry, worker, task, fresh):
        table = integers(operands)
        for i in range(8):
            integers(table[7])[i] = table[i]

    return Body(sum_addresses)


def step(body, tasks, *operands, factor=2):
    return Step(body, (Scale(factor=factor, count=tasks),), tasks, places(*operands))


def ids(**named):
    return [id(named[name]) if name in named else 0 for name in ARRAYS]


FORMS = {"serial": 1, "parallel": 5}


@pytest.mark.parametrize("workers", FORMS.values(), ids=FORMS)
def test_steps_run_one_after_another(workers):
    """Each sees what the one before has written, in arrays and in parts; two parts hold different things."""
    middle, other = Part(8 * 100), Part(8 * 100)
    program = Program(
        (
            step(scale(), 100, "x", middle, factor=2),
            step(scale(), 100, middle, other, factor=3),
            step(scale(), 100, other, "y", factor=1),
            step(scale(), 100, middle, "dy", factor=1),
        ),
        workers,
    )
    x, y, dy = np.arange(100.0), np.zeros(100), np.zeros(100)
    for _ in range(3):  # scratch of the run before is met again
        executor.run(program, *ids(x=x, y=y, dy=dy))
        i = np.arange(100)
        np.testing.assert_array_equal(dy, (2 * x + i) + i)
        np.testing.assert_array_equal(y, (2 * x + i) * 3 + 2 * i)
        y[:] = dy[:] = 0


@pytest.mark.parametrize("tasks", [1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_each_task_runs_once(tasks, workers):
    """Whatever the number of workers; `fresh` is said at a worker's first task, and to no more workers than tasks."""
    runs, first = np.zeros(tasks, np.int64), np.zeros(workers, np.int64)
    program = Program((step(count_tasks(), tasks, "x", "w"),), workers)
    executor.run(program, *ids(x=runs, w=first))
    assert (runs == 1).all()
    assert (first <= 1).all()
    assert 1 <= first.sum() <= min(workers, tasks)


def test_operands_are_addresses_with_offsets():
    """Of arrays, and of parts, which start at multiples of a cache line; what is not given is zero."""
    part, rest = Part(72), Part(64)
    operands = ("x", Place("x", 8), "w", part, Place(part, 24), rest, "b", "y")
    x, y = np.zeros(4, np.int64), np.zeros(8, np.int64)
    executor.run(Program((step(sum_addresses(), 1, *operands),)), *ids(x=x, y=y))
    assert y[0] == x.ctypes.data
    assert y[1] == x.ctypes.data + 8
    assert (y[2], y[6]) == (0, 0)
    assert y[4] == y[3] + 24
    assert y[3] % arrays.ALIGNMENT == y[5] % arrays.ALIGNMENT == 0
    assert y[5] >= y[3] + 72
    assert y[7] == y.ctypes.data


def test_addresses_may_be_passed_themselves():
    """By whoever has no NumPy arrays; some of a view's bytes are where the view says."""
    x, y = np.arange(10.0)[4:], np.zeros(6)
    program = Program((step(scale(), 6, "x", "y"),))
    addresses = [{"x": x.ctypes.data, "y": y.ctypes.data}.get(name, 0) for name in ARRAYS]
    executor.run(program, *addresses, header=executor.ADDRESSES)
    np.testing.assert_array_equal(y, 2 * x + np.arange(6))
    y[:] = 0
    executor.run(program, *ids(x=x, y=y))
    np.testing.assert_array_equal(y, 2 * x + np.arange(6))


def test_the_header_is_where_numpy_has_the_address():
    """NumPy's C API has said so since there is NumPy; if it moves, this says so."""
    for array in (np.zeros(3), np.zeros((2, 2), np.float32)[1:], np.zeros(0)):
        word = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_int64 * 1).from_address(id(array) + executor.HEADER))
        assert word[0] == array.ctypes.data


def test_python_steps_get_arrays_of_their_shapes():
    """In the order of the steps, between compiled ones; parts and arrays at their places, nothing copied."""
    part, log = Part(8 * 12 + 8), []

    def call(x, scratch, y):
        log.append((x.shape, scratch.shape, y.shape))
        y[...] = scratch.T.reshape(-1)[:6].reshape(y.shape)

    shapes = (2, 6), (3, 4), (2, 3)
    python = Call(call, places("x", Place(part, 8), "y"), shapes, np.dtype(np.float64))
    before, after = (step(scale(), 12, "x", Place(part, 8)), step(scale(), 6, "y", "dy"))
    program = Program((before, python, after), 3)
    assert not program.native
    x, y, dy = np.arange(12.0), np.zeros((1, 6)), np.zeros(6)
    executor.run_calls(program, {"x": x, "y": y, "dy": dy})
    assert log == [shapes]
    expected = (2 * x + np.arange(12)).reshape(3, 4).T.reshape(-1)[:6]
    np.testing.assert_array_equal(y[0], expected)
    np.testing.assert_array_equal(dy, 2 * expected + np.arange(6))


# --------------------------------------------------------------------------------------- threads and forks


@pytest.fixture
def log(monkeypatch):
    """A launcher of its own; `launch` below appends which form ran."""
    monkeypatch.setattr(executor, "launcher", executor._Launcher())
    return []


def launch(log, workers):
    executor.launch(lambda: log.append("parallel"), lambda: log.append("serial"), workers)


def test_which_form_runs(log):
    """Serial for one worker, in an orphan, and when workqueue is busy; parallel otherwise."""
    launch(log, 1)
    assert executor.launcher.layer is None  # a serial call starts no threads
    launch(log, 2)
    executor.launcher.layer = "workqueue"
    launch(log, 2)
    assert not executor.launcher.inside
    with inside_another_thread():
        launch(log, 2)
        executor.launcher.layer = "omp"
        launch(log, 2)
    executor.launcher.orphaned = True
    launch(log, 2)
    assert log == ["serial", "parallel", "parallel", "serial", "parallel", "serial"]


@contextmanager
def inside_another_thread():
    """As if another thread were inside a workqueue launch."""
    executor.launcher.inside["launch"] = [threading.get_ident() + 1]
    yield
    executor.launcher.leave()


def test_ctrl_c_after_a_claim_locks_nobody_out(log):
    """An interrupt between the claim of workqueue and what gives it back: the thread's next call repairs it."""
    executor.launcher.layer = "workqueue"
    assert executor.launcher.enter()
    launch(log, 2)
    assert log == ["parallel"]
    assert not executor.launcher.inside


def test_a_call_in_a_handler_leaves_the_claim_of_the_call_that_it_interrupts(log):
    """It runs in series: were the claim given back with it, another thread could launch beside the interrupted call."""
    executor.launcher.layer = "workqueue"

    def interrupted():
        launch(log, 2)
        log.append(len(executor.launcher.inside))

    executor.launch(interrupted, interrupted, 2)
    assert log == ["serial", 1]
    assert not executor.launcher.inside


def test_an_error_frees_the_claim(log):
    """A launch that raises does not lock the others out."""
    executor.launcher.layer = "workqueue"

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor.launch(fails, fails, 2)
    assert not executor.launcher.inside


def test_a_child_may_launch_at_once(log, monkeypatch):
    """The thread that was inside a launch does not exist in the child; whether OpenMP ran is remembered there."""
    executor.launcher.layer = "workqueue"
    monkeypatch.setattr(executor, "threading_layer", lambda: "workqueue")
    with inside_another_thread():
        executor.launcher.before_fork()
        executor.launcher.after_fork()
        launch(log, 2)
    assert log == ["parallel"]
    monkeypatch.setattr(executor, "threading_layer", lambda: "omp")
    monkeypatch.setattr(executor.parallel, "_is_initialized", True)
    executor.launcher.before_fork()
    executor.launcher.after_fork()
    launch(log, 2)
    assert log == ["parallel", "serial"]
