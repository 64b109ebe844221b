"""The correlation of images with the kernels of groups: the forward pass, and all phases of the input gradient.

The sums of a tile's outputs stay in registers while the rows of taps pass by, and of each row the channels of a group.
A row's taps are loaded, then each column of x once, and used for all of its taps.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple, SupportsInt

from numba.core import cgutils

from ...codegen.native import Native, Pointer, invoke, native
from ...codegen.simd import at, copy, fill_zero, i64, integers, numbers, transpose
from ...problem import ConvProblem
from ...program import Part, Step, places
from ...runtime import machine
from ...runtime.jit import Body, device
from ...runtime.records import record
from ..axes import Axis
from ..blocking import inside
from .constants import CUT
from .lanes import Lanes, Spread, vector
from .padded import Rows, View, left_behind, source_of_rows
from .price import price
from .rows import Care, Literal, RowEmitter, literal_of, tiles

__all__ = ["Correlate", "correlate", "correlate_steps"]


class Correlate(Rows):
    """One phase; all phases of a step have the same tasks."""

    phases: int
    R: int  #: rows of taps; chunks of Q1 and of Q2 in a row; taps of a row
    chunks_1: int
    chunks_2: int
    Q: int
    stride_h: int  #: how x is read: its first row and column, and from one row of taps to the next, in elements
    stride_w: int
    dilation_h: int
    dilation_w: int
    top: int
    first: int
    x_r: int
    w_v: int  #: the packed weights of a vector, what its sums start from in there, and zeros behind all
    start: int
    zero: int
    w_0: int  #: the first tap in the packed weights of a vector, and from row, tap and summed channel to the next
    w_r: int
    w_q: int
    w_k: int
    p: int  #: rows and columns of outputs, and where they lie in y, in elements
    q: int
    y_0: int
    y_n: int
    y_p: int
    y_q: int
    block_p: int  #: a task is so many rows of an image, which has so many blocks of them
    blocks: int
    stream: int  #: whether results may go past the caches
    ahead_v: int  #: elements of x that a vector asks for meanwhile
    row: int  #: the native function


class Taps(Lanes):
    """How weights are packed: for each vector its taps, for every summed channel, then what its sums start from.

    Where the weights of a lane lie one behind the other, some matrices of ``(lanes, length)`` are transposed. Otherwise
    the lanes of a group do, and are copied.
    """

    taps: int
    w_g: int  #: from one group, channel of y, summed channel and tap to the next, in w
    w_j: int
    w_k: int
    w_t: int
    bias: int
    matrices: int  #: 0 where lanes are copied
    length: int
    lane: int  #: from one lane to the next, and from one matrix to the next, in w
    matrix: int


#: Bytes within which all CPUs shuffle at no cost beside a load's.
_CHEAP = 16


# ------------------------------------------------------------------------------------------------- plan


def _pack_step(problem: ConvProblem, spread: Spread, backward: bool, bias: bool) -> tuple[Step, Part]:
    """Return the step that packs w, and where."""
    itemsize, lanes = problem.dtype.itemsize, spread.lanes
    taps, kernel = problem.kh * problem.kw, problem.kh * problem.kw * problem.cg
    packed = Part((spread.vectors * (taps * spread.cg + 1) + 1) * lanes * itemsize, "packed weights")
    if not backward:
        turned = dict(matrices=1, length=kernel, lane=kernel, matrix=0)
    elif problem.cg == 1:
        turned = dict(matrices=problem.dg, length=taps, lane=problem.dg * kernel, matrix=kernel)
    else:
        turned = dict(matrices=0, length=0, lane=0, matrix=0)
    g = Taps(
        **spread.fields(), taps=taps, w_g=problem.dg * kernel, w_j=1 if backward else kernel,
        w_k=kernel if backward else 1, w_t=problem.cg, bias=bias, **turned,
    )  # fmt: skip
    body = pack_taps(lanes, itemsize)
    return Step(body, (g,), spread.vectors + 1, places("w", packed, "b" if bias else packed)), packed


def correlate_steps(
    problem: ConvProblem, phases: list[tuple[Axis, Axis]], backward: bool, bias: bool, workers: int
) -> list[Step]:
    """Return the steps of the correlation of x with w forward, or of dy with w backward in all phases."""
    itemsize = problem.dtype.itemsize
    lanes = machine.lanes(itemsize)
    (h, w, c), (out_h, out_w, d) = (problem.h, problem.w, problem.c), (problem.oh, problem.ow, problem.d)
    spread = Spread(problem.groups, problem.cg, problem.dg, lanes)
    if backward:
        (h, w, c), (out_h, out_w, d) = (out_h, out_w, d), (h, w, c)
        spread = Spread(problem.groups, problem.dg, problem.cg, lanes)
    columns = phases[0][1]
    lengths = {q.taps for _, q in phases if q.taps} or {1}
    literal = literal_of(lengths, columns.stride, columns.dilation, spread.pattern)
    if literal.loads_much and spread.cg * itemsize > _CHEAP:
        spread = spread._replace(permuted=True)
        literal = literal._replace(pattern=spread.pattern)
    pack, packed = _pack_step(problem, spread, backward, bias)
    # A block of rows of a task, the same part of every phase.
    p = max(r.out for r, _ in phases)
    block_p = math.ceil(p / math.ceil(CUT.tasks / problem.n))
    view = View(problem, spread, phases, backward, c)
    block_p = view.fit(block_p)
    blocks = math.ceil(p / block_p)
    depth, tap = problem.kh * problem.kw * spread.cg * lanes, spread.cg * lanes
    # Past the caches goes what fills cache lines: every vector of channels is one, and begins at one.
    whole = machine.vector_bytes() == machine.LINE and d % lanes == 0 and spread.whole * spread.dg % lanes == 0
    shared: dict[str, SupportsInt] = dict(
        **spread.fields(), **view.fields(block_p), phases=len(phases), n=problem.n, h=h, w=w, c=c,
        w_v=depth + lanes, start=depth, zero=spread.vectors * (depth + lanes), w_k=lanes,
        y_n=out_h * out_w * d, block_p=block_p, blocks=blocks,
        stream=whole and problem.n * out_h * out_w * d * itemsize >= machine.STREAM_BYTES,
        ahead_v=w * c * phases[0][0].stride // spread.vectors, row=_row(problem.dtype_name, literal),
    )  # fmt: skip
    records = []
    for r, q in phases:
        chunks = literal.split(q.taps)
        records.append(
            Correlate(
                **shared, R=r.taps if q.taps else 0, chunks_1=chunks[0], chunks_2=chunks[1], Q=q.taps,
                stride_h=r.stride, stride_w=q.stride, dilation_h=r.dilation, dilation_w=q.dilation,
                top=r.before, first=view.before - q.before, x_r=r.dilation * view.columns * view.pixel,
                w_0=(r.first_tap * problem.kw + q.first_tap) * tap, w_r=r.tap_step * problem.kw * tap,
                w_q=q.tap_step * tap, p=r.out, q=q.out, y_0=(r.start * out_w + q.start) * d,
                y_p=r.step * out_w * d, y_q=q.step * d,
            )
        )  # fmt: skip
    scratch = Part(records[0].scratch * itemsize * workers, "padded rows of x")
    operands = places("dy" if backward else "x", packed, "dx" if backward else "y", scratch)
    product = CUT.product if machine.registers() == 32 or spread.cg == 1 else CUT.product_in_16
    cycles = price(problem, spread, literal, tiles(), product, problem.n * blocks * view.copies(block_p))
    return [pack, Step(correlate(lanes, itemsize), tuple(records), problem.n * blocks, operands, cycles)]


# ------------------------------------------------------------------------------------------------- code


class _Row(NamedTuple):
    """A row of outputs for some vectors of channels that are alike: they begin whole groups apart.

    Of each, `channels` exist, and need `elements` of a pixel of x. For the first of them, with `rows` rows of taps
    inside, `x` points to column 0 of the first of these, `taps` to its taps, `start` to what the sums start from,
    `ahead` to what is asked for meanwhile, and `y` to the first output; `zero` points to a vector of zeros.
    `plain` tells whether whole vectors may be loaded from x, and `stream` whether they may be stored past the caches.
    """

    x: Pointer
    taps: Pointer
    start: Pointer
    zero: Pointer
    ahead: Pointer
    y: Pointer
    geometry: int
    vectors: int
    rows: int
    channels: int
    elements: int
    plain: bool
    stream: bool


_FIELDS = (
    "columns", "pixel", "cg", "whole", "chunks_1", "chunks_2", "Q", "stride_w", "dilation_w", "first", "x_r", "w_v",
    "w_r", "w_q", "w_k", "q", "y_q", "ahead_v",
)  # fmt: skip


def _row(dtype: str, literal: Literal) -> Native:
    """Return the function that computes a row."""

    def emit(module, name):
        _RowOfOutputs(RowEmitter(module, name, dtype, _Row, Correlate, _FIELDS, literal), literal).emit()

    return native(f"nhwconv_grouped_{dtype}_{literal.name}", emit)


class _RowOfOutputs:
    """Emits a row of outputs, tile by tile."""

    def __init__(self, rows, literal):
        self.rows, self.literal = rows, literal
        self.builder, self.emitter, self.value = rows.builder, rows.emitter, rows.value
        self.dilation = i64(literal.dilation) if literal.dilation else self.value["dilation_w"]

    def emit(self):
        """Emit all of it."""
        builder, value = self.builder, self.value
        if self.literal.pattern.cg == 1:
            value["cg"] = i64(1)
        reach = builder.mul(builder.sub(value["Q"], i64(1)), self.dilation)
        steps = dict(
            x=builder.mul(value["whole"], value["cg"]), taps=value["w_v"], start=value["w_v"], ahead=value["ahead_v"],
            y=builder.mul(value["whole"], value["dg"]),
        )  # fmt: skip
        with cgutils.for_range(builder, value["vectors"]) as loop:
            self.of = {name: builder.gep(value[name], [builder.mul(loop.index, step)]) for name, step in steps.items()}
            self.first_sum = self.emitter.load(self.of["start"])
            self.rows.each_tile(value["q"], reach, tiles(), self._tile)
        builder.ret_void()

    def _tile(self, pixel, column, pixels, care):
        """Emit a tile of so many pixels, from an output on whose first column is `column`."""
        builder, value = self.builder, self.value
        self.sums = [cgutils.alloca_once_value(builder, self.first_sum) for _ in range(pixels)]
        self.column, self.pixels, self.care = column, pixels, care
        x = builder.gep(self.of["x"], [builder.mul(column, value["pixel"])])
        self.rows.prefetch(self.of["ahead"], pixel, pixels)
        with cgutils.for_range(builder, value["rows"]) as row:
            x = builder.gep(x, [builder.mul(row.index, value["x_r"])])
            taps = builder.gep(self.of["taps"], [builder.mul(row.index, value["w_r"])])
            with cgutils.for_range(builder, value["cg"]) as k:
                self._tap_row(self.rows.channel(x, k.index), builder.gep(taps, [builder.mul(k.index, value["w_k"])]))
        self._store(pixel)

    def _tap_row(self, x, taps):
        builder, value = self.builder, self.value
        if not self.literal.q2:
            self._chunk(x, self.column, taps, self.literal.q1)
            return
        moving = [cgutils.alloca_once(builder, v.type) for v in (x, taps, self.column)]
        for place, start in zip(moving, (x, taps, self.column), strict=True):
            builder.store(start, place)
        for count, times in ((self.literal.q1, "chunks_1"), (self.literal.q2, "chunks_2")):
            with cgutils.for_range(builder, value[times]):
                x, taps, column = (builder.load(place) for place in moving)
                self._chunk(x, column, taps, count)
                columns = builder.mul(i64(count), self.dilation)
                builder.store(builder.gep(x, [builder.mul(columns, value["pixel"])]), moving[0])
                builder.store(builder.gep(taps, [builder.mul(i64(count), value["w_q"])]), moving[1])
                builder.store(builder.add(column, columns), moving[2])

    def _chunk(self, x, column, taps, count):
        """Add the products of `count` taps."""
        builder, emit = self.builder, self.emitter
        tap = [emit.load(builder.gep(taps, [builder.mul(i64(s), self.value["w_q"])])) for s in range(count)]
        sums = self.sums

        def add(vector, pairs, _):
            for i, s in pairs:
                builder.store(emit.multiply_add(vector, tap[s], builder.load(sums[i])), sums[i])

        self.rows.each_column(x, column, self.pixels, count, self.care, add)

    def _store(self, pixel):
        """Write the sums, past the caches where that is asked for."""
        builder, emit, value = self.builder, self.emitter, self.value
        y = builder.gep(self.of["y"], [builder.mul(pixel, value["y_q"])])
        outputs = [(builder.gep(y, [builder.mul(i64(i), value["y_q"])]), s) for i, s in enumerate(self.sums)]

        def masked(value, place):
            emit.store(value, place, self.rows.mask)

        def store(by):
            for place, s in outputs:
                by(builder.load(s), place)

        if self.care == Care.ELEMENTS:
            store(masked)
            return
        with builder.if_else(self.rows.full) as (full, partial):
            with full, builder.if_else(value["stream"]) as (streamed, ordinary):
                with streamed:
                    store(emit.stream)
                with ordinary:
                    store(emit.store)
            with partial:
                store(masked)


# ----------------------------------------------------------------------------------------------- bodies


@device
def _turn_lanes(g, w, channels, rows, LANES):
    """Pack weights that lie lane by lane: matrices of ``(lanes, length)``, transposed block by block."""
    for m in range(g.matrices):
        for i in range(0, g.length, LANES):
            target = at(rows, (i * g.matrices + m) * LANES)
            columns = min(LANES, g.length - i)
            transpose(at(w, m * g.matrix + i), g.lane, channels, columns, target, g.matrices * LANES)


@device
def _copy_lanes(g, w, channels, rows, LANES):
    """Pack weights whose lanes lie side by side, those of one group after the other."""
    for first in range(0, channels, g.dg):
        count, group = min(g.dg, channels - first), at(w, first // g.dg * g.w_g)
        for tap in range(g.taps):
            for k in range(g.cg):
                source, target = at(group, tap * g.w_t + k * g.w_k), at(rows, (tap * g.cg + k) * LANES + first)
                for lane in range(count):
                    target[lane] = source[lane]


@cache
def pack_taps(LANES: int, ITEMSIZE: int) -> Body:
    """Make the body that packs weights, those of a vector a task; it takes w, the packed weights and the bias."""

    def pack_taps(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, Taps)
        table = integers(operands)
        depth = g.taps * g.cg
        w, rows = numbers(table[0], ITEMSIZE), at(numbers(table[1], ITEMSIZE), task * (depth + 1) * LANES)
        if task == g.vectors:  # behind all of them
            fill_zero(rows, LANES)
            return
        v = vector(g, task, LANES)
        w = at(w, v.y // g.dg * g.w_g + v.y % g.dg * g.w_j)
        if g.matrices:
            _turn_lanes(g, w, v.channels, rows, LANES)
        else:
            fill_zero(rows, depth * LANES)
            _copy_lanes(g, w, v.channels, rows, LANES)
        fill_zero(at(rows, depth * LANES), LANES)
        if g.bias:
            copy(at(rows, depth * LANES), at(numbers(table[2], ITEMSIZE), v.y), v.channels)

    return Body(pack_taps)


_SIZE = Correlate.dtype.itemsize


@device
def _block_row(g, geometry, n, p, source, x, packed, y, stream, LANES):
    """Compute a row of outputs, all channels of it; `geometry` is the address of the phase's record."""
    row = p * g.stride_h - g.top
    r_0, r_1 = inside(row, g.h, g.dilation_h, g.R)
    x_row, y_row = at(source, (row + r_0 * g.dilation_h) * g.columns * g.pixel), at(y, g.y_0 + n * g.y_n + p * g.y_p)
    ahead = at(x, (n * g.h + row + (g.R - 1) * g.dilation_h + 1) * g.w * g.c)
    left = left_behind(g, n, row + (r_1 - 1) * g.dilation_h)
    number = 0
    while number < g.vectors:
        v = vector(g, number, LANES)
        w = at(packed, number * g.w_v)
        plain = left - v.x >= g.reach
        vectors = 1
        if plain and g.pieces == 1:  # those that follow, as far as they are whole, and plain too
            vectors = max(1, min(g.groups // g.whole - number, (left - v.x - g.reach) // (g.whole * g.cg) + 1))
        invoke(
            g.row,
            _Row(
                at(x_row, v.x),
                at(w, g.w_0 + r_0 * g.w_r),
                at(w, g.start),
                at(packed, g.zero),
                at(ahead, number * g.ahead_v),
                at(y_row, v.y),
                geometry,
                vectors,
                r_1 - r_0,
                v.channels,
                v.elements,
                plain,
                stream,
            ),
        )
        number += vectors


@cache
def correlate(LANES: int, ITEMSIZE: int) -> Body:
    """Make the body; it takes x, the packed weights, y and scratch.

    A task is a block of rows of an image, in all phases.
    """

    def correlate(operands, geometry, worker, task, fresh):
        table = integers(operands)
        x, packed, y = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE), numbers(table[2], ITEMSIZE)
        g = record(geometry, 0, Correlate)
        n, block = task // g.blocks, task % g.blocks
        scratch = at(numbers(table[3], ITEMSIZE), worker * g.scratch)
        source = source_of_rows(g, block * g.block_p * g.stride_h, at(x, n * g.h * g.w * g.c), g.c, scratch)
        # All phases of a block of rows: they read the same rows of x and write the same lines of y.
        for phase in range(g.phases):
            g = record(geometry, phase, Correlate)
            stream = g.stream != 0 and table[2] % (LANES * ITEMSIZE) == 0
            for p in range(block * g.block_p, min((block + 1) * g.block_p, g.p)):
                _block_row(g, geometry + phase * _SIZE, n, p, source, x, packed, y, stream, LANES)

    return Body(correlate)
