"""Faults: a fork, a kill, Ctrl-C, a full disk, too little memory. The next result is right, nothing stays broken."""

import errno
import os
import signal
import time

import numpy as np
import pytest

import child
import faults
import nhwconv as nc
from cases import PASSES, TYPICAL, data_of, run, supporting
from extent import amount
from layers import each_layer
from nhwconv import choices
from nhwconv.runtime import arrays, executor, files, store
from nhwconv.strategies import REGISTRY

OLD = time.time() - files.UNUSED - 60


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache folder, of a process that has not swept or warned yet."""
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NHWCONV_TUNING", "write")
    monkeypatch.setattr(files, "_told", set())
    for once in (files._remove_abandoned, files.remove_unused, files.mark_used):
        once.cache_clear()
    choices.forget()
    yield tmp_path / "nhwconv"
    choices.forget()


def entries():
    return store.Store("nhwconv.some.body", {})


PROBLEM = nc.plan("forward", (1, 5, 5, 3), (4, 3, 3, 3)).problem


def keep_tuning(name="forward"):
    choices.keep(name, PROBLEM, "loop", {})


# ---------------------------------------------------------------------------------------- files and folders


def test_a_full_disk_is_one_warning(place, monkeypatch):
    """However many kernels and choices there are: the error names another temporary file each time."""
    count = 0

    def full(dir, suffix):
        nonlocal count
        count += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{dir}/{count}{suffix}")

    monkeypatch.setattr(files.tempfile, "mkstemp", full)
    kernels = faults.caught(lambda: [entries().save(key, b"") for key in range(5)])
    tuning = faults.caught(lambda: [keep_tuning(p) for p in PASSES])
    assert count == 8
    for found, what in ((kernels, "compiled kernels"), (tuning, "what was tuned")):
        assert len(found) == 1
        assert f"cannot keep {what}" in found[0]
        assert "(No space left on device)" in found[0]


def test_calls_on_a_full_disk_are_right(place):
    """Every write fails in its middle: results are right, one warning says why, and nothing half-written remains."""
    statistics, *warnings = child.run("import faults; faults.on_a_full_disk()", NHWCONV_CACHE_DIR=place).splitlines()
    loaded, compiled = map(int, statistics.split())
    assert loaded == 0
    assert compiled > 1
    assert len(warnings) == 1
    assert "(File too large)" in warnings[0]
    assert [p for p in place.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("kind", ["kernels", "tuning"])
def test_a_process_killed_in_the_middle_of_writing(kind, place):
    """Others find nothing, write anew, and a day later remove what it left."""
    code = "import sys, faults; faults.wait_before_the_move(sys.argv[1])"
    process = child.start(code, kind, NHWCONV_CACHE_DIR=place.parent, NHWCONV_TUNING="write")
    assert process.stdout.readline() == "written\n"
    process.kill()
    assert child.finish(process)[0] == -signal.SIGKILL
    (left,) = (p for p in place.rglob("*") if p.is_file())
    assert left.suffix == ".tmp"
    if kind == "kernels":
        assert entries().load("key") is None
        entries().save("key", b"code")
        assert entries().load("key") == b"code"
    else:
        assert choices.lookup("forward", PROBLEM) is None
        keep_tuning()
        choices.forget()
        assert choices.lookup("forward", PROBLEM) == "loop"
    assert left.exists()  # it may still be written to
    os.utime(left, (OLD, OLD))
    files._remove_abandoned.cache_clear()  # as a new process
    files.write_whole(left.with_name("other"), b"")
    assert not left.exists()


def test_kernels_that_nobody_used_for_a_month_are_removed(place):
    """Those of other versions alone, at the next write; what was loaded from a folder counts as use."""
    entries().save("key", b"code")
    (mine,) = (place / "kernels").iterdir()
    old, recent, used = (mine.with_name(name) for name in ("old", "recent", "used"))
    for folder in (old, recent, used):
        folder.mkdir()
        (folder / "kernel.bin").write_bytes(b"code")
    for folder in (mine, old, used):
        os.utime(folder, (OLD, OLD))
    files.mark_used(used)
    choices_of_others = place / "tuning"
    choices_of_others.mkdir()
    os.utime(choices_of_others, (OLD, OLD))
    files.remove_unused.cache_clear()  # as a new process
    assert entries().load("key") == b"code"
    assert mine.stat().st_mtime > OLD + 60
    assert old.exists()  # reading removes nothing
    entries().save("another key", b"code")
    assert sorted(p.name for p in (place / "kernels").iterdir()) == sorted([mine.name, "recent", "used"])
    assert choices_of_others.exists()


@pytest.mark.parametrize("step", ["mkstemp", "replace"])
def test_a_folder_that_is_swept_during_a_write_is_made_again(step, place, monkeypatch):
    """Another process clears the cache between two steps: the write starts over."""
    module = files.tempfile if step == "mkstemp" else files.os
    ordinary, sweeps = getattr(module, step), 0

    def swept(*arguments, **options):
        nonlocal sweeps
        sweeps += 1
        if sweeps < 5:
            store.clear_cache()
        return ordinary(*arguments, **options)

    monkeypatch.setattr(module, step, swept)
    entries().save("key", b"code")  # a warning would be an error
    assert entries().load("key") == b"code"
    assert sweeps == 5


def test_ctrl_c_in_the_middle_of_a_write_leaves_nothing(place, monkeypatch):
    """Neither a file nor a temporary one."""

    def stop(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        entries().save("key", b"code")
    assert [p for p in place.rglob("*") if p.is_file()] == []


# ------------------------------------------------------------------------------------- forks and interrupts


def test_a_child_forked_while_another_thread_compiles_can_compile(place):
    """Locks of a thread that does not exist in the child would stay locked for ever."""
    code = "import faults; faults.fork_while_another_thread_compiles()"
    assert child.run(code, NHWCONV_CACHE_DIR=place) == "done\n"  # an empty cache: both have something to compile


def test_first_calls_under_gevent(place):
    """In its pool of threads, in greenlets, and in what it makes of Python's threads, whose locks are its own."""
    code = "from gevent import monkey; monkey.patch_all(); import faults; faults.first_calls_under_gevent()"
    assert child.run(code, NHWCONV_CACHE_DIR=place, NUMBA_NUM_THREADS=2) == "done\n"  # an empty cache


@each_layer
def test_calls_after_ctrl_c_are_right(layer):
    """Calls interrupted at random moments: the next one has the right bits, and may launch in parallel."""
    code = "import sys, faults; faults.interrupted_calls(sys.argv[1])"
    out = child.run(code, amount(2, 30), NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=2)
    assert int(out) > 10


@each_layer
def test_calls_in_signal_handlers_are_right(layer):
    """A handler runs between any two steps of Python, also in the middle of a call: both have the right bits."""
    code = "import sys, faults; faults.calls_in_signal_handlers(sys.argv[1])"
    out = child.run(code, amount(2, 30), NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=2)
    assert int(out) >= 10


def test_compilation_after_ctrl_c_is_right(place):
    """Compiling interrupted at several moments: the next call compiles, and is right."""
    code = "import faults; faults.interrupted_compilation()"
    assert int(child.run(code, NHWCONV_CACHE_DIR=place)) > 3


# --------------------------------------------------------------------------------------------------- memory


def test_unused_buffers_are_given_back_before_memory_runs_out(monkeypatch):
    """An allocation that fails is tried again without them; where that fails too, the error is NumPy's."""
    arrays.release()
    size = (arrays.REUSED_FROM,)
    arrays.empty(size, np.dtype(np.uint8))  # waits for reuse now
    ordinary, tries = np.empty, []

    def short(nbytes, dtype):
        tries.append(nbytes)
        if arrays._buffers.nbytes() or nbytes > 10 * arrays.REUSED_FROM:
            raise MemoryError
        return ordinary(nbytes, dtype)

    monkeypatch.setattr(np, "empty", short)
    assert arrays.empty((2 * arrays.REUSED_FROM,), np.dtype(np.uint8)).nbytes == 2 * arrays.REUSED_FROM
    assert len(tries) == 2
    with pytest.raises(MemoryError):
        arrays.empty((20 * arrays.REUSED_FROM,), np.dtype(np.uint8))
    assert len(tries) == 4


@pytest.mark.parametrize("strategy", REGISTRY)
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_workspace_that_cannot_be_allocated_leaves_nothing_broken(dtype, pass_, strategy, monkeypatch):
    """Whichever allocation of a call fails, the error is a MemoryError, and the next call is right."""
    case = next(c for c in TYPICAL if strategy in supporting(c, pass_, dtype=dtype))
    data = data_of(case, dtype)
    expected = run(case, data, pass_, strategy).tobytes()
    failing, made = -1, 0

    def counted(allocate):
        def allocated(*arguments):
            nonlocal made
            made += 1
            if made - 1 == failing:
                raise MemoryError
            return allocate(*arguments)

        return allocated

    monkeypatch.setattr(arrays, "empty", counted(arrays.empty))
    monkeypatch.setattr(arrays, "scratch", counted(arrays.scratch))
    monkeypatch.setattr(executor, "STACK", -1)  # small scratch, too
    assert run(case, data, pass_, strategy).tobytes() == expected
    assert made == 2  # the result, and the scratch of the program
    for failing in range(made):
        made = 0
        with pytest.raises(MemoryError):
            run(case, data, pass_, strategy)
        assert not executor.launcher.inside
        failing, made = -1, 0
        assert run(case, data, pass_, strategy).tobytes() == expected


def test_too_little_address_space():
    """Results of 4 GiB do not fit: a MemoryError from every strategy; what fits without unused buffers, works."""
    out = child.run("import faults; faults.too_little_memory()", NUMBA_NUM_THREADS=2)
    assert out.split() == [name for name in nc.strategies() if name != "winograd"]


@pytest.mark.parametrize(("kind", "count"), [("small", amount(3000, 100_000)), ("large", amount(60, 1000))])
def test_memory_does_not_grow(kind, count):
    """Many calls, small or large, leave the process as large as it was, but for what malloc keeps."""
    grown = int(child.run("import sys, faults; faults.growth(*sys.argv[1:])", kind, count, NUMBA_NUM_THREADS=2))
    assert grown < max(2**20, 20 * count)  # a leak of one object a call would be more
