"""The kernel cache: what was saved is loaded, and whatever happens to the files is a miss, never a wrong kernel."""

import pickle
import re
import signal
import threading

import numpy as np
import pytest
from numba.core.errors import TypingError

import child
import threaded
from nhwconv.kernels import jit, native

DATA = {"machine code": bytes(range(256)) * 40}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store in a folder of its own."""
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path))
    return jit.Store("nhwconv.kernels.some.kernel", {"parallel": True})


def only_file(folder):
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) == 1
    return files[0]


def test_round_trip(store, tmp_path):
    """What was saved is loaded, by its key alone; nothing temporary remains."""
    assert store.load(("signature", "cpu")) is None
    store.save(("signature", "cpu"), DATA)
    assert store.load(("signature", "cpu")) == DATA
    assert store.load(("signature", "another cpu")) is None
    store.save(("signature", "cpu"), "newer")
    assert store.load(("signature", "cpu")) == "newer"
    assert only_file(tmp_path).suffix == ".bin"


def test_name_and_options_are_part_of_the_key(store):
    """The serial twin does not load the parallel kernel, nor one kernel another's."""
    store.save("key", DATA)
    assert jit.Store(store.name, {"parallel": True}).load("key") == DATA
    assert jit.Store(store.name, {}).load("key") is None
    assert jit.Store(store.name, {"parallel": True, "fastmath": True}).load("key") is None
    assert jit.Store("nhwconv.kernels.another.kernel", {"parallel": True}).load("key") is None


def test_version_is_part_of_the_path(store, monkeypatch):
    """Other sources, or another Python, Numba or llvmlite, means another folder."""
    monkeypatch.setattr(jit, "_version", jit._version.__wrapped__)  # computed each time
    store.save("key", DATA)
    for module, name in ((jit.numba, "__version__"), (jit.llvmlite, "__version__"), (jit.sys, "version")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "99.0")
            assert store.load("key") is None
    assert store.load("key") == DATA


DAMAGE = {
    "emptied": lambda data: b"",
    "truncated to one byte": lambda data: data[:1],
    "truncated within the checksum": lambda data: data[:31],
    "truncated to the checksum": lambda data: data[:32],
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "a bit of the checksum": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "a bit of the data": lambda data: data[:5000] + bytes([data[5000] ^ 128]) + data[5001:],
    "the last bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "foreign": lambda data: b"MZ" + bytes(1000),
    "a foreign pickle": lambda data: pickle.dumps("not a kernel"),
    "text": lambda data: b"hello\n" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_and_is_replaced(damage, store, tmp_path):
    """No damage raises or loads; the next save repairs it."""
    store.save("key", DATA)
    file = only_file(tmp_path)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert store.load("key") is None
    store.save("key", DATA)
    assert store.load("key") == DATA


def test_another_kernels_file_under_this_name_is_a_miss(store, tmp_path):
    """A whole and sound file, but of another key: a checksum of the contents alone would not notice."""
    store.save("another key", "another kernel's machine code")
    other = only_file(tmp_path)
    sound = other.read_bytes()
    other.unlink()
    store.save("key", DATA)
    only_file(tmp_path).write_bytes(sound)
    assert store.load("key") is None


def test_a_folder_in_the_place_of_a_file_is_a_miss(store, tmp_path):
    """Reading fails, and so does writing: one warning, no error."""
    store.save("key", DATA)
    file = only_file(tmp_path)
    file.unlink()
    file.mkdir()
    assert store.load("key") is None
    with pytest.warns(RuntimeWarning, match="cannot keep compiled kernels"):
        store.save("key", DATA)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []  # nothing temporary remains


def test_cache_folder_and_clear_cache(tmp_path, monkeypatch):
    """NHWCONV_CACHE_DIR comes before NUMBA_CACHE_DIR, and that before the user's folder; clearing needs no folder."""
    for name in ("NHWCONV_CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    home = jit.cache_folder()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    assert jit.cache_folder() == tmp_path / "numba" / "nhwconv" / "kernels" != home
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path / "own"))
    assert jit.cache_folder() == tmp_path / "own" / "nhwconv" / "kernels"
    jit.clear_cache()
    store = jit.Store("name", {})
    store.save("key", DATA)
    jit.clear_cache()
    assert store.load("key") is None
    assert not jit.cache_folder().exists()


# --------------------------------------------------------------------------------------- whole processes

FORWARD = "import threaded; threaded.forward_small()"


def numbas(files):
    """Of the cache's files those that Numba compiled; the others are micro-kernels."""
    return [p for p in files if not p.name.startswith("native-")]


def statistics(out):
    """Return (loaded, compiled) and the warnings that `threaded.forward_small` printed."""
    first, *rest = out.splitlines()
    return tuple(map(int, first.split())), rest


def test_a_second_process_compiles_nothing_and_damage_is_repaired(tmp_path):
    """Compiled once, then loaded; after damage to every file compiled again, with right results, then loaded again."""
    where = {"NHWCONV_CACHE_DIR": tmp_path}
    (loaded, compiled), warnings = statistics(child.run(FORWARD, **where))
    assert (loaded, warnings) == (0, [])
    assert compiled > 0
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    written = [p.stat().st_mtime_ns for p in files]
    assert len(numbas(files)) == compiled
    assert statistics(child.run(FORWARD, **where)) == ((compiled, 0), [])
    assert [p.stat().st_mtime_ns for p in files] == written

    kinds = list(DAMAGE.values())
    for i, file in enumerate(files):
        file.write_bytes(kinds[i % len(kinds)](file.read_bytes()))
    assert statistics(child.run(FORWARD, **where)) == ((0, compiled), [])
    assert statistics(child.run(FORWARD, **where)) == ((compiled, 0), [])
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == files


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path):
    """Below a regular file no folder can be made, by root neither: results are right, and one warning says why."""
    (tmp_path / "file").write_text("")
    (loaded, compiled), warnings = statistics(child.run(FORWARD, NHWCONV_CACHE_DIR=tmp_path / "file" / "below"))
    assert loaded == 0
    assert compiled > 1
    assert len(warnings) == 1
    folder = re.escape(str(tmp_path / "file" / "below" / "nhwconv" / "kernels"))
    assert re.fullmatch(
        rf"RuntimeWarning nhwconv cannot keep compiled kernels in {folder} \(.*Not a directory.*\), so each process "
        r"compiles them anew; set NHWCONV_CACHE_DIR to a folder that can be written",
        warnings[0],
    )


def test_sixteen_cold_processes_at_once(tmp_path):
    """Sixteen compile and save at once, some the same kernels and some others; then four load all of them, and a
    hundred calls each are right.

    With Numba's own cache one kernel was handed another's machine code here.
    """

    def at_once(processes, jobs, calls):
        code = "import sys, threaded; threaded.small_calls(*sys.argv[1:])"
        running = [child.start(code, first, jobs, calls, NHWCONV_CACHE_DIR=tmp_path) for first in range(processes)]
        results = [child.finish(process) for process in running]
        assert [(status, err) for status, _, err in results] == [(0, "")] * processes
        return [tuple(map(int, out.split())) for _, out, _ in results]

    assert all(loaded + compiled >= 1 for loaded, compiled in at_once(16, jobs=1, calls=3))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".bin"}  # nothing temporary remains
    assert at_once(4, jobs=6, calls=100) == [(len(numbas(files)), 0)] * 4


def test_names_of_numba_that_the_cache_uses():
    """The private parts of Numba that jit.py relies on; a new version that moves one fails here, by name."""
    from numba.core import caching, dispatcher
    from numba.core.serialize import dumps
    from numba.np.ufunc import parallel

    assert callable(dumps)
    assert isinstance(parallel._is_initialized, bool)
    kernel = jit.kernel(lambda x: None)
    assert isinstance(kernel.serial, dispatcher.Dispatcher)
    cache = kernel.serial._cache
    assert isinstance(cache, caching.FunctionCache)
    # What Numba's own constructor sets, the kernel cache has as well.
    assert set(vars(caching.FunctionCache(threaded.check))) - {"_source_path", "_disabled"} <= set(vars(cache))
    for name in ("_load_overload", "_save_overload", "_index_key"):
        assert callable(getattr(caching.FunctionCache, name)), name
    for name in ("load", "save", "flush"):
        assert callable(getattr(caching.IndexDataCacheFile, name)), name
        assert callable(getattr(jit.Store, name)), name


# ------------------------------------------------------------------------------------------------- interrupts


def where(*_):
    """Return the thread that runs this."""
    return threading.current_thread()


def test_ctrl_c_does_not_reach_the_compiler(monkeypatch):
    """It strikes the main thread: kernels and micro-kernels are compiled in another, and a thread's own in itself."""
    assert jit.shielded(where) is not threading.main_thread()
    threads = []
    monkeypatch.setattr(native, "_load", lambda *_: threads.append(where()) or 1)
    native.native("some function", lambda module, name: None)
    del native._addresses["some function"]
    monkeypatch.setattr(jit.Store, "load", lambda *_: threads.append(where()))
    monkeypatch.setattr(jit.Store, "save", lambda *_: None)
    jit.kernel(lambda x, *_: None)(np.ones(1), workers=1)
    assert len(threads) == 2
    assert threading.main_thread() not in threads
    caller = threading.Thread(target=lambda: threads.append(jit.shielded(where)))
    caller.start()
    caller.join()
    assert threads[-1] is caller


def test_an_interrupted_caller_need_not_wait():
    """The interrupt is raised at once; what is being compiled is finished meanwhile."""
    started, finish, finished = threading.Event(), threading.Event(), threading.Event()

    def compiling():
        started.set()
        finish.wait()
        finished.set()

    def interrupt():
        started.wait()
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
        jit.kernel(lambda x: x.nonsense)(np.ones(1), workers=1)


def test_what_is_part_of_a_compilation_does_not_wait_for_it(monkeypatch):
    """A thread that holds the compiler's lock compiles by itself: another would wait for it, and it for the other."""
    monkeypatch.delattr(jit, "ThreadPoolExecutor")
    with jit.compiler_lock:
        assert jit.shielded(where) is threading.main_thread()


def test_without_threads_the_caller_compiles(monkeypatch):
    """As at the end of a program, when Python starts none."""

    def refused(*_):
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(jit.ThreadPoolExecutor, "submit", refused)
    assert jit.shielded(where) is threading.main_thread()


def test_a_first_call_at_the_end_of_a_program_is_right(tmp_path):
    """Functions that run at exit can start no threads."""
    code = "import atexit, threaded; atexit.register(lambda: print(threaded.check(threaded.SMALL) or 'right'))"
    assert child.run(code, NHWCONV_CACHE_DIR=str(tmp_path)) == "right\n"
