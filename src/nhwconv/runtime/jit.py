"""The one place that sets Numba's options and compiles: bodies, what they call, and the executor's two forms.

A **body** does one task of a step. It is compiled once, with one signature for all, into a function that is called by
its address: ``body(operands, geometry, worker, task, fresh)``, all of them integers.

- `operands` is the address of a table of addresses: the arrays and scratch that the step names, in its order;
- `geometry` is the address of the step's records (`nhwconv.runtime.records`);
- `worker` is the number of the worker, which has scratch of its own, and `fresh` whether this is its first task.

The same bits come out of every run: no `fastmath`, multiply-adds are fused explicitly, and sums are cut by the problem.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba import _dynfunc  # type: ignore[attr-defined]
from numba.core import types
from numba.core.caching import CompileResultCacheImpl, FunctionCache
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.serialize import dumps
from numba.extending import intrinsic, register_jitable

from .aside import Aside, compiler_lock
from .machine import target
from .objects import load
from .store import Store, cache_folder

__all__ = ["Body", "Entry", "call_body", "ceil_div", "compiled", "compiler_lock", "device", "disabled", "shielded"]

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


def disabled() -> bool:
    """Return whether NUMBA_DISABLE_JIT keeps everything from being compiled."""
    config: Any = numba.config
    return bool(config.DISABLE_JIT)


def shielded(compiling: Callable[..., Any], *arguments: Any) -> Any:
    """Return ``compiling(*arguments)``, out of Ctrl-C's reach: in a thread, since it strikes the main one alone.

    Numba does not survive it everywhere: what it imports as it first compiles registers itself once, and LLVM hands
    code over through callbacks, where Python prints an interrupt and goes on without the code. The caller is
    interrupted all the same, at once; the next one waits for what is being compiled, and has it.
    """
    # What is part of a compilation (the lock is this thread's) would wait for it in another thread.
    if not compiler_lock.is_locked():
        compilation = Aside(_quietly, compiling, *arguments)
        try:
            compilation.begin(STACK)
        except RuntimeError:  # no more threads: there are too many, or the program is ending
            pass
        else:
            return compilation.result()
    return _quietly(compiling, *arguments)


def _quietly(compiling: Callable[..., Any], *arguments: Any) -> Any:
    """Hold Numba's loggers at INFO meanwhile: at DEBUG they print some 50,000 lines for one kernel."""
    log = logging.getLogger("numba")
    before = log.level
    if log.getEffectiveLevel() < logging.INFO:
        log.setLevel(logging.INFO)
    try:
        return compiling(*arguments)
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


class _Whole(JITCodeLibrary):
    """Numba's library of a function's code, which is optimised once, with all that is linked into it.

    Numba does it twice, for the sake of counts of references, and beforehand in each of the parts.
    """

    def _optimize_final_module(self) -> None:
        passes, builder = self._codegen._module_pass_manager()
        passes.run(self._final_module, builder)


class _Part(JITCodeLibrary):
    """The library of a function that is only ever linked into others: not optimised, and no machine code."""

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


class _Pipeline(Compiler):
    """Numba's pipeline, with a library of one of these kinds."""

    library: type[JITCodeLibrary] = _Whole

    def compile_extra(self, func: Callable[..., Any]) -> Any:
        """Compile."""
        self.state.library = self.library(self.state.targetctx.codegen(), func.__qualname__)
        self.state.library.enable_object_caching()
        return super().compile_extra(func)


class _LinkedIn(_Pipeline):
    """Numba's pipeline for functions that are only ever linked into others."""

    library = _Part

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


class _Kept:
    """Code that is loaded or compiled when it is first asked for, and kept as an object file.

    Numba's own way of loading has it fill its registries first, half a second of them.
    """

    def __init__(self, py_func: Callable[..., None], **options: Any) -> None:
        self.py_func, self.options = py_func, {**OPTIONS, **options}
        #: How often the code was loaded from the store, and how often it was compiled.
        self.stats = 0, 0
        self._code: Any = None  # it owns the machine code
        self._addresses: tuple[int, ...] = ()

    def _compile(self) -> tuple[Any, tuple[str, ...]]:
        """Compile; return Numba's library, and what the functions in it are called."""
        raise NotImplementedError

    def _key(self) -> tuple[object, ...]:
        """Return what the code depends on, other than this package and the options."""
        closed = dumps(tuple(cell.cell_contents for cell in self.py_func.__closure__ or ()))
        return (target(), *(hashlib.sha256(part).hexdigest() for part in (self.py_func.__code__.co_code, closed)))

    def _load_once(self) -> tuple[int, ...]:
        with compiler_lock:
            if not self._addresses:
                self._addresses = self._load()
            return self._addresses

    def _load(self) -> tuple[int, ...]:
        store = Store(f"{self.py_func.__module__}.{self.py_func.__qualname__}", self.options)
        key = self._key()
        kept = store.load(key)
        if kept is None:
            self._code, names = self._compile()
            self.stats = 0, 1
            if not self._code.has_dynamic_globals:  # they make sense in this process alone
                store.save(key, (names, self._code._get_compiled_object()))
            engine = self._code.codegen._engine
        else:
            names, code = kept
            engine = self._code = load(code)
            self.stats = 1, 0
        return tuple(int(engine.get_global_value_address(name)) for name in names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.py_func.__module__}.{self.py_func.__qualname__})"


class Body(_Kept):
    """A compiled task; nothing is compiled before its address is asked for."""

    @property
    def address(self) -> int:
        """Where the code is; loaded or compiled on first use."""
        return self._addresses[0] if self._addresses else int(shielded(self._load_once)[0])

    def _compile(self) -> tuple[Any, tuple[str, ...]]:
        code: Any = CFunc(self.py_func, (_SIGNATURE.args, _SIGNATURE.return_type), {}, self.options, _Pipeline)
        code.compile()
        return code._library, (code.native_name,)


class Entry(_Kept):
    """A compiled function of integers, as Python and as C call it; `begin` is called before it is loaded.

    Python calls its machine code as it is: no dispatcher looks at the types of what is passed.
    """

    def __init__(self, py_func: Callable[..., None], begin: Callable[[], object] | None = None, **options: Any) -> None:
        super().__init__(py_func, **options)
        self._begin = begin
        self.call: Callable[..., None] = py_func if disabled() else self._first_call

    def _first_call(self, *arguments: int) -> None:
        self._ready()
        self.call(*arguments)

    def _ready(self) -> tuple[int, ...]:
        if not self._addresses:
            if self._begin is not None:
                self._begin()
            shielded(self._load_once)
        return self._addresses

    @property
    def address(self) -> int:
        """Where the code is, as C calls it with integers; loaded or compiled on first use."""
        return self._ready()[1]

    def _compile(self) -> tuple[Any, tuple[str, ...]]:
        kinds = (types.intp,) * self.py_func.__code__.co_argcount
        dispatcher: Any = numba.njit(**self.options, pipeline_class=_Pipeline)(self.py_func)
        dispatcher.compile(kinds)
        found = dispatcher.overloads[kinds]
        names = found.fndesc.llvm_cpython_wrapper_name, found.fndesc.llvm_cfunc_wrapper_name
        return found.library, (*names, found.target_context.get_env_name(found.fndesc))

    def _load(self) -> tuple[int, ...]:
        python, _, environment = addresses = super()._load()
        # What an object file cannot hold: Numba's record of this function's module, which it looks for as Python calls.
        self._environment = _dynfunc.Environment(self.py_func.__globals__)
        ctypes.c_void_p.from_address(environment).value = id(self._environment)
        module = sys.modules[self.py_func.__module__]
        name = self.py_func.__name__
        self.call = _dynfunc.make_function(module, name, "", python, self._environment, (self._code,))
        return addresses


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
