"""What nhwconv finds on this machine, as pairs of a name and a text."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba.np.ufunc.parallel import threading_layer

from .. import _version, choices
from ..runtime import machine
from ..runtime.store import cache_folder
from ..strategies import AUTO, REGISTRY
from . import roofline
from .table import thread_count

__all__ = ["cache_size", "facts", "limits"]


def facts() -> list[tuple[str, str]]:
    """Return the facts that ``nhwconv info`` prints. It starts Numba's threads, to ask which layer runs them."""
    vector = machine.vector_bytes()
    fma = "with" if machine.has_fma() else "without"
    threads = machine.threads()  # starts them
    layer = threading_layer()  # type: ignore[no-untyped-call]
    kernels, megabytes = cache_size()
    others = ", ".join(name for name in REGISTRY if name not in AUTO)
    return [
        ("nhwconv", _version.__version__),
        ("Python", f"{platform.python_version()} on {platform.platform(terse=True)}"),
        ("NumPy", f"{np.__version__} with {_blas()}"),
        ("Numba", f"{numba.__version__}, llvmlite {llvmlite.__version__}"),
        ("CPU", f"{machine.cpu_model()} (LLVM: {llvm.get_host_cpu_name()})"),
        ("vectors", f"{vector * 8} bits: {vector // 4} float32 or {vector // 8} float64, {fma} fused multiply-add"),
        ("registers", f"{machine.registers()} of them"),
        ("caches", ", ".join(_caches()) or "unknown"),
        ("threads", f"{threads}, layer {layer}"),
        ("strategies", f"{', '.join(AUTO)} (chosen by auto), {others} (by name)"),
        ("kernel cache", f"{cache_folder()}: {kernels} kernels, {megabytes:.1f} MB"),
        ("tuning", f"{choices.folder()}: {choices.count()} entries, {_megabytes(choices.folder()):.1f} MB"),
    ]


def limits() -> Iterator[tuple[str, str]]:
    """Measure what this machine could do, a dtype and a number of threads at a time; each takes about half a second."""
    for dtype in ("float32", "float64"):
        for count in dict.fromkeys((1, machine.threads())):
            with machine.at_most_threads(count):
                found = roofline.measure(np.dtype(dtype))
            text = f"{found.peak / 1e9:.0f} GFLOP/s, {found.bandwidth / 1e9:.0f} GB/s"
            yield "peak", f"{text}: {dtype}, {thread_count(count)}, measured"


def cache_size() -> tuple[int, float]:
    """Return how many compiled kernels are kept, and their megabytes."""
    return sum(file.is_file() for file in cache_folder().rglob("*")), _megabytes(cache_folder())


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _caches() -> list[str]:
    """Return the first processor's caches as Linux tells them; nothing elsewhere."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    found = []
    for index in sorted(folder.glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return found


def _blas() -> str:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas['name']} {blas['version']}"
