"""Memory: aligned, and reused only when nothing can see it any more."""

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nhwconv.runtime import arrays

LARGE = (arrays.REUSED_FROM // 4 + 100,)  # float32
F = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def _no_unused_buffers():
    arrays.release()
    yield
    arrays.release()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
@pytest.mark.parametrize("count", [0, 1, 5, 4095, 4097, 100_001, 2**20 - 1, 2**20, 2**21 + 3])
def test_arrays_are_what_was_asked_for(count, dtype):
    """Shape, dtype and layout are exact, all of it can be written; a large one starts at a cache line."""
    a = arrays.empty((count, 1), np.dtype(dtype))
    assert a.shape == (count, 1)
    assert a.dtype == dtype
    assert a.flags.c_contiguous
    assert a.flags.writeable
    a[...] = 3
    assert (a == 3).all()
    large = a.nbytes >= arrays.REUSED_FROM
    assert a.flags.owndata == (not large)
    if large:
        assert a.ctypes.data % arrays.ALIGNMENT == 0


def test_a_dead_arrays_buffer_is_reused():
    """The next large array of about that size lies where the last one lay."""
    a = arrays.empty(LARGE, F)
    where = a.ctypes.data
    del a
    b = arrays.empty(LARGE, F)
    assert b.ctypes.data == where
    assert arrays.empty(LARGE, F).ctypes.data != where  # b is alive


@pytest.mark.parametrize(
    "see",
    [
        lambda a: a[::2],
        lambda a: a[5:6],
        lambda a: a.reshape(2, -1).T[1:],
        lambda a: a.view(np.uint32),
        lambda a: memoryview(a),
        lambda a: np.frombuffer(a, np.uint8),
        lambda a: np.lib.stride_tricks.as_strided(a, (3, 3), (4, 8)),
        lambda a: np.asarray(memoryview(a)[10:20]),
        lambda a: a.view(type("Sub", (np.ndarray,), {})),
        lambda a: a[3:].ctypes,
    ],
)
def test_memory_that_anything_can_see_is_not_reused(see):
    """A view of whatever kind keeps the buffer, though the array itself is gone."""
    a = arrays.empty(LARGE, F)
    low, high = a.ctypes.data, a.ctypes.data + a.nbytes
    view = see(a)
    del a
    gc.collect()
    others = [arrays.empty(LARGE, F) for _ in range(3)]
    assert all(o.ctypes.data >= high or o.ctypes.data + o.nbytes <= low for o in others)
    del view
    gc.collect()
    assert arrays.empty(LARGE, F).ctypes.data == low


def test_living_arrays_never_overlap():
    """Arrays of many sizes, made and dropped in any order, keep what was written to them."""
    rng = np.random.default_rng(0)
    alive = {}
    for i in range(300):
        size = int(rng.integers(arrays.REUSED_FROM // 2, 3 * arrays.REUSED_FROM)) // 4
        alive[i] = arrays.empty((size,), F)
        alive[i].fill(i)
        for j in [j for j in alive if rng.random() < 0.2]:
            assert (alive[j] == j).all()
            del alive[j]
    assert all((a == i).all() for i, a in alive.items())


def test_unused_memory_is_bounded(monkeypatch):
    """No more than KEPT bytes wait for reuse, whatever was freed; release() frees them all."""
    monkeypatch.setattr(arrays, "KEPT", 5 * 2**20)
    held = [arrays.empty((2**20 + 1000 * i,), np.dtype(np.uint8)) for i in range(20)]
    del held
    assert 2**20 < arrays._buffers.nbytes() <= 5 * 2**20
    arrays.release()
    assert arrays._buffers.nbytes() == 0


def test_a_much_larger_buffer_is_not_wasted_on_a_small_array():
    """A buffer serves arrays of four fifths of its size and up."""
    a = arrays.empty((8 * 2**20,), np.dtype(np.uint8))
    where = a.ctypes.data
    del a
    assert arrays.empty((4 * 2**20,), np.dtype(np.uint8)).ctypes.data != where
    assert arrays.empty((7 * 2**20,), np.dtype(np.uint8)).ctypes.data == where


def test_scratch_of_all_sizes_is_one_buffer():
    """As large as the largest that was asked for; two at a time are two, and results have others."""
    steps = [m * 2**20 for m in (1, 4, 2, 16, 3, 16, 1)]
    for nbytes in steps:
        scratch = arrays.scratch(nbytes)
        assert scratch.nbytes >= nbytes
        assert scratch.ctypes.data % arrays.ALIGNMENT == 0
        del scratch
    assert arrays._scratch.nbytes() == 16 * 2**20
    first, second = arrays.scratch(8 * 2**20), arrays.scratch(2**20)
    assert first.nbytes == 16 * 2**20
    assert second.nbytes == 2**20
    del first, second
    assert arrays._scratch.nbytes() == 17 * 2**20
    assert arrays._buffers.nbytes() == 0
    arrays.release()
    assert arrays._scratch.nbytes() == 0


FORK = """
import os
import numpy as np
from nhwconv.runtime import arrays
scratch = np.ndarray((2**20,), np.uint8, arrays.scratch(2**20))
scratch[:] = 1
child = os.fork()
if child == 0:
    scratch[:] = 2
    os._exit(0)
os.waitpid(child, 0)
assert (scratch == 1).all()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no forks")
def test_a_forked_child_has_scratch_of_its_own():
    """What it writes, its parent does not see."""
    subprocess.run([sys.executable, "-c", FORK], check=True)


def test_no_memory_for_scratch_is_a_memory_error():
    """Whatever the system says."""
    with pytest.raises(MemoryError, match="scratch"):
        arrays.scratch(2**60)


def test_threads_do_not_get_each_others_memory():
    """Eight threads that make and drop arrays, and collect garbage: each finds what it wrote."""
    together = threading.Barrier(8)

    def work(me):
        rng = np.random.default_rng(me)
        together.wait(60)
        for i in range(60):
            size = int(rng.integers(arrays.REUSED_FROM, 2 * arrays.REUSED_FROM)) // 4
            mine = [arrays.empty((size,), F) for _ in range(3)]
            mine += [np.ndarray((size,), F, arrays.scratch(4 * size + 2**20 * k)) for k in range(2)]
            for k, a in enumerate(mine):
                a[::512] = 100 * me + k
            if i % 20 == 0:
                gc.collect()
            for k, a in enumerate(mine):
                assert (a[::512] == 100 * me + k).all()
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 8
