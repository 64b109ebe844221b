"""The CPU as Numba compiles for it: vector width, registers, fused multiply-add, threads.

Numba's target can differ from the processor (`NUMBA_CPU_NAME`, `NUMBA_CPU_FEATURES`), so the compiler is asked, not
the operating system: a vector addition is compiled and its assembly shows which registers it uses.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import numba
from numba.core.config import reload_config
from numba.core.registry import cpu_target
from numba.np.ufunc import parallel

from .aside import Aside

__all__ = [
    "BYTES_A_CYCLE",
    "LINE",
    "STREAM_BYTES",
    "at_most_threads",
    "cpu_model",
    "flops_a_cycle",
    "has_fma",
    "lanes",
    "permutes",
    "registers",
    "target",
    "threads",
    "vector_bytes",
]

#: Bytes of a cache line.
LINE = 64
#: Bytes of a result from which on it is stored past the caches: more than a consumer would find there.
STREAM_BYTES = 12 * 2**20
#: Bytes that one core moves between memory and registers in a cycle, for predictions.
BYTES_A_CYCLE = 4
#: Below this many cycles of one core a parallel launch, of some 20,000, costs more than it saves.
SERIAL_CYCLES = 64_000

_PROBE = """
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
define void @probe(ptr %p) {
  %v = load <16 x float>, ptr %p
  %r = call <16 x float> @llvm.fma.v16f32(<16 x float> %v, <16 x float> %v, <16 x float> %v)
  store <16 x float> %r, ptr %p
  ret void
}
"""


@cache
def _assembly() -> str:
    machine = cpu_target.target_context.codegen()._tm
    module = llvm.parse_assembly(_PROBE)
    module.triple = machine.triple
    return str(machine.emit_assembly(module))


def _is_x86() -> bool:
    return str(llvm.get_process_triple()).startswith(("x86", "i386", "i686", "amd64"))


@cache
def vector_bytes() -> int:
    """Return the width of a vector register in bytes: 64 (AVX-512), 32 (AVX) or 16 (SSE, NEON)."""
    if not _is_x86():
        return 16
    return 64 if "zmm" in _assembly() else 32 if "ymm" in _assembly() else 16


@cache
def registers() -> int:
    """Return the number of vector registers: 16 before AVX-512 on x86, otherwise 32."""
    return 16 if _is_x86() and vector_bytes() < 64 else 32


@cache
def has_fma() -> bool:
    """Return whether a multiply and an add are one instruction."""
    return "vfmadd" in _assembly() or "fmla" in _assembly()


def permutes() -> bool:
    """Return whether one instruction brings the numbers of a vector into an order that is in a register: AVX-512's."""
    return vector_bytes() == 64


def lanes(itemsize: int) -> int:
    """Return how many numbers of this size a vector register holds."""
    return vector_bytes() // itemsize


def flops_a_cycle(itemsize: int) -> int:
    """Return the floating-point operations of a core's cycle at its peak: two vector multiply-adds."""
    return 4 * lanes(itemsize)


@cache
def cpu_model() -> str:
    """Return the processor's name as the operating system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


@cache
def target() -> tuple[str, ...]:
    """Return the triple, CPU and features that Numba compiles for."""
    return tuple(map(str, cpu_target.target_context.codegen().magic_tuple()))


def threads() -> int:
    """Return the number of threads that a call uses now: Numba's, which `numba.set_num_threads` sets.

    They are started by the first call. OpenMP then sets its number of threads, which is PyTorch's too, for the thread
    that starts them; so one does that ends at once. Before it, Numba reads the environment anew, as it does whenever it
    compiles: then it would refuse another number.
    """
    if not parallel._is_initialized:
        reload_config()
        starter = Aside(numba.get_num_threads)
        try:
            starter.begin()
        except RuntimeError:  # there are too many, or the program is ending
            return int(numba.get_num_threads())
        starter.result()
    return int(numba.get_num_threads())


@contextmanager
def at_most_threads(limit: int) -> Iterator[None]:
    """Let the calls of a block use no more than `limit` threads; afterwards the setting is what it was."""
    before = threads()
    if limit >= before:
        yield
        return
    numba.set_num_threads(limit)
    try:
        yield
    finally:
        numba.set_num_threads(before)
