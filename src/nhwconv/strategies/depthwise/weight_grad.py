"""The weight gradient: for every tap, a sum over the pixels of products of dy and x.

The sums of some rows of taps stay in registers over whole rows of pixels. A tile's dy is loaded, then each column of x
once, and used for all of its taps. Slices of the rows of all images have parts of their own, which are then added.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numba.core import cgutils

from ...codegen.native import Native, Pointer, invoke, native
from ...codegen.simd import add_rows, at, fill_zero, i64, integers, numbers
from ...problem import ConvProblem
from ...program import Part, Step, places
from ...runtime import machine
from ...runtime.jit import Body, device
from ...runtime.records import Record, record
from ..axes import forward_axes
from ..base import Wanted
from ..bias import sum_slices
from ..blocking import inside
from .constants import CUT
from .correlate import price
from .rows import Literal, Offsets, RowEmitter, literal_of, padded, sum_rows

__all__ = ["WeightGrad", "sum_taps", "weight_grad", "weight_grad_steps"]


class WeightGrad(Record):
    """The sums of all taps."""

    n: int  #: images; rows, columns and channels of x; channels of y, and those of whole vectors
    h: int
    w: int
    c: int
    d: int
    padded: int
    p: int  #: rows and columns of outputs
    q: int
    R: int  #: rows of taps; chunks of Q1 and of Q2 in a row, and their taps; taps of a row
    chunks_1: int
    chunks_2: int
    q_1: int
    q_2: int
    rows_1: int  #: rows of taps that are summed together, for either chunk
    rows_2: int
    Q: int
    stride_h: int  #: how x is read; from one row of taps, and of outputs, to the next
    stride_w: int
    dilation_h: int
    dilation_w: int
    top: int
    left: int
    x_r: int
    x_p: int
    y_p: int
    slices: int  #: of the rows of all images; rows that are summed in registers; channels of a task
    lines: int
    block_d: int
    part: int  #: numbers of a part, and of a row of taps in it
    part_r: int
    make_bias: int  #: whether rows of dy are summed, too
    offsets: int  #: the table of channel offsets
    sums: int  #: the native function


# ------------------------------------------------------------------------------------------------- plan


def weight_grad_steps(problem: ConvProblem, wanted: Wanted) -> list[Step]:
    """Return the sums of all slices, and what adds them up."""
    itemsize = problem.dtype.itemsize
    lanes = machine.lanes(itemsize)
    rows, columns = forward_axes(problem)
    literal = literal_of({columns.taps}, columns.stride, columns.dilation, problem.dg > 1)
    chunks, width = literal.split(columns.taps), padded(problem.d, lanes)
    part, lines = problem.kh * problem.kw * width, problem.n * problem.oh
    slices = max(1, min(CUT.most_slices, CUT.parts_limit // part, lines // CUT.slice_lines))
    block_d = padded(math.ceil(problem.d / math.ceil(CUT.most_slices / slices)), lanes)
    g = WeightGrad(
        n=problem.n, h=problem.h, w=problem.w, c=problem.c, d=problem.d, padded=width, p=problem.oh, q=problem.ow,
        R=rows.taps, chunks_1=chunks[0], chunks_2=chunks[1], q_1=literal.q1, q_2=literal.q2,
        rows_1=sum_rows(literal.q1), rows_2=sum_rows(max(literal.q2, 1)), Q=columns.taps,
        stride_h=rows.stride, stride_w=columns.stride, dilation_h=rows.dilation, dilation_w=columns.dilation,
        top=rows.before, left=columns.before, x_r=rows.dilation * problem.w * problem.c,
        x_p=rows.stride * problem.w * problem.c, y_p=problem.ow * problem.d, slices=slices,
        lines=max(1, CUT.sum_pixels // problem.ow), block_d=block_d, part=part, part_r=problem.kw * width,
        make_bias=wanted.bias, offsets=Offsets(np.arange(problem.d) // problem.dg, lanes),
        sums=_sums(problem.dtype.name, literal),
    )  # fmt: skip
    parts = Part(slices * part * itemsize, "parts of dw")
    sums = Part(slices * problem.d * itemsize if wanted.bias else 0, "parts of db")
    zeros = Part(_ZEROS * wanted.workers, "zeros")
    body, tasks = weight_grad(lanes, int(problem.dg > 1), itemsize), slices * math.ceil(problem.d / block_d)
    steps = [Step(body, (g,), tasks, places("x", "dy", parts, sums, zeros), price(problem))]
    if wanted.bias:
        steps.append(sum_slices(problem, slices, sums, wanted.accumulate))
    total = SumTaps(
        slices=slices, part=part, taps=problem.kh * problem.kw, padded=width, d=problem.d, accumulate=wanted.accumulate
    )
    return [*steps, Step(sum_taps(itemsize), (total,), 1, places(parts, "dw"))]


# ------------------------------------------------------------------------------------------------- code


class _Sums(NamedTuple):
    """The products of `lines` rows of dy with x, for one vector of channels, of which `channels` exist.

    For `taps` (Q1 or Q2) taps of each of `rows` (one, or `sum_rows`) rows of taps. `x` points to column 0 of the first
    row of x, `first` is the column that the first output meets with the first tap, `dy` points to that output, `part`
    to the first tap's sums, `zero` to a vector of zeros, and `ahead_x` and `ahead_dy` to what is asked for meanwhile.
    """

    x: Pointer
    dy: Pointer
    ahead_x: Pointer
    ahead_dy: Pointer
    zero: Pointer
    part: Pointer
    offsets: int
    geometry: int
    taps: int
    rows: int
    lines: int
    first: int
    channels: int


_FIELDS = ("w", "c", "d", "padded", "stride_w", "dilation_w", "q", "x_r", "x_p", "y_p", "part_r")


def _sums(dtype: str, literal: Literal) -> Native:
    """Return the function that adds products to a part."""

    def emit(module, name):
        emitted = RowEmitter(module, name, dtype, _Sums, WeightGrad, _FIELDS, literal)
        builder, value = emitted.builder, emitted.value
        done = builder.append_basic_block("done")
        case = builder.add(builder.mul(value["taps"], i64(8)), value["rows"])
        switch = builder.switch(case, done)
        for taps in {literal.q1, literal.q2} - {0}:
            for rows in {1, sum_rows(taps)}:
                block = builder.append_basic_block(f"sums_{rows}x{taps}")
                switch.add_case(i64(taps * 8 + rows), block)
                builder.position_at_end(block)
                _emit_sums(emitted, taps, rows)
                builder.branch(done)
        builder.position_at_end(done)
        builder.ret_void()

    return native(f"nhwconv_depthwise_sums_{dtype}_{'_'.join(map(str, literal))}", emit)


def _emit_sums(emitted, taps, rows):
    """Emit the sums of ``rows x taps`` taps over all lines."""
    builder, emit, value = emitted.builder, emitted.emitter, emitted.value
    sums = [[cgutils.alloca_once(builder, emit.vector) for _ in range(taps)] for _ in range(rows)]
    for s in (s for row in sums for s in row):
        builder.store(emit.zero, s)
    reach = builder.mul(i64(taps - 1), i64(emitted.dilation) if emitted.dilation else value["dilation_w"])
    with cgutils.for_range(builder, value["lines"]) as loop:
        x_line = builder.gep(value["x"], [builder.mul(loop.index, value["x_p"])])
        dy_line = builder.gep(value["dy"], [builder.mul(loop.index, value["y_p"])])
        pixels_before = builder.mul(loop.index, value["q"])
        x_ahead = builder.gep(value["ahead_x"], [builder.mul(pixels_before, i64(emitted.lines * emit.lanes))])
        dy_ahead = builder.gep(value["ahead_dy"], [builder.mul(pixels_before, i64(emit.lanes))])

        def body(pixel, column, pixels, careful):
            dy = builder.gep(dy_line, [builder.mul(pixel, value["d"])])
            factors = [
                emit.load(builder.gep(dy, [builder.mul(i64(i), value["d"])]), emitted.mask if careful else None)
                for i in range(pixels)
            ]
            x = builder.gep(x_line, [builder.mul(column, value["c"])])
            if taps <= 3:  # more taps have work enough to hide the memory behind
                emitted.prefetch(x_ahead, pixel, pixels)
                emitted.prefetch(dy_ahead, pixel, pixels, 1)

            def add(vector, pairs, row):
                for i, s in pairs:
                    total = sums[row][s]
                    builder.store(emit.multiply_add(vector, factors[i], builder.load(total)), total)

            x_rows = [builder.mul(i64(row), value["x_r"]) for row in range(rows)]
            emitted.each_column(x, column, pixels, taps, careful, add, x_rows)

        emitted.each_tile(value["q"], reach, body)
    for r, row in enumerate(sums):
        for s, total in enumerate(row):
            offset = builder.add(builder.mul(i64(r), value["part_r"]), builder.mul(i64(s), value["padded"]))
            address = builder.gep(value["part"], [offset])
            emit.store(builder.fadd(emit.load(address), builder.load(total)), address)


# ----------------------------------------------------------------------------------------------- bodies

#: Bytes of a worker's vector of zeros.
_ZEROS = 64


@device
def _add_lines(g, geometry, n, p, line, lines, r_0, r_1, d_0, d_1, x, dy, part, zero, LANES, GATHER):
    """Add the products of `lines` lines, which meet rows of taps ``r_0:r_1``, for channels ``d_0:d_1``."""
    row = p * g.stride_h - g.top
    ahead_row = n * g.h + row + (g.R - 1) * g.dilation_h + 1 + (lines - 1) * g.stride_h
    ahead_x, ahead_dy = at(x, ahead_row * g.w * g.c), at(dy, (line + lines) * g.q * g.d)
    for j in range(d_0, d_1, LANES):
        channel, offsets = (0, g.offsets + 8 * j) if GATHER else (j, 0)
        tap = 0
        for chunk in range(g.chunks_1 + g.chunks_2):
            taps, most = (g.q_1, g.rows_1) if chunk < g.chunks_1 else (g.q_2, g.rows_2)
            r = r_0
            while r < r_1:
                rows = most if r + most <= r_1 else 1
                invoke(
                    g.sums,
                    _Sums(
                        at(x, (n * g.h + row + r * g.dilation_h) * g.w * g.c + channel),
                        at(dy, line * g.q * g.d + j),
                        at(ahead_x, j * lines * g.w * g.stride_h),
                        at(ahead_dy, j * lines * g.q),
                        zero,
                        at(part, (r * g.Q + tap) * g.padded + j),
                        offsets,
                        geometry,
                        taps,
                        rows,
                        lines,
                        tap * g.dilation_w - g.left,
                        g.d - j,
                    ),
                )
                r += rows
            tap += taps


@cache
def weight_grad(LANES: int, GATHER: int, ITEMSIZE: int) -> Body:
    """Make the body; it takes x, dy, the parts of dw, the parts of db and zeros.

    A task is a slice of the rows of all images, and some of the channels.
    """

    def weight_grad(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, WeightGrad)
        table = integers(operands)
        x, dy = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        zero = numbers(table[4] + worker * _ZEROS, ITEMSIZE)
        if fresh:
            fill_zero(zero, LANES)
        piece, d_0 = task % g.slices, task // g.slices * g.block_d
        d_1 = min(d_0 + g.block_d, g.d)
        part, bias = at(numbers(table[2], ITEMSIZE), piece * g.part), at(numbers(table[3], ITEMSIZE), piece * g.d + d_0)
        for tap in range(g.R * g.Q):
            fill_zero(at(part, tap * g.padded + d_0), min(g.block_d, g.padded - d_0))
        if g.make_bias:
            fill_zero(bias, d_1 - d_0)
        line, last = piece * g.n * g.p // g.slices, (piece + 1) * g.n * g.p // g.slices
        while line < last:
            n, p = line // g.p, line % g.p
            row = p * g.stride_h - g.top
            r_0, r_1 = inside(row, g.h, g.dilation_h, g.R)
            # lines that meet the same rows of taps are summed together
            lines = 1
            while lines < min(g.lines, last - line, g.p - p):
                low, high = inside(row + lines * g.stride_h, g.h, g.dilation_h, g.R)
                if low != r_0 or high != r_1:
                    break
                lines += 1
            if g.make_bias:
                add_rows(at(dy, line * g.q * g.d + d_0), g.d, lines * g.q, d_1 - d_0, bias)
            _add_lines(g, geometry, n, p, line, lines, r_0, r_1, d_0, d_1, x, dy, part, zero, LANES, GATHER)
            line += lines

    return Body(weight_grad)


class SumTaps(Record):
    """Slices of ``(taps, padded)`` numbers, to be added and turned into ``dw (d, taps)``."""

    slices: int
    part: int
    taps: int
    padded: int
    d: int
    accumulate: int


@cache
def sum_taps(ITEMSIZE: int) -> Body:
    """Make the body that adds the parts of all slices, in their order; it takes them and dw."""

    def sum_taps(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, SumTaps)
        table = integers(operands)
        parts, dw = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        for tap in range(g.taps):
            for j in range(g.d):
                total = parts[tap * g.padded + j]
                for piece in range(1, g.slices):
                    total += parts[piece * g.part + tap * g.padded + j]
                place = j * g.taps + tap
                dw[place] = dw[place] + total if g.accumulate else total

    return Body(sum_taps)
