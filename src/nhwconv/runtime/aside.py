"""What must not run in the calling thread runs aside: in one of the system's threads, which ends with it.

The system's, since gevent and its like put greenlets in the place of Python's threads and locks. Those take turns in
one thread, so that a lock which one of them holds while it lets another run is never given back. Nothing here, and no
lock of Numba's or LLVM's that threads wait for, is of their kind.
"""

from __future__ import annotations

import _thread
import sys
from collections.abc import Callable
from typing import Any

from llvmlite.binding import ffi
from numba.core.compiler_lock import global_compiler_lock
from numba.np.ufunc import parallel

__all__ = ["Aside", "compiler_lock"]

#: Held by whoever compiles, with Numba or with llvmlite alone.
compiler_lock: Any = global_compiler_lock

# Contended ones: whoever compiles holds the second for seconds, and any LLVM object that goes asks for it.
for _owner, _name in ((compiler_lock, "_lock"), (ffi.lib._lock, "_lock"), (parallel, "_backend_init_thread_lock")):
    if not isinstance(getattr(_owner, _name), _thread.RLock):
        setattr(_owner, _name, _thread.RLock())


def _native(name: str) -> Any:
    """Return a function of `_thread`, also where gevent has one of its own there."""
    gevent = sys.modules.get("gevent.monkey")
    return getattr(_thread, name) if gevent is None else gevent.get_original("_thread", name)


class Aside:
    """A call in a thread of its own; its result, or what it raised, is kept for the thread that waits."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments
        self._result: Any = None
        self._error: BaseException | None = None
        self._running = _native("allocate_lock")()
        self._running.acquire()

    def begin(self, stack: int = 0) -> None:
        """Start, with a stack of so many bytes, or as many as other threads have; their setting is what it was.

        A RuntimeError says that there are no more threads: too many, or Python is ending and runs no other.
        """
        if sys.is_finalizing():
            raise RuntimeError("Python is ending")
        start, size = _native("start_new_thread"), _native("stack_size")
        if not stack:
            start(self._run, ())
            return
        with compiler_lock:  # the setting is the process's: one thread after another changes it
            before = size(stack)
            try:
                start(self._run, ())
            finally:
                size(before)

    def _run(self) -> None:
        try:
            self._result = self._function(*self._arguments)
        except BaseException as error:  # raised in the thread that waits
            self._error = error
        finally:
            self._running.release()

    def result(self) -> Any:
        """Wait; return the result."""
        with self._running:
            pass
        if self._error is not None:
            raise self._error
        return self._result
