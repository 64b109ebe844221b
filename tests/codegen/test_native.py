"""Native functions: written as LLVM IR, kept by their name, called by their address with named tuples."""

import threading
from typing import NamedTuple

import numpy as np
import pytest
from llvmlite import ir

from nhwconv import planning
from nhwconv.codegen import native
from nhwconv.codegen.native import Arguments, Pointer, declare, invoke
from nhwconv.codegen.simd import SCALARS, at, integers, numbers
from nhwconv.program import Program, Step, places
from nhwconv.runtime.jit import Body
from nhwconv.runtime.records import Record, record


class Place(NamedTuple):
    """Where, and how far."""

    at: Pointer
    step: int


class Taken(NamedTuple):
    """What the function takes: tuples of tuples."""

    source: Place
    twice: bool
    target: Place
    count: int


def emit(module, name):
    """``target.at[target.step] = source.at[source.step] * (twice ? 2 : 1) + count``."""
    function = declare(module, name, Taken, SCALARS["float64"])
    builder = ir.IRBuilder(function.append_basic_block())
    value = Arguments(function, Taken)
    number = builder.load(builder.gep(value["source.at"], [value["source.step"]]))
    factor = builder.select(value["twice"], ir.Constant(ir.DoubleType(), 2), ir.Constant(ir.DoubleType(), 1))
    count = builder.sitofp(value["count"], ir.DoubleType())
    result = builder.fadd(builder.fmul(number, factor), count)
    builder.store(result, builder.gep(value["target.at"], [value["target.step"]]))
    builder.ret_void()


class Call(Record):
    """A function, and numbers for it."""

    function: int
    twice: int
    count: int


def body(operands, geometry, worker, task, fresh):
    g = record(geometry, 0, Call)
    table = integers(operands)
    x, y = numbers(table[0], 8), numbers(table[1], 8)
    invoke(g.function, Taken(Place(at(x, 1), 2), g.twice != 0, Place(y, 1), g.count))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder, and nothing loaded."""
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native, "_addresses", {})
    return tmp_path


@pytest.mark.parametrize("twice", [0, 1])
def test_a_function_takes_named_tuples(place, twice):
    """The caller fills them in by name, and who emits it finds each number by a name of its own."""
    x, y = np.arange(10.0), np.zeros(3)
    g = Call(function=native.native("test_function", emit), twice=twice, count=-5)
    planning.execute(Program((Step(Body(body), (g,), 1, places("x", "y")),)), x=x, y=y)
    assert y.tolist() == [0, 3.0 * (1 + twice) - 5, 0]


def test_arguments_have_the_names_of_their_tuples():
    """In the order in which the function takes them; one may be given another value."""
    function = declare(ir.Module(), "some", Taken, SCALARS["float32"], ir.IntType(64))
    value = Arguments(function, Taken)
    names = ("source.at", "source.step", "twice", "target.at", "target.step", "count")
    assert [value[name] for name in names] == value.values() == list(function.args[:-1])
    assert str(value["source.at"].type) == "float*"
    assert [str(value[n].type) for n in ("twice", "count")] == ["i1", "i64"]
    value["count"] = 7
    assert value.values()[-1] == 7
    with pytest.raises(KeyError):
        value["source"]


def test_a_function_is_compiled_once_and_kept(place):
    """Nothing happens before its address is asked for; then it is one file, which is loaded afterwards."""
    emitted = []

    def counted(module, name):
        emitted.append(name)
        emit(module, name)

    function = native.native("test_kept", counted)
    assert not emitted
    assert int(function) == int(function) == int(native.native("test_kept", counted))
    assert emitted == ["test_kept"]
    (file,) = place.rglob("*.bin")
    assert file.name.startswith("native-")
    native._addresses.clear()  # as a new process
    assert int(native.native("test_kept", counted))
    assert emitted == ["test_kept"]


def test_functions_of_other_names_are_others(place):
    """The name says all that the code depends on."""
    one, two = (int(native.native(name, emit)) for name in ("test_one", "test_two"))
    assert one != two
    assert len(list(place.rglob("*.bin"))) == 2


def test_threads_that_ask_at_once_get_one_function(place):
    """One compiles, the others wait."""
    together, found, emitted = threading.Barrier(6), [], []

    def slowly(module, name):
        emitted.append(name)
        emit(module, name)

    def ask():
        together.wait(60)
        found.append(int(native.native("test_at_once", slowly)))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == len(emitted) == 1


def test_code_that_is_wrong_is_an_error(place):
    """LLVM's, as it is; nothing is kept."""

    def wrong(module, name):
        function = declare(module, name, Taken, SCALARS["float64"])
        ir.IRBuilder(function.append_basic_block())  # a block that does not end

    with pytest.raises(RuntimeError):
        int(native.native("test_wrong", wrong))
    assert not list(place.rglob("*.bin"))
