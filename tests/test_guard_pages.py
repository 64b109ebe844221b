"""No kernel touches a byte outside of its arrays: they lie against pages without access, in processes of their own."""

import os
import signal
import sys

import pytest

import child

pytestmark = pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="needs mprotect")

#: How many random problems, over all processes together; more finds more.
PROBLEMS = int(os.environ.get("NHWCONV_GUARD_PROBLEMS", "300"))
PROCESSES = 3


@pytest.mark.parametrize("seed", range(PROCESSES))
def test_no_pass_touches_memory_outside_its_arrays(seed):
    """Random problems, every strategy and pass, arrays and workspaces at the ends and the starts of their pages."""
    count = -(-PROBLEMS // PROCESSES)
    code = "import sys, guarded; guarded.run(int(sys.argv[1]), int(sys.argv[2]))"
    process = child.start(code, seed, count, NUMBA_NUM_THREADS=1 + seed % 2)  # serial and parallel forms
    status, out, err = child.finish(process, timeout=60 + count)
    last = out.strip().rsplit("\n", 1)[-1]
    assert status == 0, f"ended with {status} in\n{last}\n{err}"
    assert len(out.splitlines()) > count  # it did run


KILLED = (-signal.SIGSEGV, -signal.SIGBUS)
ARRAY = "import ctypes, numpy as np; from guarded import Guarded; g = Guarded((3, 5), np.float32, {at_start}); "
READ = "ctypes.string_at(g.array.ctypes.data + {offset}, 1); print('done')"
WRITE = "ctypes.memset(g.array.ctypes.data + {offset}, 0, 1); print('done')"


@pytest.mark.parametrize(("at_start", "inside", "outside"), [(False, 59, 60), (True, 0, -1)])
@pytest.mark.parametrize("access", [READ, WRITE], ids=["read", "write"])
def test_one_byte_outside_kills(at_start, inside, outside, access):
    """The guard works: the last byte of an array can be touched, the next one ends the process."""
    assert "done" in child.run((ARRAY + access).format(at_start=at_start, offset=inside))
    status, out, _ = child.finish(child.start((ARRAY + access).format(at_start=at_start, offset=outside)))
    assert status in KILLED
    assert "done" not in out


def test_a_write_to_an_input_kills():
    """The guard works: an input that was made read-only cannot be written, whatever NumPy's flags say."""
    code = ARRAY.format(at_start=True) + "g.make_read_only(); g.array.sum(); g.array[0, 0] = 1; print('done')"
    status, out, _ = child.finish(child.start(code))
    assert status in KILLED
    assert "done" not in out


@pytest.mark.parametrize(("at_start", "outside"), [(False, -1), (True, 60)])
def test_a_write_on_the_other_side_is_found(at_start, outside):
    """The guard works: bytes of the page that are not the array's are checked."""
    code = (ARRAY + "g.check(); " + WRITE + "; g.check()").format(at_start=at_start, offset=outside)
    status, out, err = child.finish(child.start(code))
    assert (status, out.strip()) == (1, "done")
    assert "written beside an array of shape (3, 5)" in err
