"""No kernel touches a byte outside of its arrays: they lie against pages without access, in processes of their own."""

import signal
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import child
from cases import Case, cases
from extent import amount
from guarded import DTYPES, LAYOUTS, Problem

pytestmark = pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="needs mprotect")

#: How many random problems, over both processes together.
PROBLEMS = amount(200, 5000)


class Worker:
    """A process that runs problems; where one kills it, a new one takes the next."""

    def __init__(self, threads):
        self.threads, self.process = threads, None

    def run(self, problem):
        if self.process is None:
            self.process = child.start("import guarded; guarded.serve()", NUMBA_NUM_THREADS=self.threads)
        print(repr(problem), file=self.process.stdin, flush=True)
        last = ""
        for line in self.process.stdout:
            if line.startswith("ok"):
                return int(line.split()[1])
            last = line
        process, self.process = self.process, None
        status, _, err = child.finish(process)
        raise AssertionError(f"ended with {status} in\n{last}\n{err}")

    def stop(self):
        if self.process:
            assert child.finish(self.process)[0] == 0


@pytest.fixture(scope="module", params=[1, 2], ids=["serial", "parallel"])
def worker(request):
    """Kernels in their serial form and in the parallel one."""
    worker = Worker(request.param)
    yield worker
    worker.stop()


problems = st.builds(
    Problem,
    cases(),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.integers(0, 999),
    st.booleans(),
    st.sampled_from([30, 1000, 2**22]),
)


#: Patches, whose pixels become channels of one: the bias of their input gradient is written for each of them.
PATCHES = Case(n=2, h=6, w=20, c=3, d=20, kh=3, kw=5, stride=(3, 5))


@settings(max_examples=PROBLEMS // 2)
@example(problem=Problem(PATCHES))
@example(problem=Problem(PATCHES, "float64", seed=1))
@given(problem=problems)
def test_no_pass_touches_memory_outside_its_arrays(worker, problem):
    """Every strategy, pass, dtype and stride: arrays and workspaces at the ends and the starts of their pages."""
    assert worker.run(problem) >= 3 * 3 * 2  # three strategies at least do every pass


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
