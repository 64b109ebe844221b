"""The micro-kernel: a column of batch-reduce tile products, the only arithmetic of every dense pass.

    C[m, j] = sum over o < outer, i < inner, k < steps of
              A[o*a.outer + i*a.inner + m*a.row + k*a.step] * B[o*b.outer + i*b.inner + k*b.step + j]
              (+ E[m*e.row + j])                                                for m < rows, j < columns

It is the 'brgemm' of Georganas et al. (arXiv 1906.06440) with strides on both sides. Its contract:

- ``rows >= 1`` and ``1 <= columns <= NR * LANES`` are run-time numbers. Rows are cut into the fewest tiles of at most
  MR rows, of equal size up to one row: that wastes less than full tiles and a rest.
- It reads exactly the elements of A and E that the sum names, and writes exactly those of C.
- Of B it reads exactly the columns named where B is "exact"; where B is "padded" it reads whole vectors.
- A tile stays in registers for the whole sum. E is added at the end, so a sum that continues from block to block
  is a blocked sum, with a blocked sum's smaller error. One row for all, a bias whose ``e.row`` is zero, is what sums
  start from: that costs nothing. Where `add` is false E is not read.
- A sum with none of outer, inner or steps is empty.
- Every step asks for one cache line to be brought to L2, for whoever comes next: step i of tile t for that of
  ``ahead.at[t*ahead.tile + i*ahead.step]``. The lines may lie anywhere, also outside of arrays. Where ``ahead.step`` is
  zero nothing is asked for.
- Where `stream` is not zero and C allows it (whole vectors at multiples of their size), C is stored past the caches:
  worth it for results too large to be found there by whoever reads them next.

MR broadcast rows times NR vectors is the register tile; the code for fewer rows and vectors is emitted beside it and
chosen once for all tiles of a size. Passes differ in which stride is one: `panel_tile` has the steps of A side by side
and B packed in panels (forward, input_grad, Winograd), `column_tile` has the rows of A side by side and B as it is
(weight_grad).
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from ..runtime import machine
from ..runtime.jit import device
from .native import Arguments, Native, Pointer, declare, invoke, native
from .simd import I64, SCALARS, Emitter, i64

__all__ = [
    "Operand",
    "Prefetch",
    "Rows",
    "Sum",
    "column_tile",
    "cycles",
    "narrow_tiles",
    "no_prefetch",
    "panel_tile",
    "register_tile",
    "tile_product",
    "tile_shape",
]


def register_tile(itemsize: int) -> tuple[int, int]:
    """Return (MR, NR) for numbers of this size: as many accumulators as the registers hold."""
    if machine.vector_bytes() == 64:
        return 14, 2  # 28 accumulators, two vectors of B, one broadcast
    if machine.registers() == 32:
        return 8, 3
    return (6, 2) if machine.has_fma() else (4, 2)


@cache
def tile_shape(itemsize: int) -> tuple[int, int, int]:
    """Return (MR, NR, LANES) for numbers of this size."""
    return *register_tile(itemsize), machine.lanes(itemsize)


def narrow_tiles(itemsize: int) -> tuple[tuple[int, int], ...]:
    """Return the (MR, NR) to choose from where columns are pixels and rows are few."""
    if machine.registers() == 32:
        return (4, 6), register_tile(itemsize)
    return (2, 4), register_tile(itemsize)


# ------------------------------------------------------------------------------------------------- price

#: The part of the peak at which the micro-kernel runs in a pass.
EFFICIENCY = 0.9
#: Cycles of a register tile beside its sum: the call, the first and the last of it.
TILE_CYCLES = 80


def cycles(rows: int, columns: int, depth: int, shape: tuple[int, int, int]) -> float:
    """Return the predicted cycles of a ``rows x depth`` by ``depth x columns`` product in tiles of (MR, NR, LANES)."""
    mr, nr, lanes = shape
    tiles = math.ceil(rows / mr)

    def tile(vectors: int) -> float:
        # Two multiply-adds a cycle, and none before the one before in the same register: four cycles.
        return depth * max(rows / tiles * vectors / 2, 4) / EFFICIENCY + TILE_CYCLES

    full, rest = divmod(columns, nr * lanes)
    return tiles * (full * tile(nr) + (tile(math.ceil(rest / lanes)) if rest else 0))


# -------------------------------------------------------------------------------------------------- call


class Sum(NamedTuple):
    """How many products are summed: ``outer * inner * steps``."""

    outer: int
    inner: int
    steps: int


class Operand(NamedTuple):
    """A or B: its first element, and how many elements further it goes on in each direction."""

    at: Pointer
    outer: int
    inner: int
    row: int  # B has none
    step: int


class Rows(NamedTuple):
    """E or C: its first element, and from one row to the next."""

    at: Pointer
    row: int


class Prefetch(NamedTuple):
    """What is asked for meanwhile: the first line, and how far it is from tile to tile and from step to step."""

    at: Pointer
    tile: int
    step: int


class _Product(NamedTuple):
    """What the emitted function takes."""

    rows: int
    columns: int
    sum: Sum
    a: Operand
    b: Operand
    add: bool
    e: Rows
    c: Rows
    stream: int
    ahead: Prefetch


#: The operands that move from tile to tile, each by so many rows of its own.
_MOVING = {"a.at": "a.row", "e.at": "e.row", "c.at": "c.row"}


@device
def no_prefetch(pointer):
    """Ask for nothing; the pointer is not used."""
    return Prefetch(pointer, 0, 0)


@device
def tile_product(tile, rows, columns, sums, a, b, add, e, c, stream, ahead):
    """Compute a column of tiles, as this module's first lines say; `tile` is an address."""
    invoke(tile, _Product(rows, columns, sums, a, b, add, e, c, stream, ahead))


@cache
def panel_tile(dtype: str, mr: int, nr: int) -> Native:
    """Return the tile whose A has a step of one, and whose B is padded."""
    return _tile(dtype, mr, nr, False, {"a.step": 1})


@cache
def column_tile(dtype: str, mr: int, nr: int) -> Native:
    """Return the tile whose A has rows one apart, and whose B is exact."""
    return _tile(dtype, mr, nr, True, {"a.row": 1, "stream": 0})


# -------------------------------------------------------------------------------------------------- code


def _tile(dtype, mr, nr, exact, constants):
    """Return one register tile; what is constant in every call is constant in its code."""
    baked = "_".join(f"{n}{v}" for n, v in constants.items())

    def emit(module, name):
        _emit_split(module, name, dtype, mr, _emit_tiles(module, f"{name}_tiles", dtype, mr, nr, exact, constants))

    return native(f"nhwconv_tile_{dtype}_{mr}x{nr}_{'exact' if exact else 'padded'}_{baked}", emit)


def _emit_split(module, name, dtype, mr, tiles):
    """Emit the cut into tiles of equal size: as many as needed have a row more than the others."""
    function = declare(module, name, _Product, SCALARS[dtype])
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    value = Arguments(function, _Product)
    rows = value["rows"]
    count = builder.udiv(builder.add(rows, i64(mr - 1)), i64(mr))
    fewer = builder.udiv(rows, count)
    larger = builder.sub(rows, builder.mul(fewer, count))
    with builder.if_then(builder.icmp_signed("!=", larger, i64(0))):
        value["rows"] = builder.add(fewer, i64(1))
        builder.call(tiles, [*value.values(), larger])
    done = builder.mul(larger, builder.add(fewer, i64(1)))
    for operand, stride in _MOVING.items():
        value[operand] = builder.gep(value[operand], [builder.mul(done, value[stride])])
    value["ahead.at"] = builder.gep(value["ahead.at"], [builder.mul(larger, value["ahead.tile"])])
    value["rows"] = fewer
    builder.call(tiles, [*value.values(), builder.sub(count, larger)])
    builder.ret_void()


def _emit_tiles(module, name, dtype, mr, nr, exact, constants):
    """Emit the function that computes `count` tiles of `rows` rows each, one below the other."""
    function = declare(module, name, _Product, SCALARS[dtype], I64)
    function.linkage = "internal"
    function.attributes.add("noinline")  # inlined, it would have each of its cases twice
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    value = Arguments(function, _Product)
    for argument, constant in constants.items():
        value[argument] = i64(constant)
    emitter = Emitter(builder, dtype)
    done = function.append_basic_block("done")
    vectors = builder.sdiv(builder.add(value["columns"], i64(emitter.lanes - 1)), i64(emitter.lanes))
    case = builder.add(builder.mul(builder.sub(vectors, i64(1)), i64(mr)), value["rows"])
    switch = builder.switch(case, done)
    for v in range(1, nr + 1):
        for m in range(1, mr + 1):
            block = function.append_basic_block(f"tile_{m}x{v}")
            switch.add_case(i64((v - 1) * mr + m), block)
            builder.position_at_end(block)
            _Tile(emitter, value, m, v, exact).emit(function.args[-1])
            builder.branch(done)
    builder.position_at_end(done)
    builder.ret_void()
    return function


class _Tile:
    """Emits the code of tiles of exactly `m` rows and `v` vectors, of which the last may be partial."""

    def __init__(self, emit, value, m, v, exact):
        self.emitter, self.builder, self.value = emit, emit.builder, value
        self.m, self.v, self.exact = m, v, exact

    def emit(self, count):
        """Compute `count` tiles, one below the other."""
        builder, value = self.builder, self.value
        moves = {n: builder.mul(i64(self.m), value[stride]) for n, stride in _MOVING.items()}
        moves["ahead.at"] = value["ahead.tile"]
        moving = {n: cgutils.alloca_once_value(builder, value[n]) for n in moves}
        with cgutils.for_range(builder, count):
            here = {n: builder.load(p) for n, p in moving.items()}
            self.a, self.e, self.c, self.ahead_0 = (here[n] for n in ("a.at", "e.at", "c.at", "ahead.at"))
            self._emit_one()
            for n, p in moving.items():
                builder.store(builder.gep(here[n], [moves[n]]), p)

    def _emit_one(self):
        """Sum in registers, then add E where asked and store."""
        builder, emit, value = self.builder, self.emitter, self.value
        tail = builder.sub(value["columns"], i64((self.v - 1) * emit.lanes))
        self.mask = emit.first_lanes(tail)
        self.whole = builder.icmp_signed(">=", tail, i64(emit.lanes))
        self.sums = [[cgutils.alloca_once(builder, emit.vector) for _ in range(self.v)] for _ in range(self.m)]
        one_row = builder.icmp_signed("==", value["e.row"], i64(0))
        self._start(builder.and_(value["add"], one_row))
        # Who asks for nothing asks for a line of the stack, which is always there.
        nothing = builder.icmp_signed("==", value["ahead.step"], i64(0))
        here = cgutils.alloca_once(builder, emit.scalar)
        self.ahead = cgutils.alloca_once_value(builder, builder.select(nothing, here, self.ahead_0))
        with (
            cgutils.for_range(builder, value["sum.outer"]) as outer,
            cgutils.for_range(builder, value["sum.inner"]) as inner,
        ):
            self._product(self._at("a", self.a, outer, inner), self._at("b", value["b.at"], outer, inner))
        self._split(lambda masked: self._finish(builder.and_(value["add"], builder.not_(one_row)), masked))

    def _split(self, emit):
        """Emit the code where the last vector is whole, without masks, and that where it is not, with them.

        Before AVX-512 a load with a mask is slow, or many instructions, and a store takes as long as twelve others.
        """
        if machine.vector_bytes() == 64:
            emit(True)
            return
        with self.builder.if_else(self.whole) as (then, otherwise):
            with then:
                emit(False)
            with otherwise:
                emit(True)

    def _finish(self, add, masked):
        """Add E where asked, and store the sums."""
        builder, value = self.builder, self.value
        mask = self.mask if masked else None
        with builder.if_then(add):
            self._each(self.e, value["e.row"], self._add_from, mask)
        if isinstance(value["stream"], ir.Constant):  # never
            self._each(self.c, value["c.row"], self._store_to, mask)
            return
        with builder.if_else(self._may_stream()) as (then, otherwise):
            with then:
                self._each(self.c, value["c.row"], self._stream_to, mask)
            with otherwise:
                self._each(self.c, value["c.row"], self._store_to, mask)

    def _start(self, from_e):
        """Start all rows' sums from E where it is one row for all, from zero otherwise."""
        builder, emit = self.builder, self.emitter
        flags = emit.splat(from_e)
        for j in range(self.v):
            mask = builder.and_(flags, self.mask) if j == self.v - 1 else flags
            first = emit.load(builder.gep(self.e, [i64(j * emit.lanes)]), mask)
            for row in self.sums:
                builder.store(first, row[j])

    def _may_stream(self):
        """Whether C is to be stored past the caches, and can be: whole vectors at multiples of their size."""
        builder, emit, value = self.builder, self.emitter, self.value
        size = emit.lanes * emit.itemsize
        start = builder.ptrtoint(self.c, I64)
        pitch = builder.mul(value["c.row"], i64(emit.itemsize))
        askew = builder.and_(builder.or_(start, pitch), i64(size - 1))
        aligned = builder.icmp_signed("==", askew, i64(0))
        asked = builder.icmp_signed("!=", value["stream"], i64(0))
        return builder.and_(asked, builder.and_(aligned, self.whole))

    def _at(self, operand, start, outer, inner):
        builder, value = self.builder, self.value
        rows = builder.mul(outer.index, value[f"{operand}.outer"])
        return builder.gep(start, [builder.add(rows, builder.mul(inner.index, value[f"{operand}.inner"]))])

    def _product(self, a, b):
        """Add the products of one run of k, from these addresses on."""
        if self.exact:
            self._split(lambda masked: self._run(a, b, self.mask if masked else None))
        else:
            self._run(a, b, None)

    def _run(self, a, b, mask):
        """Add these products; the last vector of B is loaded with a mask."""
        builder, emit, value = self.builder, self.emitter, self.value
        # x86 addresses base + {0, 1, 2} * stride: one moving pointer for every three rows keeps all in registers.
        bases = [cgutils.alloca_once_value(builder, self._row(a, m)) for m in range(0, self.m, 3)]
        moving = cgutils.alloca_once_value(builder, b)
        with cgutils.for_range(builder, value["sum.steps"]):
            ahead = builder.load(self.ahead)
            emit.prefetch(ahead)
            builder.store(builder.gep(ahead, [value["ahead.step"]]), self.ahead)
            b = builder.load(moving)
            columns = [emit.load(builder.gep(b, [i64(j * emit.lanes)])) for j in range(self.v - 1)]
            columns.append(emit.load(builder.gep(b, [i64((self.v - 1) * emit.lanes)]), mask))
            for g, base in enumerate(bases):
                # Opaque: the optimiser would derive all rows from one, or keep a pointer for each, in memory.
                address = emit.opaque(builder.load(base))
                for m in range(3 * g, min(3 * g + 3, self.m)):
                    broadcast = emit.broadcast(self._row(address, m - 3 * g))
                    for j in range(self.v):
                        s = self.sums[m][j]
                        builder.store(emit.multiply_add(broadcast, columns[j], builder.load(s)), s)
                builder.store(builder.gep(address, [value["a.step"]]), base)
            builder.store(builder.gep(b, [value["b.step"]]), moving)

    def _row(self, a, m):
        return self.builder.gep(a, [self.builder.mul(i64(m), self.value["a.row"])])

    def _each(self, base, stride, action, mask):
        """Do something to each vector of the tile: (its sum, its address, the mask of the last)."""
        builder = self.builder
        for m in range(self.m):
            row = builder.gep(base, [builder.mul(i64(m), stride)])
            for j in range(self.v):
                address = builder.gep(row, [i64(j * self.emitter.lanes)])
                action(self.sums[m][j], address, mask if j == self.v - 1 else None)

    def _add_from(self, s, address, mask):
        builder = self.builder
        builder.store(builder.fadd(builder.load(s), self.emitter.load(address, mask)), s)

    def _stream_to(self, s, address, mask):
        self.emitter.stream(self.builder.load(s), address)

    def _store_to(self, s, address, mask):
        self.emitter.store(self.builder.load(s), address, mask)
