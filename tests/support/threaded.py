"""What the tests of threads, forks and caches run in processes of their own. Each function prints its findings."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import nhwconv as nc
from cases import PASSES, Case, data_of, exact_of, run, supporting
from nhwconv.codegen.simd import integers
from nhwconv.strategies import AUTO
from tolerance import assert_close

PAD1 = ((1, 1), (1, 1))

#: Large enough that every pass is launched in parallel, and cut into several tasks.
LARGE = [
    Case(n=3, h=24, w=20, c=24, d=40, padding=PAD1),
    Case(n=2, h=25, w=30, c=16, d=24, stride=(2, 2), padding=PAD1, groups=2),
    Case(n=2, h=40, w=40, c=3, d=16, kh=5, kw=5, padding=((2, 2), (2, 2))),
    Case(n=2, h=33, w=31, c=48, d=48, padding=PAD1, groups=48),
    Case(n=4, h=16, w=16, c=64, d=96, kh=1, kw=1),
]
#: Too small for that: the serial twin runs.
SMALL = Case(n=1, h=6, w=7, c=5, d=9, padding=PAD1)


def find_tbb() -> Path | None:
    """Return tbb's library where the registry's package put it."""
    return next(iter(sorted(Path(sys.prefix, "lib").glob("libtbb.so.*"))), None)


def load_tbb() -> None:
    """Load tbb where Numba will find it."""
    if os.environ.get("NUMBA_THREADING_LAYER") == "tbb":
        ctypes.CDLL(str(find_tbb()), mode=ctypes.RTLD_GLOBAL)


def all_bits(cases: list[Case] = LARGE, dtypes: Any = (np.float32,)) -> str:
    """Return a hash of the bits of every pass and strategy that promises them, and of the bias gradient."""
    digest = hashlib.sha256()
    for case in cases:
        for dtype in dtypes:
            data = data_of(case, dtype)
            for pass_ in PASSES:
                for strategy in supporting(case, pass_, dtype=dtype):
                    if strategy in AUTO:
                        digest.update(run(case, data, pass_, strategy).tobytes())
            digest.update(nc.conv2d_bias_grad(data.dy).tobytes())
    return digest.hexdigest()


def print_bits(*threads: str) -> None:
    """Print the hash for each number of threads, and the threading layer."""
    import numba
    from numba.np.ufunc.parallel import threading_layer

    load_tbb()
    for n in map(int, threads):
        numba.set_num_threads(n)
        print(all_bits(dtypes=(np.float32, np.float64)))
    print(threading_layer())


def check(case: Case, dtype: Any = np.float32, strategy: str = "auto") -> None:
    """Compare every pass with the oracle."""
    for pass_ in PASSES:
        got = run(case, data_of(case, dtype), pass_, strategy)
        ran = nc.plan(pass_, case.x_shape, case.w_shape, dtype=dtype, **case.options, strategy=strategy).strategy
        assert_close(got, *exact_of(case, dtype, pass_), case.length(pass_), ran, case)


def many_callers(count: str, seconds: str) -> None:
    """Call from many Python threads at once, each result checked by its bits; print layer, threads and least calls."""
    from numba.np.ufunc.parallel import threading_layer

    load_tbb()
    expected = {}
    for case in LARGE:
        check(case)
        for pass_ in PASSES:
            expected[case, pass_] = run(case, data_of(case, np.float32), pass_, "auto").tobytes()
    callers = int(count)
    together = threading.Barrier(callers)

    def calls(seed: int) -> int:
        rng = np.random.default_rng(seed)
        together.wait(60)
        calls, end = 0, time.monotonic() + float(seconds)
        while time.monotonic() < end or calls < 3:
            calls += 1
            case, pass_ = LARGE[rng.integers(len(LARGE))], PASSES[rng.integers(3)]
            got = run(case, data_of(case, np.float32), pass_, "auto")
            assert got.tobytes() == expected[case, pass_], f"thread {seed}: {pass_} of {case}"
        return calls

    with ThreadPoolExecutor(callers) as pool:
        print(threading_layer(), callers, min(pool.map(calls, range(callers))))


def bits_of(case: Case, pass_: str) -> bytes:
    """Return the bits of one pass, with "auto"."""
    return run(case, data_of(case, np.float32), pass_, "auto").tobytes()


def in_child(work: Any, seconds: int = 60) -> None:
    """Fork; raise unless the child finishes its work in time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking with threads. That is the test.
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(seconds)
            work()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"


def fork_after_a_parallel_call() -> None:
    """Call in parallel, then compute in a child, in a child of the child, and in the parent again."""
    from numba.np.ufunc.parallel import threading_layer

    load_tbb()
    for case in LARGE:
        check(case)
    bits = all_bits()

    def work() -> None:
        assert all_bits() == bits
        for case in LARGE:
            check(case)

    def with_grandchild() -> None:
        work()
        in_child(work)
        work()

    in_child(work)
    in_child(with_grandchild)
    work()
    print(threading_layer())


def some_bits() -> str:
    """Return a hash of some bits, in a process that may not have loaded anything yet."""
    load_tbb()
    return all_bits(LARGE[:2])


def child_of(method: str) -> str:
    """Compute in a process of this start method, after a parallel call here; return its bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # as in `in_child`
        if method == "DataLoader":
            return str(_loaded())
        with multiprocessing.get_context(method).Pool(1) as pool:
            return pool.apply_async(some_bits).get(120)


def _loaded() -> object:
    """Return the bits that a worker of PyTorch's DataLoader computes."""
    from torch.utils.data import DataLoader, Dataset

    class Bits(Dataset):  # type: ignore[misc,type-arg]
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> str:
            return some_bits()

    return next(iter(DataLoader(Bits(), num_workers=1)))[0]


def children(*methods: str) -> None:
    """Compute in children of these start methods, from this thread and from another one; print what was tried."""
    bits = some_bits()
    for method in methods:
        assert child_of(method) == bits, method
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(child_of, methods[0]).result() == bits
    assert some_bits() == bits
    print(*methods)


def fork_while_another_thread_computes() -> None:
    """Fork while a thread is inside a kernel, and so perhaps holds the lock: the child has a lock of its own."""
    for case in LARGE:
        check(case)
    bits, stop = all_bits(), threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            all_bits()

    def work() -> None:
        assert all_bits() == bits

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        for _ in range(10):
            in_child(work)
    finally:
        stop.set()
        thread.join()
    print("done")


def small_bodies(first: str, jobs: str, calls: str) -> None:
    """Call so many of six bodies, which one function makes, each checked; print the cache's statistics."""
    from nhwconv.runtime.jit import Body

    def make(number: int) -> Body:
        def small(operands, geometry, worker, task, fresh):
            integers(operands)[0] = task * number + geometry

        return Body(small)

    bodies = [(number, make(number)) for number in ((int(first) + i) % 6 for i in range(int(jobs)))]
    kind, result = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5), ctypes.c_int64()
    for i in range(int(calls)):
        number, body = bodies[i % len(bodies)]
        kind(body.address)(ctypes.addressof(result), 7, 0, i, 0)
        assert result.value == i * number + 7, (number, i, result.value)
    print_cache_statistics()


def print_cache_statistics() -> None:
    """Print how many bodies, and forms of the executor, were loaded from the cache, and how many were compiled."""
    from nhwconv.runtime.jit import Body, Entry

    counts = [code.stats for code in gc.get_objects() if isinstance(code, (Body, Entry))]
    print(*(sum(count) for count in zip(*counts, strict=True)))


def forward_small() -> None:
    """Run the smallest pass; print the warnings that it gave and the cache's statistics."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            got = run(SMALL, data_of(SMALL, np.float32), "forward", "loop")
    assert_close(got, *exact_of(SMALL, np.float32, "forward"), SMALL.length("forward"), "loop", SMALL)
    print_cache_statistics()
    for warning in caught:
        print(warning.category.__name__, warning.message)
