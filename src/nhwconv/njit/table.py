"""What was answered before: entries in plain memory, which compiled code finds and runs without Python.

Any number of threads may look while Python inserts: an entry is complete before its slot names it, and a table that
has become too small, or was forgotten, stays in memory for whoever is looking.
"""

from __future__ import annotations

import ctypes
import os
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.ufunc import parallel

from ..codegen.simd import integers
from ..program import ARRAYS
from ..runtime import arrays, executor, machine
from ..runtime.jit import Body, compiler_lock, device
from . import layout
from .layout import (
    ANSWER,
    AXES,
    AXES_SHIFT,
    BLOCK,
    BLOCKS,
    CODE,
    DATA,
    ENTRY,
    FIND,
    FLAGS,
    HASH,
    ITEMSIZE_SHIFT,
    KEY,
    NBYTES,
    OPERANDS,
    OUT,
    RESULTS,
    RUN,
    SCRATCH,
    SHAPE,
    STRIDES,
)

__all__ = ["clear", "find", "insert", "known", "state"]

_ROLES = len(layout.ARRAYS)
_FIRST_RESULT, _DY = layout.ARRAYS.index("y"), layout.ARRAYS.index("dy")
_INPUTS = (0, 1, 2, _DY)
_HEADER = executor.HEADER
_LONG = 8 * ctypes.sizeof(ctypes.c_ulong)

# Behind what users' code knows of an entry and of the state.
_PROGRAM, _WORKERS, _THREADS, _HASH, _KEY = range(ENTRY, ENTRY + 5)
_WORDS = _KEY + KEY + _ROLES * (1 + AXES)
(_TABLE, _IN_SERIES, _IN_PARALLEL, _ORPHANED, _CLAIMED, _THREAD_STATE, _IN_OPENMP, _GET_THREADS) = range(
    RUN + 1, RUN + 9
)
_STATE = RUN + 9

# ------------------------------------------------------------------------------------------- native code


@intrinsic
def call_number(typingctx: Any, address: Any) -> tuple[Any, Any]:
    """Call ``int f(void)`` by its address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.zext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), []), ir.IntType(64))

    return types.int64(types.intp), codegen


@intrinsic
def call_pointer(typingctx: Any, address: Any) -> tuple[Any, Any]:
    """Call ``void *f(void)`` by its address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(context.get_value_type(types.intp), [])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [])

    return types.intp(types.intp), codegen


@intrinsic
def call_executor(typingctx: Any, form: Any, program: Any, scratch: Any, operands: Any) -> tuple[Any, Any]:
    """Call a form of the executor by its address; operands lie at one."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> None:
        number = context.get_value_type(types.intp)
        kind = ir.FunctionType(ir.VoidType(), [number] * (3 + len(ARRAYS)))
        first = builder.inttoptr(args[3], number.as_pointer())
        operands = [builder.load(builder.gep(first, [number(i)])) for i in range(len(ARRAYS))]
        header = number(executor.ADDRESSES)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1], args[2], header, *operands])

    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


@intrinsic
def publish(typingctx: Any, address: Any, value: Any) -> tuple[Any, Any]:
    """Store a word atomically; who reads it sees all that was stored before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> None:
        place = builder.inttoptr(args[0], args[1].type.as_pointer())
        builder.store_atomic(args[1], place, "release", 8)

    return types.void(types.intp, types.intp), codegen


@device
def _mixed(h, word):
    """Return a hash with one more word in it."""
    h = (h ^ word) * 0x2545F4914F6CDD1D
    return h ^ ((h >> 29) & 0x7FFFFFFFF)


@device
def _hash(words):
    """Return the hash of a question's key."""
    h = 1
    for i in range(KEY):
        h = _mixed(h, words[i])
    for role in range(_ROLES):
        block = BLOCKS + role * BLOCK
        h = _mixed(h, words[block + CODE])
        if words[block + CODE]:
            for axis in range(AXES):
                h = _mixed(h, words[block + SHAPE + axis])
    return h


@device
def _same(words, entry):
    """Whether an entry answers a question."""
    for i in range(KEY):
        if entry[_KEY + i] != words[i]:
            return False
    at = _KEY + KEY
    for role in range(_ROLES):
        block = BLOCKS + role * BLOCK
        for i in range(1 + AXES if words[block + CODE] else 1):
            if entry[at + i] != words[block + i]:
                return False
        at += 1 + AXES
    return True


@device
def _extent(words, block):
    """Return where an array's memory begins, and where it ends."""
    first = last = words[block + DATA]
    itemsize = (words[block + CODE] >> ITEMSIZE_SHIFT) & 0xFF
    for axis in range((words[block + CODE] >> AXES_SHIFT) & 0xF):
        size, stride = words[block + SHAPE + axis], words[block + STRIDES + axis]
        if size == 0:
            return first, first
        if stride < 0:
            first += (size - 1) * stride
        else:
            last += (size - 1) * stride
    return first, last + itemsize


@device
def _contiguous(words, block):
    """Whether an array is C-contiguous."""
    step = (words[block + CODE] >> ITEMSIZE_SHIFT) & 0xFF
    axes = (words[block + CODE] >> AXES_SHIFT) & 0xF
    for i in range(axes):
        axis = axes - 1 - i
        if words[block + SHAPE + axis] != 1 and words[block + STRIDES + axis] != step:
            return False
        step *= words[block + SHAPE + axis]
    return True


@device
def _apart(words):
    """Whether results that the caller gives are C-contiguous, and apart from all else."""
    for role in range(_FIRST_RESULT, _ROLES):
        block = BLOCKS + role * BLOCK
        if role == _DY or words[block + CODE] == 0:
            continue
        if not _contiguous(words, block):
            return False
        first, last = _extent(words, block)
        for other in range(_ROLES):
            if other != role and words[BLOCKS + other * BLOCK + CODE]:
                other_first, other_last = _extent(words, BLOCKS + other * BLOCK)
                if first < other_last and other_first < last:
                    return False
    return True


@device
def _fits_threads(known, found):
    """Whether a program was made for as many threads as there are now, or for any."""
    return found[_THREADS] == 0 or found[_THREADS] == call_number(known[_GET_THREADS])


def find(question, state, entry, _, __):
    """Leave in a question's answer the entry for it, or 0; and its hash."""
    words, known = integers(question), integers(state)
    words[ANSWER] = 0
    words[HASH] = h = _hash(words)
    if words[FLAGS] & OUT and not _apart(words):
        return
    table = integers(known[_TABLE])
    place = h & table[0]
    while table[1 + place]:
        found = integers(table[1 + place])
        if found[_HASH] == h and _same(words, found) and _fits_threads(known, found):
            words[ANSWER] = table[1 + place]
            return
        place = (place + 1) & table[0]


@device
def _may_launch(known, found):
    """Whether a program runs in parallel here: not in a worker of somebody's `prange`, nor in an orphaned child.

    Workers are threads that Python does not know, or inside a region of OpenMP.
    """
    if found[_WORKERS] <= 1 or known[_ORPHANED] or call_pointer(known[_THREAD_STATE]) == 0:
        return False
    return known[_IN_OPENMP] == 0 or call_number(known[_IN_OPENMP]) == 0


def run(question, state, entry, _, __):
    """Run an entry's program on a question's operands; the answer is 1 where Python has to."""
    words, known, found = integers(question), integers(state), integers(entry)
    launches = _may_launch(known, found)
    words[ANSWER] = 1 if found[_PROGRAM] == 0 or (launches and known[_CLAIMED]) else 0
    if words[ANSWER] == 0:
        form = known[_IN_PARALLEL] if launches else known[_IN_SERIES]
        # Where the executor expects an array, the address of its data is all that it reads.
        scratch = question + 8 * SCRATCH - _HEADER if found[NBYTES] else 0
        call_executor(form, found[_PROGRAM], scratch, question + 8 * OPERANDS)


def put(address, value, _, __, ___):
    """Store a word for whoever looks."""
    publish(address, value)


_find, _run, _put = Body(find), Body(run), Body(put)

# ----------------------------------------------------------------------------------------- Python's side

_SIGNATURE = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 5)
_Words = npt.NDArray[np.int64]


def _address(words: _Words) -> int:
    return arrays.address(words)


def _symbol(library: Any, name: str) -> int:
    """Return the address of a library's function, 0 where it has none."""
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


class _Table:
    """The entries, and all tables that there ever were."""

    def __init__(self) -> None:
        self.state = np.zeros(_STATE, np.int64)
        self.entries: dict[tuple[bytes, int], int] = {}
        self.answers: dict[int, Any] = {}  #: by an entry's address, what performs it
        self.kept: list[_Words] = []
        self._new(64)

    def _new(self, slots: int) -> None:
        """Begin a larger table, with what is known."""
        table = np.zeros(1 + slots, np.int64)
        table[0] = slots - 1
        self.kept.append(table)
        for address in self.entries.values():
            self._place(table, address)
        self.slots = table
        self._store(self.state, _TABLE, _address(table))

    def _place(self, table: _Words, address: int) -> None:
        mask = int(table[0])
        entry = (ctypes.c_int64 * _WORDS).from_address(address)
        place = entry[_HASH] & mask
        while table[1 + place]:
            place = (place + 1) & mask
        self._store(table, 1 + place, address)

    def _store(self, words: _Words, place: int, value: int) -> None:
        if self.state[FIND]:
            _SIGNATURE(_put.address)(_address(words) + 8 * place, value, 0, 0, 0)
        else:  # nobody looks yet
            words[place] = value

    def start(self) -> int:
        """Return the state's address, with everything in it that finding and running take."""
        with compiler_lock:
            if not self.state[FIND]:
                _put.address  # noqa: B018 - compiled before anybody looks
                self.state[_IN_SERIES] = executor.in_series.address
                self.state[_THREAD_STATE] = _symbol(ctypes.pythonapi, "PyGILState_GetThisThreadState")
                self.state[_ORPHANED] = executor.launcher.orphaned
                self.state[RUN], self.state[FIND] = _run.address, _find.address
        return _address(self.state)

    def key(self, question: Any) -> bytes:
        """Return what tells a question from others."""
        words = np.frombuffer(question, np.int64)
        blocks = words[BLOCKS:].reshape(_ROLES, BLOCK)[:, : 1 + AXES].copy()
        blocks[blocks[:, CODE] == 0] = 0
        return words[:KEY].tobytes() + blocks.tobytes()

    def threads(self) -> int:
        """Return how many threads there are, 0 where nobody asked for them yet."""
        if not parallel._is_initialized:
            return 0
        if not self.state[_GET_THREADS]:
            layer = executor.start()
            if layer == "omp":
                omppool = import_module("numba.np.ufunc.omppool")

                self.state[_IN_OPENMP] = _symbol(ctypes.CDLL(omppool.__file__), "omp_in_parallel")
            self.state[_CLAIMED] = layer == "workqueue"
            self.state[_GET_THREADS] = binding.address_of_symbol("get_num_threads")
        return machine.threads()

    def insert(self, question: Any, program: Any, shapes: list[tuple[int, ...]], answer: Any) -> int:
        """Remember an answer, and return its entry: a program, or None where Python performs it; results' shapes."""
        with compiler_lock:
            threads = self.threads()
            key = self.key(question)
            found = self.entries.get((key, threads))
            if found is not None:
                return found
            entry = np.zeros(_WORDS, np.int64)
            for i, shape in enumerate(shapes):
                entry[RESULTS + AXES * i : RESULTS + AXES * i + len(shape)] = shape
            if program is not None:
                entry[NBYTES] = program.nbytes if program.nbytes > executor.STACK else 0
                entry[_PROGRAM], entry[_WORKERS] = program.address, program.workers
                if program.workers > 1 and not self.state[_IN_PARALLEL]:
                    self.state[_IN_PARALLEL] = executor.in_parallel.address
            entry[_THREADS], entry[_HASH] = threads, question[HASH]
            entry[_KEY:] = np.frombuffer(key, np.int64)
            address = _address(entry)
            self.kept.append(entry)
            self.answers[address] = answer
            self.entries[key, threads] = address
            if 2 * len(self.entries) > len(self.slots):
                self._new(2 * (len(self.slots) - 1))
            else:
                self._place(self.slots, address)
            return address

    def clear(self) -> None:
        """Ask Python anew from now on."""
        with compiler_lock:
            self.entries = {}
            self._new(64)

    def after_fork(self) -> None:
        """In a child."""
        self.state[_ORPHANED] = executor.launcher.orphaned


_table = _Table()
clear, insert, state = _table.clear, _table.insert, _table.start
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_table.after_fork)


def known(entry: int) -> Any:
    """Return the answer that an entry stands for."""
    return _table.answers[entry]
