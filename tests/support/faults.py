"""What the tests of faults run in processes of their own: forks, kills, interrupts, and too little disk or memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import threaded
from cases import PASSES, data_of, run
from nhwconv import choices
from nhwconv.codegen.native import native
from nhwconv.runtime import arrays, executor, files
from nhwconv.runtime.store import Store


def _nothing(module: Any, name: str) -> None:
    """Write a function that returns at once."""
    from llvmlite import ir

    function = ir.Function(module, ir.FunctionType(ir.VoidType(), []), name)
    ir.IRBuilder(function.append_basic_block()).ret_void()


def fork_while_another_thread_compiles() -> None:
    """Fork while a thread is inside a compilation: the child can compile, with llvmlite and with Numba."""
    import numba

    inside = threading.Event()

    def slowly(module: Any, name: str) -> None:
        inside.set()
        time.sleep(0.3)
        _nothing(module, name)

    def work() -> None:
        assert int(native("nhwconv_test_child", _nothing))
        assert numba.njit(lambda a: a + 1)(1) == 2

    thread = threading.Thread(target=int, args=(native("nhwconv_test_parent", slowly),))
    thread.start()
    assert inside.wait(60)
    threaded.in_child(work, seconds=30)
    thread.join()
    work()
    print("done")


def wait_before_the_move(kind: str) -> None:
    """Write an entry of the kernel cache or of the tuning, and stop when all of it is in a temporary file."""

    def stop(source: str, target: str) -> None:
        print("written", flush=True)
        time.sleep(600)

    os.replace = stop  # type: ignore[assignment]
    if kind == "kernels":
        Store("nhwconv.some.body", {}).save("key", b"machine code" * 1000)
    else:
        import nhwconv as nc

        choices.keep("forward", nc.plan("forward", (1, 5, 5, 3), (4, 3, 3, 3)).problem, "loop", {})


def on_a_full_disk() -> None:
    """Run the smallest pass where no file can grow past 1000 bytes; print warnings and the cache's statistics."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    threaded.forward_small()


def interrupted(seconds: float, work: Callable[[], object]) -> bool:
    """Work, with a KeyboardInterrupt in the main thread after so long; whether the work was done by then.

    A function and no context manager: the interrupt may come between any two instructions, also before its block.
    """
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    done = False
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        work()
        done = True
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        pass
    return done


def _call_often(case: Any, pass_: str) -> None:
    for _ in range(20):
        threaded.bits_of(case, pass_)


def interrupted_calls(seconds: str) -> None:
    """Interrupt calls at random moments, for so long; the next call of each has the bits of an undisturbed one."""
    threaded.load_tbb()
    rng = np.random.default_rng(0)
    jobs = [(case, pass_) for case in threaded.LARGE for pass_ in PASSES]
    expected = {job: threaded.bits_of(*job) for job in jobs}
    sys.unraisablehook = lambda _: None  # where Python cannot raise an interrupt, it prints it
    end, count = time.monotonic() + float(seconds), 0
    while time.monotonic() < end:
        job = jobs[rng.integers(len(jobs))]
        count += not interrupted(float(rng.uniform(2e-5, 3e-3)), partial(_call_often, *job))
        assert threaded.bits_of(*job) == expected[job], job
        assert not executor.launcher.inside
    print(count)


def first_calls_under_gevent() -> None:
    """Call for the first time, at once, in all that gevent has in the place of threads; check all bits."""
    import gevent

    jobs = [(threaded.SMALL, pass_) for pass_ in PASSES]
    found: list[Any] = []

    def call(job: Any) -> None:
        gevent.sleep(0)  # all of them have begun
        found.append((job, threaded.bits_of(*job)))

    pool = gevent.get_hub().threadpool
    waiting = [start(call, job) for start in (pool.spawn, gevent.spawn) for job in jobs]
    threads = [threading.Thread(target=call, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in waiting:
        each.get()
    assert len(found) == 3 * len(jobs)
    assert len(set(found)) == len(jobs)
    print("done")


def calls_in_signal_handlers(seconds: str) -> None:
    """Call in a signal's handler, at random moments of other calls, some of them of another thread; check all bits."""
    threaded.load_tbb()
    rng = np.random.default_rng(0)
    jobs = [(case, pass_) for case in (threaded.SMALL, *threaded.LARGE[:2]) for pass_ in PASSES]
    expected = {job: threaded.bits_of(*job) for job in jobs}
    handled, stop, wrong = 0, threading.Event(), []

    def check(job: Any) -> None:
        if threaded.bits_of(*job) != expected[job]:
            wrong.append(job)

    def handler(number: int, frame: Any) -> None:
        nonlocal handled
        handled += 1
        check(jobs[handled % len(jobs)])

    def keep_busy() -> None:
        while not stop.is_set():
            check(jobs[-1])

    other = threading.Thread(target=keep_busy)
    other.start()
    signal.signal(signal.SIGALRM, handler)
    end = time.monotonic() + float(seconds)
    try:
        while time.monotonic() < end or handled < 10:
            signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(1e-5, 2e-3)))
            check(jobs[rng.integers(len(jobs))])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        stop.set()
        other.join()
    assert not wrong, wrong[:3]
    print(handled)


def interrupted_compilation() -> None:
    """Interrupt the first calls of a pass, on an empty cache, later each time; the calls that follow are right."""
    first = partial(run, threaded.SMALL, data_of(threaded.SMALL, np.float32), "forward", "loop")
    seconds, count = 0.05, 0
    while not interrupted(seconds, first):
        seconds, count = 1.6 * seconds, count + 1
    threaded.check(threaded.SMALL, strategy="loop")
    print(count)


def too_little_memory() -> None:
    """Ask for results that do not fit into the address space that is left; then everything works as before."""
    import nhwconv as nc

    bits = threaded.all_bits()
    x, w = np.ones((1, 4096, 4096, 1), np.float32), np.ones((64, 1, 1, 1), np.float32)
    names = [name for name in nc.strategies() if name != "winograd"]  # which takes no 1x1 kernels
    for strategy in names:
        nc.conv2d(x[:, :240], w, strategy=strategy)
    assert arrays._buffers.nbytes() > 200 * 2**20
    limit = _address_space() + 300 * 2**20
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, unlimited[1]))
    for strategy in names:
        try:
            nc.conv2d(x, w, strategy=strategy)  # 4 GiB
        except MemoryError:
            print(strategy)
    y = nc.conv2d(x[:, :400], w)  # 400 MiB: only because unused buffers are given back
    assert y[0, -1, -1, -1] == 1
    del y
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    assert threaded.all_bits() == bits


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def growth(kind: str, count: str) -> None:
    """Make many calls, after a tenth of them; print by how many bytes this process grew."""
    cases = [threaded.SMALL] if kind == "small" else threaded.LARGE
    jobs = [(case, pass_) for case in cases for pass_ in PASSES]

    def calls(n: int) -> None:
        for i in range(n):
            threaded.bits_of(*jobs[i % len(jobs)])

    calls(max(int(count) // 10, 10 * len(jobs)))
    before = _resident()
    calls(int(count))
    print(_resident() - before)


def caught(action: Callable[[], object]) -> list[str]:
    """Return the warnings that an action gives."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in found]


def forget_warnings() -> None:
    """As a new process."""
    files._told.clear()
