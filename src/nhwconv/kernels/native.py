"""Functions written as LLVM IR, compiled once, and called from kernels by their address.

Were an intrinsic to emit a micro-kernel's code into each kernel that uses it, every one of them, and both of its forms,
would optimise it again: seconds each. So it is machine code of its own, kept in the kernel cache, and a kernel gets its
address as a number. It also follows that both forms of a kernel run the very same instructions.
"""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core.registry import cpu_target

from .jit import Store, compiler_lock, shielded

__all__ = ["call", "native"]

_store = Store("native", {})
_addresses: dict[str, int] = {}
_engines: list[llvm.ExecutionEngine] = []  # they own the code


def native(name: str, emit: Callable[[ir.Module, str], None]) -> int:
    """Return the address of the function `name`, which ``emit(module, name)`` writes; loaded or compiled on first use.

    `name` says all that the code depends on, other than the CPU and this package's version.
    """
    return _addresses.get(name) or shielded(_load_once, name, emit)


def _load_once(name: str, emit: Callable[[ir.Module, str], None]) -> int:
    with compiler_lock:
        return _addresses.get(name) or _addresses.setdefault(name, _load(name, emit))


def _load(name: str, emit: Callable[[ir.Module, str], None]) -> int:
    key = name, cpu_target.target_context.codegen().magic_tuple()
    code = _store.load(key)
    if code is None:
        code = _compile(name, emit)
        _store.save(key, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(name))


def _machine() -> llvm.TargetMachine:
    """Return a target machine as Numba makes it: the same CPU, features and code model."""
    codegen = cpu_target.target_context.codegen()
    options = {"opt": 3}
    codegen._customize_tm_options(options)
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(**options)


def _compile(name: str, emit: Callable[[ir.Module, str], None]) -> bytes:
    module = ir.Module(name)
    module.triple = llvm.get_process_triple()
    emit(module, name)
    machine = _machine()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return bytes(machine.emit_object(parsed))


def call(builder: ir.IRBuilder, address: ir.Value, kind: ir.FunctionType, arguments: list[ir.Value]) -> None:
    """Emit a call of a native function by its address."""
    builder.call(builder.inttoptr(address, kind.as_pointer()), arguments)
