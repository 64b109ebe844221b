"""Object code in memory: linked by LLVM alone, without the types and registries that Numba loads for its own cache."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from numba.core.registry import cpu_target

__all__ = ["load", "target_machine"]


def target_machine() -> llvm.TargetMachine:
    """Return a target machine as Numba makes it: the same CPU, features and code model."""
    codegen = cpu_target.target_context.codegen()
    options: dict[str, Any] = {"opt": 3}
    codegen._customize_tm_options(options)
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(**options)


#: They own the code, which stays where it is for as long as the process: addresses of it are anywhere.
_engines: list[llvm.ExecutionEngine] = []


def load(code: bytes) -> llvm.ExecutionEngine:
    """Load an object file; return what knows the addresses of its functions.

    Each has an engine of its own: functions of one factory may have one name.
    """
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine
