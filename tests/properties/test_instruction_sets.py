"""Other CPUs, as Numba can be told to compile for them: the vectors are theirs, and the results are the same."""

import platform

import pytest

import child
from nhwconv.runtime import machine

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
    out = child.run(
        "import guarded; guarded.check_target()", NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="", NUMBA_NUM_THREADS=1
    )
    assert out.splitlines()[0] == expected
    assert len(out.splitlines()) > 10 * 3 * 2


def test_this_cpu():
    """What is reported agrees with itself, and with what Numba says of the host's features."""
    from llvmlite import binding

    assert machine.vector_bytes() in (16, 32, 64)
    assert machine.registers() in (16, 32)
    assert machine.lanes(4) == machine.vector_bytes() // 4 == 2 * machine.lanes(8)
    assert machine.threads() >= 1
    if platform.machine() in ("x86_64", "AMD64"):
        features = binding.get_host_cpu_features()
        assert machine.has_fma() == features.get("fma", False)
        assert (machine.vector_bytes() >= 32) == features.get("avx", False)


@x86
def test_avx512_width():
    """With AVX-512 all of a register is used, although LLVM prefers half of it on some CPUs."""
    from llvmlite import binding

    if not binding.get_host_cpu_features().get("avx512f", False):
        pytest.skip("no AVX-512 here")
    assert machine.vector_bytes() == 64
    assert machine.registers() == 32
