"""The correlation of images with one kernel a channel: the forward pass, and all phases of the input gradient.

The sums of a tile's outputs stay in registers while the rows of taps pass by. A row's taps are loaded, then each
column of x once, and used for all of its taps.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple, SupportsInt

import numpy as np
from numba.core import cgutils

from ...codegen.native import Native, Pointer, invoke, native
from ...codegen.simd import at, copy, fill_zero, i64, integers, numbers
from ...problem import ConvProblem
from ...program import Part, Step, places
from ...runtime import machine
from ...runtime.jit import Body, device
from ...runtime.records import Record, record
from ..axes import Axis
from ..blocking import inside
from .constants import CUT
from .rows import Literal, Offsets, RowEmitter, literal_of, padded

__all__ = ["Correlate", "correlate", "correlate_steps", "price"]


class Correlate(Record):
    """One phase; all phases of a step have the same tasks."""

    phases: int
    h: int  #: rows, columns and channels of x; channels of y, and those of whole vectors
    w: int
    c: int
    d: int
    padded: int
    R: int  #: rows of taps; chunks of Q1 and of Q2 in a row; taps of a row
    chunks_1: int
    chunks_2: int
    Q: int
    M: int  #: channels of x that are summed: a multiplier, backwards
    stride_h: int  #: how x is read; from one row of taps to the next, in elements
    stride_w: int
    dilation_h: int
    dilation_w: int
    top: int
    left: int
    x_r: int
    w_0: int  #: where the first tap is in the packed weights, and from row, tap and summed channel to the next
    w_r: int
    w_q: int
    w_m: int
    start: int  #: what sums start from, and zeros, in the packed weights
    zero: int
    p: int  #: rows and columns of outputs, and where they lie in y, in elements
    q: int
    y_0: int
    y_n: int
    y_p: int
    y_q: int
    block_p: int  #: a task is so many rows of an image, which has so many blocks of them
    blocks: int
    stream: int  #: whether results may go past the caches
    offsets: int  #: the table of channel offsets
    row: int  #: the native function


class Taps(Record):
    """How weights are packed: the taps of each position, then what sums start from, then zeros."""

    d: int
    padded: int
    taps: int
    M: int
    bias: int


# ------------------------------------------------------------------------------------------------- plan


def price(problem: ConvProblem) -> float:
    """Return the cycles of any pass: multiply-adds at a part of the peak, or bytes, whichever take longer."""
    itemsize = problem.dtype.itemsize
    used = problem.d / padded(problem.d, machine.lanes(itemsize))
    products = problem.flops / (machine.flops_a_cycle(itemsize) * used * CUT.efficiency)
    return max(products, problem.bytes / machine.BYTES_A_CYCLE) * (1 if problem.dg == 1 else CUT.gathering)


def _pack_step(problem: ConvProblem, channels: int, summed: int, bias: bool) -> tuple[Step, Part]:
    """Return the step that packs w for so many channels of y, each of which sums some of x, and where."""
    itemsize = problem.dtype.itemsize
    taps, width = problem.kh * problem.kw, padded(channels, machine.lanes(itemsize))
    rows = summed * taps + 2
    packed = Part(rows * width * itemsize, "packed weights")
    g = Taps(d=channels, padded=width, taps=taps, M=summed, bias=bias)
    return Step(pack_taps(itemsize), (g,), rows, places("w", packed, "b" if bias else packed)), packed


def correlate_steps(problem: ConvProblem, phases: list[tuple[Axis, Axis]], backward: bool, bias: bool) -> list[Step]:
    """Return the steps of the correlation of x with w forward, or of dy with w backward in all phases."""
    itemsize = problem.dtype.itemsize
    lanes, m = machine.lanes(itemsize), problem.dg
    (h, w, c), (out_h, out_w, d) = (problem.h, problem.w, problem.c), (problem.oh, problem.ow, problem.d)
    if backward:
        (h, w, c), (out_h, out_w, d) = (out_h, out_w, d), (h, w, c)
    columns, width = phases[0][1], padded(d, lanes)
    literal = literal_of({q.taps for _, q in phases if q.taps} or {1}, columns.stride, columns.dilation, m > 1)
    pack, packed = _pack_step(problem, d, m if backward else 1, bias)
    # A block of rows of a task, the same part of every phase.
    p = max(r.out for r, _ in phases)
    block_p = math.ceil(p / math.ceil(CUT.tasks / problem.n))
    blocks = math.ceil(p / block_p)
    depth = (m if backward else 1) * problem.kh * problem.kw
    shared: dict[str, SupportsInt] = dict(
        phases=len(phases), h=h, w=w, c=c, d=d, padded=width, M=m if backward else 1,
        w_m=problem.kh * problem.kw * width, start=depth * width, zero=(depth + 1) * width,
        y_n=out_h * out_w * d, block_p=block_p, blocks=blocks,
        stream=d % lanes == 0 and problem.n * out_h * out_w * d * itemsize >= machine.STREAM_BYTES,
        offsets=Offsets(np.arange(d) * m if backward else np.arange(d) // m, lanes),
        row=_row(problem.dtype.name, literal),
    )  # fmt: skip
    records = []
    for r, q in phases:
        chunks = literal.split(q.taps)
        records.append(
            Correlate(
                **shared, R=r.taps if q.taps else 0, chunks_1=chunks[0], chunks_2=chunks[1], Q=q.taps,
                stride_h=r.stride, stride_w=q.stride, dilation_h=r.dilation, dilation_w=q.dilation,
                top=r.before, left=q.before, x_r=r.dilation * w * c,
                w_0=(r.first_tap * problem.kw + q.first_tap) * width, w_r=r.tap_step * problem.kw * width,
                w_q=q.tap_step * width, p=r.out, q=q.out, y_0=(r.start * out_w + q.start) * d,
                y_p=r.step * out_w * d, y_q=q.step * d,
            )
        )  # fmt: skip
    operands = places("dy" if backward else "x", packed, "dx" if backward else "y")
    body = correlate(lanes, int(m > 1), itemsize)
    return [pack, Step(body, tuple(records), problem.n * blocks, operands, price(problem))]


# ------------------------------------------------------------------------------------------------- code


class _Row(NamedTuple):
    """A row of outputs for one vector of channels, of which `channels` exist.

    `rows` rows of taps are inside; `x` points to column 0 of the first of them, `taps` to its taps, `start` to what the
    sums start from, `zero` to a vector of zeros, `ahead` to what is asked for meanwhile, and `y` to the first output.
    """

    x: Pointer
    taps: Pointer
    start: Pointer
    zero: Pointer
    ahead: Pointer
    y: Pointer
    offsets: int
    geometry: int
    rows: int
    channels: int
    stream: int


_FIELDS = (
    "w", "c", "chunks_1", "chunks_2", "Q", "M", "stride_w", "dilation_w", "left", "x_r", "w_r", "w_q", "w_m", "q",
    "y_q",
)  # fmt: skip


def _row(dtype: str, literal: Literal) -> Native:
    """Return the function that computes a row."""

    def emit(module, name):
        _RowOfOutputs(RowEmitter(module, name, dtype, _Row, Correlate, _FIELDS, literal), literal).emit()

    return native(f"nhwconv_depthwise_{dtype}_{'_'.join(map(str, literal))}", emit)


class _RowOfOutputs:
    """Emits a row of outputs, tile by tile."""

    def __init__(self, rows, literal):
        self.rows, self.literal = rows, literal
        self.builder, self.emitter, self.value = rows.builder, rows.emitter, rows.value
        self.dilation = i64(literal.dilation) if literal.dilation else self.value["dilation_w"]

    def emit(self):
        """Emit all of it."""
        builder, value = self.builder, self.value
        value["first"] = builder.neg(value["left"])
        self.first_sum = self.emitter.load(value["start"])
        reach = builder.mul(builder.sub(value["Q"], i64(1)), self.dilation)
        self.rows.each_tile(value["q"], reach, self._tile)
        builder.ret_void()

    def _tile(self, pixel, column, pixels, careful):
        """Emit a tile of so many pixels, from an output on whose first column is `column`."""
        builder, value = self.builder, self.value
        self.sums = [cgutils.alloca_once_value(builder, self.first_sum) for _ in range(pixels)]
        self.column, self.pixels, self.careful = column, pixels, careful
        x = builder.gep(value["x"], [builder.mul(column, value["c"])])
        self.rows.prefetch(value["ahead"], pixel, pixels)
        if self.literal.gather:
            with cgutils.for_range(builder, value["M"]) as loop:
                taps = builder.gep(value["taps"], [builder.mul(loop.index, value["w_m"])])
                self._tap_rows(builder.gep(x, [loop.index]), taps)
        else:
            self._tap_rows(x, value["taps"])
        self._store(pixel)

    def _tap_rows(self, x, taps):
        builder, value = self.builder, self.value
        with cgutils.for_range(builder, value["rows"]) as loop:
            self._tap_row(
                builder.gep(x, [builder.mul(loop.index, value["x_r"])]),
                builder.gep(taps, [builder.mul(loop.index, value["w_r"])]),
            )

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
                builder.store(builder.gep(x, [builder.mul(columns, value["c"])]), moving[0])
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

        self.rows.each_column(x, column, self.pixels, count, self.careful, add)

    def _store(self, pixel):
        """Write the sums, past the caches where that is asked for."""
        builder, emit, value = self.builder, self.emitter, self.value
        y = builder.gep(value["y"], [builder.mul(pixel, value["y_q"])])
        outputs = [(builder.gep(y, [builder.mul(i64(i), value["y_q"])]), s) for i, s in enumerate(self.sums)]
        if self.careful:
            for place, s in outputs:
                emit.store(builder.load(s), place, self.rows.mask)
            return
        with builder.if_else(builder.icmp_signed("!=", value["stream"], i64(0))) as (streamed, ordinary):
            with streamed:
                for place, s in outputs:
                    emit.stream(builder.load(s), place)
            with ordinary:
                for place, s in outputs:
                    emit.store(builder.load(s), place)


# ----------------------------------------------------------------------------------------------- bodies


@cache
def pack_taps(ITEMSIZE: int) -> Body:
    """Make the body that packs weights, a row a task; it takes w, the packed weights and the bias."""

    def pack_taps(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, Taps)
        table = integers(operands)
        w, row = numbers(table[0], ITEMSIZE), at(numbers(table[1], ITEMSIZE), task * g.padded)
        fill_zero(row, g.padded)
        depth = g.M * g.taps
        if task < depth:
            i, tap = task // g.taps, task % g.taps
            for j in range(g.d):
                row[j] = w[(j * g.M + i) * g.taps + tap]
        elif task == depth and g.bias:
            copy(row, numbers(table[2], ITEMSIZE), g.d)

    return Body(pack_taps)


_SIZE = Correlate.dtype.itemsize


@device
def _block_row(g, geometry, n, p, x, packed, y, stream, LANES, GATHER):
    """Compute a row of outputs, all channels of it; `geometry` is the address of the phase's record."""
    row = p * g.stride_h - g.top
    r_0, r_1 = inside(row, g.h, g.dilation_h, g.R)
    x_row = at(x, (n * g.h + row + r_0 * g.dilation_h) * g.w * g.c)
    ahead = at(x, (n * g.h + row + (g.R - 1) * g.dilation_h + 1) * g.w * g.c)
    taps, y_row = at(packed, g.w_0 + r_0 * g.w_r), at(y, g.y_0 + n * g.y_n + p * g.y_p)
    for j in range(0, g.d, LANES):
        channel, offsets = (0, g.offsets + 8 * j) if GATHER else (j, 0)
        invoke(
            g.row,
            _Row(
                at(x_row, channel),
                at(taps, j),
                at(packed, g.start + j),
                at(packed, g.zero),
                at(ahead, j * g.w * g.stride_h),
                at(y_row, j),
                offsets,
                geometry,
                r_1 - r_0,
                g.d - j,
                stream,
            ),
        )


@cache
def correlate(LANES: int, GATHER: int, ITEMSIZE: int) -> Body:
    """Make the body; it takes x, the packed weights and y. A task is a block of rows of an image, in all phases."""

    def correlate(operands, geometry, worker, task, fresh):
        table = integers(operands)
        x, packed, y = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE), numbers(table[2], ITEMSIZE)
        # All phases of a block of rows: they read the same rows of x and write the same lines of y.
        for phase in range(record(geometry, 0, Correlate).phases):
            g = record(geometry, phase, Correlate)
            n, block = task // g.blocks, task % g.blocks
            stream = g.stream if table[2] % (LANES * ITEMSIZE) == 0 else 0
            for p in range(block * g.block_p, min((block + 1) * g.block_p, g.p)):
                _block_row(g, geometry + phase * _SIZE, n, p, x, packed, y, stream, LANES, GATHER)

    return Body(correlate)
