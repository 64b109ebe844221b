"""The CPU as Numba compiles for it, and its threads."""

import platform

import numba
import pytest

from nhwconv.runtime import machine


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


def test_avx512_width():
    """With AVX-512 all of a register is used, although LLVM prefers half of it on some CPUs."""
    from llvmlite import binding

    wide = bool(binding.get_host_cpu_features().get("avx512f", False))
    assert (machine.vector_bytes() == 64) == wide
    assert machine.registers() == 32 or not wide


@pytest.mark.parametrize(
    ("assembly", "x86", "expected"),
    [
        ("vfmadd213ps %zmm0", True, (64, 32, True)),
        ("vfmadd213ps %ymm0", True, (32, 16, True)),
        ("mulps %xmm0", True, (16, 16, False)),
        ("fmla v0.4s", False, (16, 32, True)),
    ],
)
def test_the_compiler_is_asked(assembly, x86, expected, monkeypatch):
    """What it emits for a vector multiply-add says which registers there are."""
    for function in (machine.vector_bytes, machine.registers, machine.has_fma):
        monkeypatch.setattr(machine, function.__name__, function.__wrapped__)
    monkeypatch.setattr(machine, "_assembly", lambda: assembly)
    monkeypatch.setattr(machine, "_is_x86", lambda: x86)
    assert (machine.vector_bytes(), machine.registers(), machine.has_fma()) == expected
    assert machine.lanes(4) == expected[0] // 4
    assert machine.flops_a_cycle(4) == 4 * machine.lanes(4)


def test_threads_are_numbas():
    """As many as set_num_threads says; fewer for a block, and afterwards as many as before."""
    before = numba.get_num_threads()
    with machine.at_most_threads(1):
        assert machine.threads() == 1
        with machine.at_most_threads(10**6):
            assert machine.threads() == 1
    assert machine.threads() == before
    with pytest.raises(ZeroDivisionError), machine.at_most_threads(1):
        _ = 1 // 0
    assert machine.threads() == before
