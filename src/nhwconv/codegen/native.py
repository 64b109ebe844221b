"""Functions written as LLVM IR, compiled once, and called from bodies by their address.

Were an intrinsic to emit a micro-kernel's code into each body that uses it, every one of them would optimise it again:
seconds each. So it is machine code of its own, kept in the store, and a body gets its address as a number.

What a function takes is a named tuple, made of pointers, integers, flags and further tuples. Both sides use it: the
caller fills it in by name, ``invoke(address, Product(rows=..., a=Operand(...)))``, and who emits the function finds
each of its numbers by a name such as ``a.step`` (`Arguments`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..runtime.jit import compiler_lock, shielded
from ..runtime.machine import target
from ..runtime.objects import load, target_machine
from ..runtime.store import Store
from .simd import I1, I64

__all__ = ["Arguments", "Native", "Pointer", "declare", "invoke", "native"]


class Pointer:
    """In a named tuple of arguments: the address of a number."""


_LEAVES = {bool: I1, int: I64}

# --------------------------------------------------------------------------------------------- arguments


def _leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield the names and kinds of all numbers in a named tuple of arguments, in order."""
    for name, hint in get_type_hints(kind).items():
        if hint is Pointer or hint in _LEAVES:
            yield prefix + name, hint
        else:
            yield from _leaves(hint, f"{prefix}{name}.")


def declare(module: ir.Module, name: str, kind: type, scalar: ir.Type, *more: ir.Type) -> ir.Function:
    """Declare a function that takes what `kind` names, with pointers to these numbers, and perhaps more behind it."""
    places = [scalar.as_pointer() if hint is Pointer else _LEAVES[hint] for _, hint in _leaves(kind)]
    return ir.Function(module, ir.FunctionType(ir.VoidType(), [*places, *more]), name)


class Arguments:
    """The arguments of an emitted function by their names."""

    def __init__(self, function: ir.Function, kind: type) -> None:
        names = (name for name, _ in _leaves(kind))
        self._values: dict[str, ir.Value] = dict(zip(names, function.args, strict=False))

    def __getitem__(self, name: str) -> ir.Value:
        return self._values[name]

    def __setitem__(self, name: str, value: ir.Value) -> None:
        """Give an argument another value, such as a constant that it always has."""
        self._values[name] = value

    def values(self) -> list[ir.Value]:
        """Return all of them, in the order in which a function takes them."""
        return list(self._values.values())


@intrinsic
def invoke(typingctx, address, arguments):
    """Call a native function by its address, with a named tuple of what it takes."""
    signature = types.void(types.intp, arguments)

    def codegen(context, builder, sig, args):
        values = list(_flat(context, builder, sig.args[1], args[1]))
        kind = ir.FunctionType(ir.VoidType(), [v.type for v in values])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)

    return signature, codegen


def _flat(context: Any, builder: ir.IRBuilder, ty: types.Type, value: ir.Value) -> Iterator[ir.Value]:
    """Yield the numbers of a tuple as the function takes them."""
    if isinstance(ty, types.BaseTuple):
        for i, each in enumerate(ty.types):  # type: ignore[attr-defined]
            yield from _flat(context, builder, each, builder.extract_value(value, i))
    elif isinstance(ty, types.CPointer):
        yield value
    elif isinstance(ty, types.Boolean):
        yield context.cast(builder, value, ty, types.boolean)
    else:
        yield context.cast(builder, value, ty, types.intp)


# ---------------------------------------------------------------------------------------------- compiling

_store = Store("native", {})
_addresses: dict[str, int] = {}


class Native:
    """A function by its name; it is loaded or compiled when a program that runs it asks for its address, by `int`."""

    def __init__(self, name: str, emit: Callable[[ir.Module, str], None]) -> None:
        self.name, self.emit = name, emit

    def __int__(self) -> int:
        return _addresses.get(self.name) or int(shielded(_load_once, self.name, self.emit))

    def __repr__(self) -> str:
        return f"Native({self.name})"


def native(name: str, emit: Callable[[ir.Module, str], None]) -> Native:
    """Return the function `name`, which ``emit(module, name)`` writes.

    `name` says all that the code depends on, other than the CPU and this package's version.
    """
    return Native(name, emit)


def _load_once(name: str, emit: Callable[[ir.Module, str], None]) -> int:
    with compiler_lock:
        return _addresses.get(name) or _addresses.setdefault(name, _load(name, emit))


def _load(name: str, emit: Callable[[ir.Module, str], None]) -> int:
    key = name, target()
    code = _store.load(key)
    if code is None:
        code = _compile(name, emit)
        _store.save(key, code)
    return int(load(code).get_function_address(name))


def _compile(name: str, emit: Callable[[ir.Module, str], None]) -> bytes:
    module = ir.Module(name)
    module.triple = llvm.get_process_triple()
    emit(module, name)
    machine = target_machine()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=1))
    passes.getModulePassManager().run(parsed, passes)
    return bytes(machine.emit_object(parsed))
