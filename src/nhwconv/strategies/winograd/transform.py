"""The transforms of Winograd convolution, vectorised over channels: native functions, one for each matrix and form.

A tile of ``m_h x m_w`` outputs is computed as ``A^T ((G w G^T) * (B^T x B)) A``. Each of the three products with a
constant matrix from both sides is a function that `transform` calls by its address.
"""

from __future__ import annotations

from functools import cache, reduce
from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from ...codegen.native import Arguments, Native, Pointer, declare, invoke, native
from ...codegen.simd import I64, SCALARS, Emitter, i64
from ...runtime.jit import device

__all__ = ["Added", "Tile", "Within", "nothing", "transform", "transforms"]

INPUT, OUTPUT = 0, 2  # the places of B^T and A^T among a form's matrices


class Tile(NamedTuple):
    """The elements of a tile: the first, and how far the next row's and the next column's are."""

    at: Pointer
    row: int
    column: int


class Within(NamedTuple):
    """The elements that exist: rows and columns from and up to. Of what is read, others are zero."""

    row_0: int
    row_1: int
    column_0: int
    column_1: int


class Added(NamedTuple):
    """What an output transform adds: whether it does, and where it is."""

    add: bool
    tile: Tile


class _Transformed(NamedTuple):
    """What an emitted transform takes."""

    source: Tile
    target: Tile
    within: Within
    channels: int
    added: Added


@device
def nothing(pointer):
    """Add nothing; the pointer is not used."""
    return Added(False, Tile(pointer, 0, 0))


@device
def transform(address, source, target, within, channels, added):
    """Transform a tile of some channels, side by side; `address` says which way.

    The transforms are ``B^T x B`` (input), ``G w G^T`` (weights) and ``A^T m A`` (output). All points of a tile exist;
    `within` says which elements of the other side do. Of LANES channels or more, the last vector overlaps the one
    before; where what is added is what is written, LANES divides their number.
    """
    invoke(address, _Transformed(source, target, within, channels, added))


@cache
def transforms(dtype: str, mh: int, rh: int, mw: int, rw: int) -> dict[str, Native]:
    """Return the three transforms of F(mh, rh) x F(mw, rw)."""
    names = ("input", "weights", "output")
    return {f"{name}_transform": _transform(dtype, which, (mh, rh), (mw, rw)) for which, name in enumerate(names)}


def _transform(dtype, which, high, wide):
    """Return one transform, of F(*high) x F(*wide)."""
    if which == INPUT:
        high, wide = _same_input(*high), _same_input(*wide)

    def emit(module, name):
        from .points import matrices  # in fractions, which only who compiles needs

        _Transform(module, name, dtype, matrices(*high)[which], matrices(*wide)[which], which == OUTPUT).emit()

    numbers = "_".join(map(str, (*high, *wide)))
    return native(f"nhwconv_transform_{dtype}_{('input', 'weights', 'output')[which]}_{numbers}", emit)


def _same_input(m, r):
    """Return one of all forms with as many points, which have the same B^T: passes and kernel sizes share its code."""
    return (1, m + r - 1) if r > 1 else (m, r)


class _Transform:
    """Emits the function that multiplies tiles by `high` from the left and by `wide` from the right."""

    def __init__(self, module, name, dtype, high, wide, adds):
        scalar = SCALARS[dtype]
        function = declare(module, name, _Transformed, scalar)
        self.high, self.wide, self.adds = high, wide, adds
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        self.value = Arguments(function, _Transformed)
        self.emitter = Emitter(self.builder, dtype)
        zeros = cgutils.alloca_once_value(self.builder, self.emitter.zero)
        self.zeros = self.builder.bitcast(zeros, scalar.as_pointer())
        waste = cgutils.alloca_once(self.builder, self.emitter.vector)
        self.waste = self.builder.bitcast(waste, scalar.as_pointer())

    def emit(self):
        """Whole tiles are the rule, and have a loop without selections of their own."""
        builder = self.builder
        side = (self.high, self.wide) if self.adds else (self.high[0], self.wide[0])
        rows = self._within("within.row_0", "within.row_1", len(side[0]))
        columns = self._within("within.column_0", "within.column_1", len(side[1]))
        source = self._chain("source", self.high[0], self.wide[0])
        target = self._chain("target", self.high, self.wide)
        added = self._added() if self.adds else None
        with builder.if_else(reduce(builder.and_, (*rows, *columns))) as (whole, partial):
            with whole:
                self._loop(source, target, added)
            with partial:
                masks = [self._mask(flag) for flag in rows], [self._mask(flag) for flag in columns]
                if self.adds:
                    self._loop(
                        source, self._selected(target, *masks, self.waste), self._selected(added, *masks, self.zeros)
                    )
                else:
                    self._loop(self._selected(source, *masks, self.zeros), target, None)
        builder.ret_void()

    def _within(self, low, limit, count):
        """Return, for each of `count` places, whether it is in the range of these arguments."""
        builder, low, limit = self.builder, self.value[low], self.value[limit]
        return [
            builder.and_(builder.icmp_signed(">=", i64(i), low), builder.icmp_signed("<", i64(i), limit))
            for i in range(count)
        ]

    def _mask(self, flag):
        """Return all ones for a flag that is set. Were this known, each use would be a branch, taken now and then."""
        return self.emitter.opaque(self.builder.sext(flag, I64))

    def _chain(self, tile, rows, columns):
        """Return a function of a channel that gives the addresses of a tile's elements, one step after another."""
        base, row, column = (self.value[f"{tile}.{part}"] for part in ("at", "row", "column"))

        def addresses(channel):
            builder, start, table = self.builder, self.builder.gep(base, [channel]), []
            for _ in rows:
                table.append([start])
                for _ in columns[1:]:
                    table[-1].append(builder.gep(table[-1][-1], [column]))
                start = builder.gep(start, [row])
            return table

        return addresses

    def _added(self):
        """Return the same of what is added; where nothing is, it is zero for every element and channel."""
        builder, value, add = self.builder, self.value, self.value["added.add"]
        for part, otherwise in (("at", self.zeros), ("row", i64(0)), ("column", i64(0))):
            value[f"added.tile.{part}"] = builder.select(add, value[f"added.tile.{part}"], otherwise)
        places = self._chain("added.tile", self.high, self.wide)
        return lambda channel: places(builder.select(add, channel, i64(0)))

    def _selected(self, places, rows, columns, otherwise):
        """Return the same, with another address for elements that do not exist, as these masks tell."""
        builder = self.builder
        other = builder.ptrtoint(otherwise, I64)

        def selected(address, mask):
            distance = builder.and_(builder.sub(builder.ptrtoint(address, I64), other), mask)
            return builder.inttoptr(builder.add(other, distance), address.type)

        def addresses(channel):
            return [
                [selected(a, builder.and_(row, column)) for a, column in zip(line, columns, strict=True)]
                for line, row in zip(places(channel), rows, strict=True)
            ]

        return addresses

    def _loop(self, source, target, added):
        """Transform vector after vector of channels."""
        builder, emit, count = self.builder, self.emitter, self.value["channels"]
        vectors = builder.sdiv(builder.add(count, i64(emit.lanes - 1)), i64(emit.lanes))
        last = builder.sub(count, i64(emit.lanes))
        with cgutils.for_range(builder, vectors) as loop:
            channel = builder.mul(loop.index, i64(emit.lanes))
            channel = builder.select(builder.icmp_signed("<", channel, last), channel, last)
            tile = [[emit.load(a) for a in line] for line in source(channel)]
            half = [_apply(emit, self.high, list(column)) for column in zip(*tile, strict=True)]
            places, summands = target(channel), added(channel) if self.adds else []
            for i, line in enumerate(places):
                results = _apply(emit, self.wide, [column[i] for column in half])
                if self.adds:
                    results = [builder.fadd(r, emit.load(e)) for r, e in zip(results, summands[i], strict=True)]
                for result, address in zip(results, line, strict=True):
                    emit.store(result, address)


def _apply(emit, matrix, vectors):
    """Multiply a small constant matrix by a column of vectors; rows of opposite points share their halves."""
    results = [None] * len(matrix)
    for i, row in enumerate(matrix):
        if results[i] is not None:
            continue
        twin = next((k for k in range(i + 1, len(matrix)) if _are_twins(row, matrix[k])), None)
        if twin is None:
            results[i] = _combine(emit, row, vectors)
            continue
        same = [c if c == d else 0 for c, d in zip(row, matrix[twin], strict=True)]
        opposite = [c if c != d else 0 for c, d in zip(row, matrix[twin], strict=True)]
        even, odd = _combine(emit, same, vectors), _combine(emit, opposite, vectors)
        results[i], results[twin] = emit.builder.fadd(even, odd), emit.builder.fsub(even, odd)
    return results


def _are_twins(row, other):
    """Whether two rows agree up to signs, and differ in some and agree in others."""
    pairs = [(c, d) for c, d in zip(row, other, strict=True) if c or d]
    signs = {c == d for c, d in pairs}
    return all(abs(c) == abs(d) for c, d in pairs) and signs == {True, False}


def _combine(emit, coefficients, vectors):
    """Sum of coefficients times vectors; a term with coefficient one comes first, and costs nothing."""
    terms = sorted(((c, v) for c, v in zip(coefficients, vectors, strict=True) if c), key=lambda t: t[0] != 1)
    if not terms:
        return emit.zero
    (first, vector), *rest = terms
    builder = emit.builder
    total = vector if first == 1 else builder.fmul(emit.constant(first), vector)
    for coefficient, vector in rest:
        if coefficient == 1:
            total = builder.fadd(total, vector)
        elif coefficient == -1:
            total = builder.fsub(total, vector)
        else:
            total = emit.multiply_add(emit.constant(coefficient), vector, total)
    return total
