"""What nhwconv finds on this machine, as pairs of a name and a text."""

from __future__ import annotations

import platform

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba.np.ufunc.parallel import threading_layer

from .. import _version, choices, machine
from ..kernels.jit import cache_folder
from ..strategies import AUTO, REGISTRY

__all__ = ["cache_size", "facts"]


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
        ("threads", f"{threads}, layer {layer}"),
        ("strategies", f"{', '.join(AUTO)} (chosen by auto), {others} (by name)"),
        ("kernel cache", f"{cache_folder()}: {kernels} kernels, {megabytes:.1f} MB"),
        ("tuning", f"{choices.folder()}: {choices.count()} entries"),
    ]


def cache_size() -> tuple[int, float]:
    """Return how many compiled kernels are kept, and their megabytes."""
    files = [file for file in cache_folder().rglob("*") if file.is_file()]
    return len(files), sum(file.stat().st_size for file in files) / 1e6


def _blas() -> str:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas['name']} {blas['version']}"
