"""Other CPUs, as Numba can be told to compile for them: the vectors are theirs, and the results are the same."""

import platform

import pytest

import child
import guarded

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs an x86 CPU")


@x86
@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("haswell", "32 16 True 8 4"),  # AVX2
        ("nehalem", "16 16 False 4 2"),  # SSE4.2, no fused multiply-add
    ],
)
def test_other_instruction_sets(cpu, expected):
    """Compiled for an older CPU, every pass equals the oracle, inside guard pages as well."""
    own, code = guarded.vectors(), "import sys, guarded; guarded.check_target(sys.argv[1])"
    out = child.run(code, own, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="", NUMBA_NUM_THREADS=1)
    assert out.splitlines()[0] == expected
    assert own == expected or len(out.splitlines()) > 10 * 3 * 2
