"""Object files in memory: their functions run, apart from those of other files with the same names."""

import ctypes

import llvmlite.binding as llvm
from llvmlite import ir

from nhwconv.runtime import machine, objects


def code(number):
    """Return an object file whose function `answer` returns a number."""
    module = ir.Module()
    module.triple = llvm.get_process_triple()
    function = ir.Function(module, ir.FunctionType(ir.IntType(64), []), "answer")
    ir.IRBuilder(function.append_basic_block()).ret(ir.Constant(ir.IntType(64), number))
    return objects.target_machine().emit_object(llvm.parse_assembly(str(module)))


def test_functions_of_one_name_stay_apart():
    """Each file's function is its own, whoever still holds what `load` returned."""
    addresses = [objects.load(code(number)).get_function_address("answer") for number in (3, 4)]
    assert [ctypes.CFUNCTYPE(ctypes.c_int64)(address)() for address in addresses] == [3, 4]


def test_the_target_is_numbas():
    assert objects.target_machine().triple == machine.target()[0]
