"""The one place that sets Numba's options: kernels with a parallel and a serial form, and their cache.

A kernel is one Python body compiled at most twice, each on first use: in parallel, and as its **serial twin**, which
runs where a parallel launch could not survive or would not pay:

- in a child forked after GNU OpenMP started, which would be killed at its first launch;
- while another thread is inside a kernel under the workqueue layer, which aborts on concurrent entry;
- for tiny problems.

Both forms give the same bits: no `fastmath`, multiply-adds fused explicitly, and sums cut by the problem alone.

Numba's own file cache is not used (one index file for all kernels of a factory, and a race on it). Here every
compiled kernel is a file of its own, named by what it depends on, checksummed and replaced atomically.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps
from numba.misc import appdirs
from numba.np.ufunc import parallel
from numba.np.ufunc.parallel import get_num_threads, threading_layer

from ..files import keep, mark_used, remove_unused

__all__ = [
    "Kernel", "Store", "cache_folder", "ceil_div", "clear_cache", "compiler_lock", "device", "kernel", "shielded",
]  # fmt: skip

#: Every kernel is compiled with these. `nogil`: other Python threads run meanwhile.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "fastmath": False,
    "error_model": "numpy",
    "boundscheck": False,
    "_nrt": False,
}

# --------------------------------------------------------------------------------------------- compiling


#: Held by whoever compiles, with Numba or with llvmlite alone.
compiler_lock = global_compiler_lock


def shielded(compiling: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``compiling(*arguments)``, out of Ctrl-C's reach: in a thread, since it strikes the main one alone.

    Numba does not survive it everywhere: what it imports as it first compiles registers itself once, and LLVM hands
    code over through callbacks, where Python prints an interrupt and goes on without the code. The caller is
    interrupted all the same, at once; the next one waits for what is being compiled, and has it.
    """
    # What is part of a compilation (the lock is this thread's) would wait for it in another thread.
    if threading.current_thread() is not threading.main_thread() or compiler_lock.is_locked():
        return compiling(*arguments)
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        compiled = pool.submit(compiling, *arguments)
    except RuntimeError:  # no more threads: there are too many, or the program is ending
        return compiling(*arguments)
    pool.shutdown(wait=False)
    return compiled.result()


# ------------------------------------------------------------------------------------------------- cache


@cache
def _version() -> str:
    """Return a hash of everything, other than a kernel itself, that its machine code depends on."""
    digest = hashlib.sha256(repr((sys.version, numba.__version__, llvmlite.__version__)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Return the folder of compiled kernels: below NHWCONV_CACHE_DIR, NUMBA_CACHE_DIR or the user's cache folder."""
    root = os.environ.get("NHWCONV_CACHE_DIR") or os.environ.get("NUMBA_CACHE_DIR") or appdirs.user_cache_dir()
    return Path(root) / "nhwconv" / "kernels"


def clear_cache() -> None:
    """Delete all compiled kernels, those of other versions too."""
    shutil.rmtree(cache_folder(), ignore_errors=True)


class Store:
    """One file for each compiled kernel. What cannot be read is a miss; what cannot be written is one warning."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name, self.options = name, options

    def _identity(self, key: object) -> bytes:
        """Return all that an entry depends on, other than the version, as one text."""
        return repr((self.name, sorted(self.options.items()), key)).encode()

    def _path(self, identity: bytes) -> Path:
        digest = hashlib.sha256(identity).hexdigest()
        return self._folder() / f"{self.name.split('.')[-1]}-{digest}.bin"

    @staticmethod
    def _folder() -> Path:
        return cache_folder() / _version()

    def load(self, key: object) -> Any:
        """Return what was saved under `key`, or None."""
        identity = self._identity(key)
        try:
            data = self._path(identity).read_bytes()
        except OSError:
            return None
        mark_used(self._folder())
        # The checksum covers the identity too, so another kernel's file under this name is a miss.
        checksum, payload = data[:32], data[32:]
        return pickle.loads(payload) if hashlib.sha256(identity + payload).digest() == checksum else None

    def save(self, key: object, data: object) -> None:
        """Keep `data`; readers see all of it or nothing."""
        identity, payload = self._identity(key), dumps(data)
        keep(
            self._path(identity),
            hashlib.sha256(identity + payload).digest() + payload,
            cache_folder(),
            "compiled kernels",
            "each process compiles them anew",
        )
        remove_unused(self._folder())

    def flush(self) -> None:
        """Nothing is buffered."""


class _KernelCache(FunctionCache):
    """Numba's function cache over `Store`; its search for a folder beside the source file is left out."""

    def __init__(self, py_func: Callable[..., Any], options: dict[str, Any]) -> None:
        self._name, self._py_func = repr(py_func), py_func
        self._cache_path = str(cache_folder())
        self._impl: Any = _Payload.__new__(_Payload)
        self._cache_file: Any = Store(f"{py_func.__module__}.{py_func.__qualname__}", options)
        self.enable()


class _Payload(CompileResultCacheImpl):
    """What Numba writes for a compiled function, without a place on disk of its own."""

    class locator:  # noqa: N801 - Numba's name
        @staticmethod
        def ensure_cache_path() -> None:
            """`Store` makes its folder when it writes."""


def _compiled(py_func: Callable[..., Any], **options: Any) -> Dispatcher:
    options = {**OPTIONS, **options}
    dispatcher = numba.njit(**options)(py_func)
    dispatcher._cache = _KernelCache(py_func, options)
    dispatcher._compile_for_args = partial(shielded, dispatcher._compile_for_args)
    return dispatcher


def device(py_func: Callable[..., Any]) -> Dispatcher:
    """Compile a function that kernels call; it is compiled into them, and kept with them."""
    return numba.njit(**OPTIONS)(py_func)


@device
def ceil_div(a: int, b: int) -> int:
    """Return ``a / b``, rounded up."""
    return (a + b - 1) // b


# --------------------------------------------------------------------------------------- threads and forks


class _Launcher:
    """Knows whether a parallel launch is safe now."""

    def __init__(self) -> None:
        self.inside: dict[str, int] = {}  # "launch": the thread that is inside a workqueue launch
        self.layer: str | None = None  # unknown until the first launch
        self.orphaned = False  # forked after OpenMP started

    def start(self) -> str:
        """Start Numba's threading layer, if it isn't running, and return its name."""
        if self.layer is None:
            get_num_threads()
            self.layer = str(threading_layer())
        return self.layer

    def enter(self) -> bool:
        """Claim workqueue for this thread; False where another thread is inside a launch.

        Ctrl-C may strike between a claim and the `try` that gives it back. But a claim is its thread's, and a thread
        that comes here is inside no launch: so its next call has the claim, and gives it back.
        """
        me = threading.get_ident()
        return self.inside.setdefault("launch", me) == me  # one step, whichever threads are about

    def leave(self) -> None:
        """Give workqueue back."""
        self.inside.pop("launch", None)

    def before_fork(self) -> None:
        """Wait for whoever compiles: a child made then would find locks held by nobody, and LLVM halfway through."""
        compiler_lock.acquire()

    def after_fork(self) -> None:
        """In a forked child: nobody is inside a launch or compiles; remember whether OpenMP had been used."""
        compiler_lock.release()
        self.inside = {}
        # Numba's own state, too: another user of Numba may have started OpenMP.
        self.orphaned = self.orphaned or (parallel._is_initialized and threading_layer() == "omp")


_launcher = _Launcher()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_launcher.before_fork, after_in_parent=compiler_lock.release, after_in_child=_launcher.after_fork
    )


#: A queue is one counter for each worker, some cache lines apart: prefetchers ask for neighbours.
COUNTERS_APART = 32


class Kernel:
    """A compiled body with a parallel and a serial form.

    A body takes ``(*arguments, queue, workers, geometry)``: its workers take their tasks from the queue
    (`nhwconv.kernels.tasks`), and the geometry says how many there are. `run` makes the queue.
    """

    def __init__(self, py_func: Callable[..., Any]) -> None:
        self.py_func = py_func
        self.parallel = _compiled(py_func, parallel=True)
        self.serial = _compiled(py_func)

    def run(self, *arguments: Any, geometry: Any, workers: int) -> None:
        """Do all tasks of `geometry` with `workers` threads."""
        self(*arguments, np.zeros(workers * COUNTERS_APART, np.int64), workers, geometry, workers=workers)

    def __call__(self, *arguments: Any, workers: int) -> None:
        """Run with `workers` threads: in parallel where that is more than one, and safe."""
        if workers <= 1 or _launcher.orphaned:
            self.serial(*arguments)
        elif _launcher.start() != "workqueue":
            self.parallel(*arguments)
        elif _launcher.enter():
            try:
                self.parallel(*arguments)
            finally:
                _launcher.leave()
        else:
            self.serial(*arguments)


def kernel(py_func: Callable[..., Any]) -> Kernel:
    """Make a `Kernel` of a function; nothing is compiled before it is called."""
    return Kernel(py_func)
