"""Compiling: what Numba is relied on for, bodies, threads of their own, interrupts, quiet."""

import _thread
import ctypes
import logging
import signal
import threading
import time

import numpy as np
import pytest
from numba import prange
from numba.core.errors import TypingError

import child
import nhwconv as nc
from nhwconv.codegen import native
from nhwconv.codegen.simd import integers
from nhwconv.runtime import aside, jit, machine
from nhwconv.runtime.store import Store


def test_names_of_numba_that_the_cache_uses():
    """The private parts of Numba that jit.py relies on; a new version that moves one fails here, by name."""
    from numba import _dynfunc
    from numba.core import caching, ccallback, codegen, dispatcher
    from numba.core.serialize import dumps
    from numba.np.ufunc import parallel

    assert callable(dumps)
    assert isinstance(parallel._is_initialized, bool)
    compiled = jit.compiled(lambda x: None)
    assert isinstance(compiled, dispatcher.Dispatcher)
    cache = compiled._cache
    assert isinstance(cache, caching.FunctionCache)
    # What Numba's own constructor sets, this cache has as well.
    assert set(vars(caching.FunctionCache(child.start))) - {"_source_path", "_disabled"} <= set(vars(cache))
    for name in ("_load_overload", "_save_overload", "_index_key"):
        assert callable(getattr(caching.FunctionCache, name)), name
    for name in ("load", "save", "flush"):
        assert callable(getattr(caching.IndexDataCacheFile, name)), name
        assert callable(getattr(Store, name)), name
    assert {"compile", "native_name"} <= set(dir(ccallback.CFunc))
    assert {"has_dynamic_globals", "_get_compiled_object"} <= set(dir(codegen.CodeLibrary))
    assert {"Environment", "make_function"} <= set(dir(_dynfunc))


# ---------------------------------------------------------------------------------------------------- bodies


def five(operands, geometry, worker, task, fresh):
    table = integers(operands)
    table[0], table[1], table[2], table[3] = geometry, worker, task, fresh


def caller(address, operands, geometry, worker, task, fresh):
    jit.call_body(address, operands, geometry, worker, task, fresh)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of compiled code."""
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_a_body_takes_five_integers(folder):
    """In their order; compiled code calls it by its address, which stays the same."""
    body, table = jit.Body(five), np.zeros(4, np.int64)
    assert body.stats == (0, 0)  # nothing is compiled before it is asked for
    for numbers in ((1, 2, 3, 4), (-5, 2**40, 0, 1)):
        jit.compiled(caller)(body.address, table.ctypes.data, *numbers)
        np.testing.assert_array_equal(table, numbers)
    assert body.address == body.address
    assert body.stats == (0, 1)


def test_a_body_is_kept(folder):
    """The next one of the same function is loaded; it is one file."""
    first, second = jit.Body(five), jit.Body(five)
    assert first.address
    (file,) = folder.rglob("*.bin")
    assert file.name.startswith("five-")
    assert second.address
    assert (first.stats, second.stats) == ((0, 1), (1, 0))
    assert [file] == list(folder.rglob("*.bin"))


@jit.device
def write(target, i, value):
    integers(target)[i] = value


def add(target, a, b):
    for i in prange(2):
        write(target, i, a + b)


def test_an_entry_is_called_by_python_and_by_c(folder):
    """As it is compiled, and as it is loaded; what has to run before either does so once."""
    table, begun = np.zeros(2, np.int64), []
    for parallel in (False, True):
        for stats in ((0, 1), (1, 0)):
            entry = jit.Entry(add, lambda: begun.append(machine.threads()), parallel=parallel)
            assert entry.stats == (0, 0)
            for numbers in ((1, 2), (-5, 2**40)):
                entry.call(table.ctypes.data, *numbers)
                np.testing.assert_array_equal(table, sum(numbers))
            assert entry.stats == stats
            with pytest.raises(TypeError):
                entry.call(table.ctypes.data, 1)
            c = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(entry.address)
            c(table.ctypes.data, 3, 4)
            np.testing.assert_array_equal(table, 7)
    assert len(begun) == 4
    assert len(list(folder.rglob("add-*.bin"))) == 2


def test_closures_of_other_numbers_are_other_bodies(folder):
    """What a body closes over is part of it."""

    def make(N):
        def body(operands, geometry, worker, task, fresh):
            integers(operands)[0] = N

        return jit.Body(body)

    table, call = np.zeros(1, np.int64), jit.compiled(caller)
    for n in (3, 4, 3):
        call(make(n).address, table.ctypes.data, 0, 0, 0, 0)
        assert table[0] == n
    assert len(list(folder.rglob("body-*.bin"))) == 2


def test_a_body_is_compiled_once_by_many_threads(folder):
    """All that ask at once wait for one compilation; the stack of other threads stays what it was."""
    before = threading.stack_size()
    body, together, found = jit.Body(five), threading.Barrier(8), []

    def ask():
        together.wait(60)
        found.append(body.address)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    assert body.stats == (0, 1)
    assert threading.stack_size() == before


def test_a_first_call_from_a_thread_with_little_stack(folder):
    """Numba recurses deeply; a thread of 64 KiB calls all the same, and the setting stays what it was."""
    code = (
        "import threading, threaded\n"
        "threading.stack_size(2**16)\n"
        "thread = threading.Thread(target=threaded.bits_of, args=(threaded.SMALL, 'forward'))\n"
        "failed = []\n"
        "threading.excepthook = failed.append\n"
        "thread.start(); thread.join()\n"
        "print(threading.stack_size(), failed)\n"
    )
    for _ in range(2):  # nothing compiled, and all of it
        assert child.run(code, NHWCONV_CACHE_DIR=folder) == "65536 []\n"


def test_a_compilation_has_a_stack_of_its_own_beside_threads_with_little_stack(monkeypatch):
    """How much a compilation needs depends on Python and on LLVM; what it gets does not."""
    seen, function_of = [], aside._native

    def watched(name):
        function = function_of(name)
        return (lambda *args: (seen.append(threading.stack_size()), function(*args))) if "start" in name else function

    monkeypatch.setattr(aside, "_native", watched)
    before = threading.stack_size(2**16)
    try:
        jit.shielded(where)
        after = threading.stack_size()
    finally:
        threading.stack_size(before)
    assert (seen, after) == ([jit.STACK], 2**16)


# ------------------------------------------------------------------------------------------------- interrupts


def where(*_):
    """Return the thread that runs this."""
    return threading.current_thread()


def test_ctrl_c_does_not_reach_the_compiler(monkeypatch):
    """It strikes the main thread: the executor, bodies and native functions are compiled in another."""
    assert jit.shielded(where) is not threading.main_thread()
    threads = []
    monkeypatch.setattr(native, "_load", lambda *_: threads.append(where()) or 1)
    assert int(native.native("some function", lambda module, name: None)) == 1
    del native._addresses["some function"]
    monkeypatch.setattr(Store, "load", lambda *_: threads.append(where()))
    monkeypatch.setattr(Store, "save", lambda *_: None)
    jit.compiled(lambda x: None)(1)
    assert jit.Body(five).address
    assert len(threads) == 3
    assert threading.main_thread() not in threads


def test_an_interrupted_caller_need_not_wait():
    """The interrupt is raised at once; what is being compiled is finished meanwhile."""
    started, finish, finished = threading.Event(), threading.Event(), threading.Event()

    def compiling():
        started.set()
        finish.wait()
        finished.set()

    def interrupt():
        started.wait()
        time.sleep(0.2)  # until the caller waits: elsewhere Python may print an interrupt and go on
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    ctrl_c = threading.Thread(target=interrupt)
    ctrl_c.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        jit.shielded(compiling)
    signal.signal(signal.SIGINT, before)
    ctrl_c.join()
    assert not finished.is_set()
    finish.set()
    assert finished.wait(10)


def test_errors_of_the_compiler_are_raised():
    """By the thread that asked, as they are."""
    with pytest.raises(TypingError):
        jit.compiled(lambda x: x.nonsense)(np.ones(1))
    with pytest.raises(TypingError):
        _ = jit.Body(lambda operands, geometry, worker, task, fresh: task.nonsense).address


def test_what_is_part_of_a_compilation_does_not_wait_for_it(monkeypatch):
    """A thread that holds the compiler's lock compiles by itself: another would wait for it, and it for the other."""
    monkeypatch.delattr(jit, "Aside")
    with jit.compiler_lock:
        assert jit.shielded(where) is threading.main_thread()


def test_without_threads_the_caller_compiles(monkeypatch):
    """As at the end of a program, when Python starts none."""

    def refused(*_):
        raise RuntimeError("can't start new thread at interpreter shutdown")

    before = threading.stack_size()
    monkeypatch.setattr(_thread, "start_new_thread", refused)
    assert jit.shielded(where) is threading.main_thread()
    assert threading.stack_size() == before


def test_a_first_call_at_the_end_of_a_program_is_right(tmp_path):
    """Functions that run at exit can start no threads."""
    code = "import atexit, threaded; atexit.register(lambda: print(threaded.check(threaded.SMALL) or 'right'))"
    assert child.run(code, NHWCONV_CACHE_DIR=str(tmp_path)) == "right\n"


LAST = """
import os, numpy as np, nhwconv as nc
x, w = np.ones((2, 9, 8, 3), np.float32), np.ones((5, 3, 3, 3), np.float32)
class Last:
    def __del__(self, nc=nc, x=x, w=w, write=os.write):
        for n in (2, 1):  # a call like one before, and another, whose kernels are there as well
            y = nc.conv2d(x[:n], w, padding=1)
            dx, dw, db = nc.conv2d_backward(x[:n], w, y, padding=1)
            write(1, f"{float(y[0, 4, 4, 0])} {float(db[0])}\\n".encode())
last = Last()
nc.conv2d_backward(x, w, nc.conv2d(x, w, padding=1), padding=1)
"""


def test_calls_as_python_ends():
    """By what is left when modules go: NumPy works there, and so does what is loaded."""
    assert child.run(LAST, NUMBA_NUM_THREADS=2) == "27.0 3300.0\n27.0 1650.0\n"


# ---------------------------------------------------------------------------------------------- quiet, and off


def test_compiling_is_quiet(folder):
    """The first call of a program that logs everything prints some lines; Numba's own would be tens of thousands."""
    code = (
        "import logging; logging.basicConfig(level=logging.DEBUG)\n"
        "import threaded; threaded.bits_of(threaded.SMALL, 'forward')\n"
        "print(logging.getLogger('numba').level)\n"
    )
    status, out, err = child.finish(child.start(code, NHWCONV_CACHE_DIR=folder))
    assert (status, out) == (0, "0\n")  # and the logger's level is what it was
    assert len(err.splitlines()) < 100, err[:2000]


@pytest.mark.parametrize("level", [logging.NOTSET, logging.DEBUG, logging.ERROR])
def test_loggers_are_put_back(level):
    """Numba's is held at INFO while something is compiled, unless it says less; after an error as well."""
    log = logging.getLogger("numba")
    before = log.level
    log.setLevel(level)
    try:
        assert jit.shielded(log.getEffectiveLevel) >= max(logging.INFO, level)
        assert log.level == level
        with pytest.raises(ZeroDivisionError):
            jit.shielded(lambda: 1 // 0)
        assert log.level == level
    finally:
        log.setLevel(before)


WITHOUT = """
import warnings, numpy as np, ml_dtypes, nhwconv as nc
from cases import PASSES, Case, draw_data, exact, run
from tolerance import assert_close
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for case in (Case(), Case(n=1, h=9, w=8, c=4, d=6, stride=(2, 1), padding=((1, 0), (0, 1)), groups=2), Case(n=0)):
        for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
            data = draw_data(case, dtype)
            for pass_ in PASSES:
                assert_close(run(case, data, pass_, "auto"), *exact(case, data, pass_), case.length(pass_), "tensordot")
            wide = data.dy.astype(np.float64)
            db = wide.sum((0, 1, 2)), np.abs(wide).sum((0, 1, 2))
            assert_close(nc.conv2d_bias_grad(data.dy), *db, 200, "tensordot")
            g = nc.conv2d_backward(data.x, data.w, data.dy, **case.options)
            assert_close(g.db, *db, 200, "tensordot")
            assert_close(g.dw, *exact(case, data, "weight_grad"), case.length("weight_grad"), "tensordot")
            nc.conv2d_backward(data.x, data.w, data.dy, **case.options, out=g, accumulate=True)
            assert_close(g.db, 2 * db[0], 3 * db[1], 400, "tensordot")
            b = data.b.astype(np.float64)
            exactly, absolute = exact(case, data, "forward")
            y = nc.conv2d(data.x, data.w, data.b, **case.options)
            assert_close(y, exactly + b, absolute + np.abs(b), case.length("forward") + 1, "tensordot")
            plan = nc.plan("forward", case.x_shape, case.w_shape, dtype=dtype, **case.options)
            assert plan.strategy == "tensordot" and plan(data.x, data.w, data.b).tobytes() == y.tobytes()
    nc.warmup(dtypes=[np.float32, np.float16])
for warning in caught:
    print(warning.category.__name__, warning.message)
for name in nc.strategies():
    try:
        nc.conv2d(data.x, data.w, strategy=name)
        print(name)
    except ValueError as error:
        print(error)
"""


def test_without_a_compiler_auto_answers_by_tensordot():
    """NUMBA_DISABLE_JIT, for debuggers and coverage: results of every dtype are right, and one warning says why."""
    warning, *each = child.run(WITHOUT, NUMBA_DISABLE_JIT=1).splitlines()
    assert warning == (
        "RuntimeWarning nhwconv: NUMBA_DISABLE_JIT is set, so tensordot, which is slow, stands in for compiled "
        "strategies"
    )
    names = nc.strategies()
    assert len(each) == len(names)
    for name, line in zip(names, each, strict=True):
        if name == "tensordot":
            assert line == name
        else:
            assert line.startswith("conv2d: no allowed strategy can do the forward of ")
            assert line.endswith(f"({name}: NUMBA_DISABLE_JIT is set, and it is compiled by Numba)")


def test_code_that_is_not_optimised_computes(folder):
    """NUMBA_OPT=0, as debuggers have it."""
    code = "import threaded; threaded.check(threaded.LARGE[1], strategy='loop'); print('right')"
    assert child.run(code, NUMBA_OPT=0, NHWCONV_CACHE_DIR=folder) == "right\n"
