"""Emits functions that work on rows of pixels for one vector of channels: tiles of pixels that lie side by side.

A tile's columns are known when it is emitted where stride and dilation are ("literal"); otherwise each tap loads its
own. Rows of taps outside of x are skipped by the caller. Columns outside are told apart tile by tile: the tiles of a
row whose columns are all inside load without asking, the others load such columns from a vector of zeros. Both load
whole vectors; a row where these would reach past the end of an array is worked on pixel by pixel, with masks.

A row of taps is some chunks of Q1 taps and some of Q2, which covers kernels of any size and the two lengths that the
phases of a stride have. What lanes read of a pixel of x is a `Pattern`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from llvmlite import ir
from numba.core import cgutils

from ...codegen.native import Arguments, declare
from ...codegen.simd import I64, SCALARS, Emitter, i64
from ...runtime import machine
from .lanes import Pattern

__all__ = ["Care", "Literal", "RowEmitter", "columns", "literal_of", "sum_rows", "sum_tiles", "tiles"]

#: Kernel sizes whose rows of taps are unrolled whole, or in the two phases of stride 2; others are chunks of 2 and 1.
UNROLLED = (3, 5, 7)


class Care(IntEnum):
    """What a tile has to look at before it loads."""

    NOTHING = 0
    COLUMNS = 1  #: whether a column is inside
    ELEMENTS = 2  #: and which elements of a vector exist; before AVX-512, masks take many cycles


class Literal(NamedTuple):
    """What a function is emitted for; stride of 0 means that stride and dilation vary."""

    q1: int
    q2: int
    stride: int
    dilation: int
    pattern: Pattern

    @property
    def name(self) -> str:
        """What the names of functions end in."""
        return "_".join(str(int(number)) for number in (*self[:-1], *self.pattern))

    @property
    def loads_much(self) -> bool:
        """Whether a tile loads more than one column for two products."""
        pixels = tiles()[0]
        return 2 * len(columns(self, pixels, self.q1)) > pixels * self.q1

    def split(self, length: int) -> tuple[int, int]:
        """Return how many chunks of Q1 and of Q2 make a row of this length."""
        first, rest = divmod(length, self.q1)
        return first, rest // self.q2 if self.q2 else 0


def _chunks(lengths: set[int]) -> tuple[int, int]:
    """Return (Q1, Q2): rows of each of these lengths are some chunks of Q1 taps and some of Q2."""
    longest, shortest = max(lengths), min(lengths)
    if longest == shortest and longest in UNROLLED:
        return longest, 0
    if longest == shortest + 1 and 2 * longest - 1 in UNROLLED:
        return longest, shortest  # the two phases of stride 2
    return 2, 1


def literal_of(lengths: set[int], stride: int, dilation: int, pattern: Pattern) -> Literal:
    """Return what to emit. Columns are shared among taps where stride and dilation are emitted as numbers."""
    stride, dilation = (stride, dilation) if stride <= 2 and dilation == 1 else (0, 0)
    return Literal(*_chunks(lengths), stride, dilation, pattern)


def tiles() -> tuple[int, ...]:
    """Return the numbers of pixels of a tile, largest first; any row is some of each."""
    return (14, 7, 4, 2, 1) if machine.registers() == 32 else (7, 4, 2, 1)


def sum_tiles() -> tuple[int, ...]:
    """Return the same for a weight gradient, whose registers hold dy and sums: nine of 16 for a kernel of 3x3."""
    return tiles() if machine.registers() == 32 else (4, 2, 1)


def sum_rows(taps: int) -> int:
    """Return how many rows of so many taps have their sums in registers at a time in the weight gradient."""
    # Beside dy. The more sums, the fewer of them wait for one another; three rows are the common case, and none idles.
    return max(1, min(3, (15 if machine.registers() == 32 else 10) // taps))


def columns(literal: Literal, pixels: int, taps: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Return the columns that a tile reads, in order: (stride steps, dilation steps, the (pixel, tap) pairs)."""
    if not literal.stride:
        return [(i, s, [(i, s)]) for i in range(pixels) for s in range(taps)]
    found: dict[int, list[tuple[int, int]]] = {}
    for i in range(pixels):
        for s in range(taps):
            found.setdefault(i * literal.stride + s * literal.dilation, []).append((i, s))
    return [(column, 0, found[column]) for column in sorted(found)]


class RowEmitter:
    """Emits a function that works on rows of pixels for one vector of channels."""

    def __init__(self, module, name, dtype, arguments, geometry, fields, literal):
        """Begin the function that takes what `arguments` names, and loads these fields of a record of `geometry`."""
        function = declare(module, name, arguments, SCALARS[dtype])
        self.builder = builder = ir.IRBuilder(function.append_basic_block("entry"))
        self.emitter = Emitter(builder, dtype)
        self.value = value = Arguments(function, arguments)
        record = builder.inttoptr(value["geometry"], I64.as_pointer())
        for field in (*fields, "dg"):
            value[field] = builder.load(builder.gep(record, [i64(geometry.names.index(field))]))
        self.literal = literal
        self.stride, self.dilation = literal.stride, literal.dilation
        #: vectors of x, new to a row, that an output adds
        self.lines = max(1, self.stride * self.stride)
        emit = self.emitter
        self.mask = emit.first_lanes(value["channels"])
        self.full = builder.icmp_signed(">=", value["channels"], i64(emit.lanes))
        self.loads = literal.pattern.loads(emit.lanes)
        #: in which order the numbers of a load come to their lanes, where that depends on the channel
        self.order = None
        #: the lanes of the first of two groups: known when it runs, as this makes a broadcast load of one instruction
        self.low = emit.first_lanes(value["dg"])
        #: how many elements of each load exist
        others = literal.pattern.cg - 1 if literal.pattern.permuted else 0
        self.left = [builder.sub(value["elements"], i64(load.offset - others)) for load in self.loads]
        self.masks = [emit.first_lanes(left) for left in self.left]

    def steps(self):
        """Return the pixels that one step of stride and one of dilation move; literal columns are counted in ones."""
        return (i64(1), i64(1)) if self.stride else (self.value["stride_w"], self.value["dilation_w"])

    def channel(self, x, k):
        """Return where a channel of the groups is loaded, from now on; `x` points to the first one."""
        if not self.literal.pattern.permuted:
            return self.builder.gep(x, [k])
        number = ir.IntType(8 * self.emitter.itemsize)
        first = self.loads[0].taken
        kind = ir.VectorType(number, self.emitter.lanes)
        places = ir.Constant(kind, [first.get(i, 0) for i in range(self.emitter.lanes)])
        self.order = self.builder.add(places, self.emitter.splat(self.builder.trunc(k, number)))
        return x

    def load_x(self, address, column, care):
        """Load what the lanes read of a pixel, as carefully as it takes."""
        builder, emit = self.builder, self.emitter
        exists = builder.icmp_unsigned("<", column, self.value["columns"]) if care else None
        vector, at = None, {}
        for load, left, mask in zip(self.loads, self.left, self.masks, strict=True):
            place = builder.gep(address, [i64(load.offset)])
            if care == Care.ELEMENTS:
                exists = builder.and_(exists, builder.icmp_signed(">", left, i64(0)))
            if care:
                place = builder.select(exists, place, self.value["zero"])
            masked = care == Care.ELEMENTS and load.width > 1
            loaded = emit.broadcast(place) if load.width == 1 else emit.load(place, mask if masked else None)
            taken = {i: i for i in load.taken} if load.width == 1 else load.taken
            vector, at = (loaded, taken) if vector is None else self._merge(vector, at, loaded, taken)
        if self.literal.pattern.permuted:
            return self.emitter.permute(vector, self.order)
        return self._merge(vector, at, vector, {})[0] if any(i != element for i, element in at.items()) else vector

    def _merge(self, a, at, b, taken):
        """Return a vector whose lanes hold elements of a or of b, each in its place, and what is where then."""
        lanes = self.emitter.lanes
        if self.loads[0].width == 1:
            return self.builder.select(self.low, a, b), {i: i for i in (*at, *taken)}
        order = [at[i] if i in at else lanes + taken[i] if i in taken else i for i in range(lanes)]
        kind = ir.VectorType(ir.IntType(32), lanes)
        return self.builder.shuffle_vector(a, b, ir.Constant(kind, order)), {i: i for i in (*at, *taken)}

    def each_column(self, address, first, pixels, taps, care, action, rows=(0,)):
        """Load each column of a tile and call ``action(x, pairs, row)`` for some rows of x, so many elements apart.

        `address` is that of column `first`. The rows of a column follow one another, so that their sums, which do not
        wait for one another, keep the multiply-adds busy.
        """
        builder, pitch = self.builder, self.value["pixel"]
        stride, dilation = self.steps()
        near, far = builder.mul(stride, pitch), builder.mul(dilation, pitch)
        a, b = 0, 0
        start, column_start = address, first
        for i, s, pairs in columns(self.literal, pixels, taps):
            if i != a:
                start = builder.gep(start, [builder.mul(i64(i - a), near)])
                column_start = builder.add(column_start, builder.mul(i64(i - a), stride))
                address, column, a, b = start, column_start, i, 0
            if s != b:
                address, column, b = builder.gep(address, [far]), builder.add(column, dilation), s
            if (i, s) == (0, 0):
                column = column_start
            for row, offset in enumerate(rows):
                place = builder.gep(address, [offset]) if row else address
                action(self.load_x(place, column, care), pairs, row)

    def prefetch(self, ahead, pixel, pixels, lines=0):
        """Ask for some vectors a pixel of what the next rows read, in the order of memory.

        The processor's own prefetcher follows this order, and not that in which tiles read: it cannot tell where a
        vector of channels goes on.
        """
        builder, emit, lines = self.builder, self.emitter, lines or self.lines
        start = builder.gep(ahead, [builder.mul(pixel, i64(lines * emit.lanes))])
        for line in range(pixels * lines):
            emit.prefetch(builder.gep(start, [i64(line * emit.lanes)]))

    def each_tile(self, count, reach, sizes, body):
        """Cut `count` pixels into tiles: ``body(pixel, column, P, care)``; `reach` is a pixel's last column."""
        with self.builder.if_else(self.value["plain"]) as (plain, careful):
            with plain:
                self._each_tile(count, reach, sizes, body, (Care.NOTHING, Care.COLUMNS))
            with careful:
                self._each_tile(count, reach, (1,), body, (Care.ELEMENTS, Care.ELEMENTS))

    def _each_tile(self, count, reach, sizes, body, cares):
        """Cut pixels into tiles of these sizes, whose columns are all inside, or not: each with a care of its own."""
        builder, value = self.builder, self.value
        done = cgutils.alloca_once(builder, I64)
        builder.store(i64(0), done)
        for pixels in sizes:
            head = builder.append_basic_block(f"tiles_{pixels}")
            tile = builder.append_basic_block(f"tile_{pixels}")
            after = builder.append_basic_block(f"after_{pixels}")
            builder.branch(head)
            builder.position_at_end(head)
            pixel = builder.load(done)
            end = builder.add(pixel, i64(pixels))
            builder.cbranch(builder.icmp_signed("<=", end, count), tile, after)
            builder.position_at_end(tile)
            stride = i64(self.stride) if self.stride else value["stride_w"]
            column = builder.add(builder.mul(pixel, stride), value["first"])
            last = builder.add(column, builder.add(builder.mul(i64(pixels - 1), stride), reach))
            low, high = builder.icmp_signed(">=", column, i64(0)), builder.icmp_signed("<", last, value["columns"])
            if cares[0] == cares[1]:
                body(pixel, column, pixels, cares[0])
            else:
                with builder.if_else(builder.and_(low, high)) as (inside, outside):
                    with inside:
                        body(pixel, column, pixels, cares[0])
                    with outside:
                        body(pixel, column, pixels, cares[1])
            builder.store(end, done)
            builder.branch(head)
            builder.position_at_end(after)
