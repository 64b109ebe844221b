"""Threads and forks: the same bits however many there are, and calls that survive them, under every threading layer."""

import importlib.util
import multiprocessing
import os
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from nhwconv.kernels import jit

import child
import threaded
from cases import DTYPES, PASSES, TYPICAL, data_of, random_case, refusal, run
from extent import FORM, amount
from nhwconv import machine
from nhwconv.strategies import AUTO, REGISTRY

LAYERS = ["workqueue", "omp", "tbb"]
each_layer = pytest.mark.parametrize("layer", LAYERS)


@pytest.fixture(autouse=True)
def _skip_absent_layers(request):
    layer = request.node.callspec.params.get("layer") if hasattr(request.node, "callspec") else None
    if layer == "tbb" and threaded.find_tbb() is None:
        pytest.skip("tbb is not installed")
    if layer == "omp":
        pytest.importorskip("numba.np.ufunc.omppool", exc_type=ImportError)


class Form:
    """Replaces `Kernel.__call__`: every kernel runs in one form, and calls are counted."""

    def __init__(self, name):
        self.name, self.calls = name, 0

    def __get__(self, kernel, owner=None):
        def call(*arguments, workers):
            self.calls += 1
            jit._launcher.start()
            getattr(kernel, self.name)(*arguments)

        return call


def bits(monkeypatch, case, dtype, pass_, strategy, form, workers):
    """Return a result's bits when every kernel runs in this form, with so many workers."""
    with monkeypatch.context() as patch:
        patch.setattr(machine, "threads", lambda: workers)
        patch.setattr(jit.Kernel, "__call__", form)
        return run(case, data_of(case, dtype), pass_, strategy).tobytes()


RNG = np.random.default_rng(5)
STEADY = [*TYPICAL, replace(TYPICAL[2], groups=1, padding=((0, 0), (0, 0)))]
SOME = [*threaded.LARGE, threaded.SMALL, *(random_case(RNG) for _ in range(8))]


@pytest.mark.parametrize("strategy", AUTO)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_serial_twins_give_the_bits_of_parallel_kernels(dtype, pass_, strategy, monkeypatch):
    """One worker or five, in one thread or several: the bits are the same."""
    serial, parallel = Form("serial"), Form("parallel")
    compared = 0
    for case in SOME:
        problem_refused = REGISTRY[strategy].supports(problem_of(case, pass_, dtype), pass_)
        if case.n == 0 or problem_refused:
            continue
        expected = bits(monkeypatch, case, dtype, pass_, strategy, serial, 1)
        for form, workers in ((parallel, 1), (serial, 2), (parallel, 2), (parallel, 3), (serial, 5), (parallel, 5)):
            assert bits(monkeypatch, case, dtype, pass_, strategy, form, workers) == expected, (
                form.name,
                workers,
                case,
            )
        compared += 1
    assert compared
    assert serial.calls >= compared
    assert parallel.calls >= compared


def problem_of(case, pass_, dtype):
    import nhwconv as nc

    return nc.plan(pass_, case.x_shape, case.w_shape, dtype=dtype, **case.options, strategy="tensordot").problem


def test_bits_depend_on_no_number_of_threads_and_no_layer():
    """NUMBA_NUM_THREADS and set_num_threads up to 16, more than any cores, three threading layers: one hash."""
    code = "import sys, threaded; threaded.print_bits(*sys.argv[1:])"
    layers = [layer for layer in LAYERS if layer != "tbb" or threaded.find_tbb()]
    jobs = [(layer, 16, amounts) for layer, amounts in zip(layers, ([1, 2, 3, 4, 7, 16], [16], [7, 16]), strict=False)]
    if FORM == "nightly":
        jobs = [(layer, 16, [1, 2, 3, 4, 7, 16]) for layer in layers]
        jobs += [(layer, most, [most]) for layer in layers for most in (1, 2, 3, 4, 7)]
    else:
        jobs += [(layers[1], 1, [1])]
    hashes = set()
    for layer, most, threads in jobs:
        *found, ran = child.run(code, *threads, NUMBA_NUM_THREADS=most, NUMBA_THREADING_LAYER=layer).split()
        assert len(found) == len(threads)
        assert ran == layer
        hashes |= set(found)
    assert len(hashes) == 1


@each_layer
def test_many_threads_call_at_once(layer):
    """Calls of different problems from 32 Python threads: none crashes, each result has the bits of a lone call."""
    code = "import sys, threaded; threaded.many_callers(*sys.argv[1:])"
    seconds = amount(2, 30)
    ran, callers, least = child.run(code, 32, seconds, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=3).split()
    assert (ran, callers) == (layer, "32")
    assert int(least) >= seconds


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@each_layer
def test_a_forked_child_computes(layer):
    """After a parallel call, a child and its own child compute the same bits, and so does the parent afterwards."""
    code = "import threaded; threaded.fork_after_a_parallel_call()"
    assert child.run(code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=2).split() == [layer]


METHODS = [*multiprocessing.get_all_start_methods(), *(["DataLoader"] if importlib.util.find_spec("torch") else [])]


@pytest.mark.parametrize("layer", LAYERS if FORM == "nightly" else ["omp"])
def test_processes_of_every_start_method_compute(layer):
    """fork, forkserver and spawn, and where PyTorch is installed a worker of its DataLoader, after a parallel call."""
    code = "import sys, threaded; threaded.children(*sys.argv[1:])"
    out = child.run(code, *METHODS, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=2)
    assert out.split() == METHODS


@pytest.mark.parametrize("strategy", AUTO)
@pytest.mark.parametrize("pass_", ["forward", "input_grad"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_permuting_the_samples_permutes_the_result(dtype, pass_, strategy):
    """Bit for bit: no image's result depends on its neighbours, nor on which task computes it."""
    order = np.random.default_rng(3).permutation(7)
    for case in (replace(c, n=7) for c in [*threaded.LARGE, threaded.SMALL, *STEADY]):
        if refusal(case, pass_, strategy, dtype) is not None:
            continue
        data = data_of(case, dtype)
        permuted = data._replace(x=data.x[order], dy=data.dy[order])
        got = run(case, permuted, pass_, strategy)
        assert got.tobytes() == run(case, data, pass_, strategy)[order].tobytes(), case


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_a_child_forked_in_the_middle_of_a_call_computes(layer):
    """Another thread was inside a kernel, and held the lock, when the child was made."""
    code = "import threaded; threaded.fork_while_another_thread_computes()"
    assert child.run(code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=2).split() == ["done"]


def test_set_num_threads_is_respected(monkeypatch):
    """Kernels get as many workers as Numba's setting says, and one where the problem is tiny."""
    import numba

    seen = []
    original = jit.Kernel.__call__

    def call(kernel, *arguments, workers):
        seen.append(workers)
        original(kernel, *arguments, workers=workers)

    monkeypatch.setattr(jit.Kernel, "__call__", call)
    before = numba.get_num_threads()
    try:
        for n in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(n)
            for pass_ in PASSES:
                seen.clear()
                run(threaded.LARGE[0], data_of(threaded.LARGE[0], np.float32), pass_, "loop")
                assert max(seen) == n
                seen.clear()
                run(threaded.SMALL, data_of(threaded.SMALL, np.float32), pass_, "loop")
                assert set(seen) == {1}
    finally:
        numba.set_num_threads(before)


class Recorder:
    """Stands for a dispatcher: remembers that it ran."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def __call__(self, *arguments):
        self.log.append(self.name)


@pytest.fixture
def recorded(monkeypatch):
    """A kernel whose forms only say which one ran, and a launcher of its own."""
    monkeypatch.setattr(jit, "_launcher", jit._Launcher())
    kernel, log = jit.Kernel(lambda: None), []
    kernel.serial, kernel.parallel = Recorder("serial", log), Recorder("parallel", log)
    return kernel, log


def test_which_form_runs(recorded):
    """Serial for one worker, in an orphan, and when workqueue is busy; parallel otherwise."""
    kernel, log = recorded
    kernel(workers=1)
    assert jit._launcher.layer is None  # a serial call starts no threads
    kernel(workers=2)
    jit._launcher.layer = "workqueue"
    kernel(workers=2)
    assert not jit._launcher.inside
    with inside_another_thread():
        kernel(workers=2)
        jit._launcher.layer = "omp"
        kernel(workers=2)
    jit._launcher.orphaned = True
    kernel(workers=2)
    assert log == ["serial", "parallel", "parallel", "serial", "parallel", "serial"]


@contextmanager
def inside_another_thread():
    """As if another thread were inside a workqueue launch."""
    jit._launcher.inside["launch"] = threading.get_ident() + 1
    yield
    jit._launcher.leave()


def test_ctrl_c_after_a_claim_locks_nobody_out(recorded):
    """An interrupt between the claim of workqueue and what gives it back: the thread's next call repairs it."""
    kernel, log = recorded
    jit._launcher.layer = "workqueue"
    assert jit._launcher.enter()
    kernel(workers=2)
    assert log == ["parallel"]
    assert not jit._launcher.inside


def test_an_error_frees_the_lock(recorded):
    """A launch that raises does not lock the others out."""
    kernel, _ = recorded
    jit._launcher.layer = "workqueue"

    def fails():
        raise KeyboardInterrupt

    kernel.parallel = fails
    with pytest.raises(KeyboardInterrupt):
        kernel(workers=2)
    assert not jit._launcher.inside


def test_a_child_may_launch_at_once(recorded, monkeypatch):
    """The thread that was inside a launch does not exist in the child; whether OpenMP ran is remembered there."""
    kernel, log = recorded
    jit._launcher.layer = "workqueue"
    monkeypatch.setattr(jit, "threading_layer", lambda: "workqueue")
    with inside_another_thread():
        jit._launcher.before_fork()
        jit._launcher.after_fork()
        kernel(workers=2)
    assert log == ["parallel"]
    monkeypatch.setattr(jit, "threading_layer", lambda: "omp")
    monkeypatch.setattr(jit.parallel, "_is_initialized", True)
    jit._launcher.before_fork()
    jit._launcher.after_fork()
    kernel(workers=2)
    assert log == ["parallel", "serial"]
