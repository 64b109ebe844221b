"""The one place that sets Numba's options and compiles: bodies, what they call, and the executor's two forms.

A **body** does one task of a step. It is compiled once, with one signature for all, into a function that is called by
its address: ``body(operands, geometry, worker, task, fresh)``, all of them integers.

- `operands` is the address of a table of addresses: the arrays and scratch that the step names, in its order;
- `geometry` is the address of the step's records (`nhwconv.runtime.records`);
- `worker` is the number of the worker, which has scratch of its own, and `fresh` whether this is its first task.

The same bits come out of every run: no `fastmath`, multiply-adds are fused explicitly, and sums are cut by the problem.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba.core import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.ccallback import CFunc
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic, register_jitable

from .store import Store, cache_folder

__all__ = ["Body", "call_body", "ceil_div", "compiled", "compiler_lock", "device", "disabled", "shielded"]

#: Everything is compiled with these. `nogil`: other Python threads run meanwhile.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "fastmath": False,
    "error_model": "numpy",
    "boundscheck": False,
    "_nrt": False,
}

#: Bytes of the stack of a thread that compiles: Numba recurses deeply, and callers' threads may have little.
STACK = 64 * 2**20

#: Held by whoever compiles, with Numba or with llvmlite alone.
compiler_lock = global_compiler_lock


def disabled() -> bool:
    """Return whether NUMBA_DISABLE_JIT keeps everything from being compiled."""
    config: Any = numba.config
    return bool(config.DISABLE_JIT)


class _Compilation(threading.Thread):
    """A thread that compiles, with a stack that is large enough; its result, or what it raised, is kept."""

    def __init__(self, compiling: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        super().__init__(name="nhwconv compiles", daemon=True)
        self._compiling, self._arguments = compiling, arguments
        self._result: Any = None
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Start, with a stack of its own size; the setting of other threads is what it was."""
        with compiler_lock:  # the setting is the process's: one thread after another changes it
            before = threading.stack_size(STACK)
            try:
                self.start()
            finally:
                threading.stack_size(before)

    def run(self) -> None:
        try:
            with _quiet():
                self._result = self._compiling(*self._arguments)
        except BaseException as error:  # raised in the thread that waits
            self._error = error

    def result(self) -> Any:
        """Wait; return what was compiled."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._result


def shielded(compiling: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``compiling(*arguments)``, out of Ctrl-C's reach: in a thread, since it strikes the main one alone.

    Numba does not survive it everywhere: what it imports as it first compiles registers itself once, and LLVM hands
    code over through callbacks, where Python prints an interrupt and goes on without the code. The caller is
    interrupted all the same, at once; the next one waits for what is being compiled, and has it.
    """
    # What is part of a compilation (the lock is this thread's) would wait for it in another thread.
    if not compiler_lock.is_locked():
        compilation = _Compilation(compiling, arguments)
        try:
            compilation.begin()
        except RuntimeError:  # no more threads: there are too many, or the program is ending
            pass
        else:
            return compilation.result()
    with _quiet():
        return compiling(*arguments)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold Numba's loggers at INFO: at DEBUG they print some 50,000 lines for one kernel."""
    log = logging.getLogger("numba")
    before = log.level
    if log.getEffectiveLevel() < logging.INFO:
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)


# ------------------------------------------------------------------------------------------------- cache


class _Payload(CompileResultCacheImpl):
    """What Numba writes for a compiled function, without a place on disk of its own."""

    class locator:  # noqa: N801 - Numba's name
        @staticmethod
        def ensure_cache_path() -> None:
            """`Store` makes its folder when it writes."""

    def check_cachable(self, cres: Any) -> bool:
        """Return whether the code makes sense in another process; where not, it is compiled anew in each."""
        return not (cres.lifted or cres.library.has_dynamic_globals)


class _Cache(FunctionCache):
    """Numba's function cache over `Store`; its search for a folder beside the source file is left out."""

    def __init__(self, py_func: Callable[..., Any], options: dict[str, Any]) -> None:
        self._name, self._py_func = repr(py_func), py_func
        self._cache_path = str(cache_folder())
        self._impl: Any = _Payload.__new__(_Payload)
        self._cache_file: Any = Store(f"{py_func.__module__}.{py_func.__qualname__}", options)
        self.enable()


def compiled(py_func: Callable[..., Any], **options: Any) -> Any:
    """Compile a function that Python calls, with these options beside the common ones; it is kept."""
    if disabled():
        return py_func
    options = {**OPTIONS, **options}
    dispatcher: Any = numba.njit(**options)(py_func)
    dispatcher._cache = _Cache(py_func, options)
    dispatcher._compile_for_args = partial(shielded, dispatcher._compile_for_args)
    return dispatcher


F = TypeVar("F", bound=Callable[..., Any])


class _LinkedIn(Compiler):
    """Numba's pipeline for functions that are only ever linked into others: no machine code of their own."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.state.flags.no_compile = True
        self.state.flags.no_cpython_wrapper = True
        self.state.flags.no_cfunc_wrapper = True

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        """Compile; Numba knows a function by its entry from Python, so each gets one, which nobody ever calls."""
        result = super().compile_extra(func)
        entry: Any = [].append
        result.target_context.insert_user_function(entry, result.fndesc, [result.library])
        return result._replace(entry_point=entry)


def device(py_func: F) -> F:
    """Let bodies call a function; it is compiled into them, and Python may call it as well."""
    found: F = register_jitable(**OPTIONS, pipeline_class=_LinkedIn)(py_func)
    return found


@device
def ceil_div(a: int, b: int) -> int:
    """Return ``a / b``, rounded up."""
    return (a + b - 1) // b


# ------------------------------------------------------------------------------------------------ bodies

_SIGNATURE = types.void(*[types.intp] * 5)


class Body:
    """A compiled task; nothing is compiled before its address is asked for."""

    def __init__(self, py_func: Callable[..., None]) -> None:
        self.py_func = py_func
        self._address = 0
        self._code: Any = None  # it owns the machine code

    @property
    def address(self) -> int:
        """Where the code is; loaded or compiled on first use."""
        return self._address or shielded(self._load_once)

    def _load_once(self) -> int:
        with compiler_lock:
            if not self._address:
                self._code = self._load()
                self._address = int(self._code.address)
            return self._address

    def _load(self) -> Any:
        code: Any = CFunc(self.py_func, (_SIGNATURE.args, _SIGNATURE.return_type), {}, dict(OPTIONS))
        code._cache = _Cache(self.py_func, OPTIONS)
        code.compile()
        return code

    @property
    def stats(self) -> tuple[int, int]:
        """How often the code was loaded from the store, and how often it was compiled."""
        if self._code is None:
            return 0, 0
        return self._code.cache_hits, int(not self._code.cache_hits)

    def __repr__(self) -> str:
        return f"Body({self.py_func.__module__}.{self.py_func.__qualname__})"


@intrinsic
def call_body(
    typingctx: Any, address: Any, operands: Any, geometry: Any, worker: Any, task: Any, fresh: Any
) -> tuple[Any, Any]:
    """Call a body by its address."""
    signature = types.void(*[types.intp] * 6)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> None:
        number = context.get_value_type(types.intp)
        kind = ir.FunctionType(ir.VoidType(), [number] * 5)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return signature, codegen
