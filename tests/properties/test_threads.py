"""Threads and forks: the same bits however many there are, and calls that survive them, under every threading layer."""

import importlib.util
import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest

import child
import fresh
import threaded
from cases import DTYPES, PASSES, TYPICAL, data_of, random_case, refusal, run
from extent import FORM, amount
from layers import LAYERS, each_layer
from nhwconv.runtime import executor
from nhwconv.strategies import AUTO


class Form:
    """Stands for `executor.launch`: every program runs in one form, and launches are counted."""

    def __init__(self, parallel):
        self.parallel, self.launches = parallel, 0

    def __call__(self, parallel_form, serial_form, workers, *arguments):
        self.launches += 1
        (parallel_form if self.parallel else serial_form)(*arguments)


def bits(case, dtype, pass_, strategy, form, workers):
    """Return a result's bits when every program runs in this form and for so many workers, however small it is."""
    with fresh.workers(workers, (executor, "launch", form)):
        return run(case, data_of(case, dtype), pass_, strategy).tobytes()


RNG = np.random.default_rng(5)
STEADY = [*TYPICAL, replace(TYPICAL[2], groups=1, padding=((0, 0), (0, 0)))]
SOME = [*threaded.LARGE, threaded.SMALL, *(random_case(RNG) for _ in range(8))]


@pytest.mark.parametrize("strategy", AUTO)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", [*DTYPES, np.float16])
def test_both_forms_of_the_executor_give_the_same_bits(dtype, pass_, strategy):
    """One worker or five, in one thread or several: the bits are the same."""
    serial, parallel = Form(False), Form(True)
    compared = 0
    for case in SOME:
        if case.n == 0 or refusal(case, pass_, strategy, dtype) is not None:
            continue
        expected = bits(case, dtype, pass_, strategy, serial, 1)
        for form, workers in ((parallel, 1), (serial, 2), (parallel, 2), (parallel, 3), (serial, 5), (parallel, 5)):
            assert bits(case, dtype, pass_, strategy, form, workers) == expected, (form.parallel, workers, case)
        compared += 1
    assert compared
    assert serial.launches >= compared
    assert parallel.launches >= compared


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
    seconds = amount(1, 30)
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


def test_a_number_of_threads_that_is_set_after_the_import(tmp_path):
    """Numba looks at the environment whenever it compiles, and refuses another number once threads have started."""
    code = (
        "import os, threaded\n"
        "from nhwconv.runtime import machine\n"
        "os.environ['NUMBA_NUM_THREADS'] = '1'\n"
        "machine.threads()\n"  # as a call whose kernels are kept
        "threaded.bits_of(threaded.SMALL, 'forward')\n"
        "print('right')\n"
    )
    assert child.run(code, NHWCONV_CACHE_DIR=tmp_path, NUMBA_NUM_THREADS=2) == "right\n"  # nothing compiled


def test_set_num_threads_is_respected(monkeypatch):
    """Programs get as many workers as Numba's setting says, and one where the problem is tiny."""
    import numba

    seen = []
    original = executor.run

    def recorded(program, *arguments):
        seen.append(program.workers)
        original(program, *arguments)

    monkeypatch.setattr(executor, "run", recorded)
    before = numba.get_num_threads()
    try:
        for n in range(1, numba.config.NUMBA_NUM_THREADS + 1):
            numba.set_num_threads(n)
            for pass_ in PASSES:
                run(threaded.LARGE[0], data_of(threaded.LARGE[0], np.float32), pass_, "loop")
                run(threaded.SMALL, data_of(threaded.SMALL, np.float32), pass_, "loop")
                assert seen == [n, 1]
                seen.clear()
    finally:
        numba.set_num_threads(before)
