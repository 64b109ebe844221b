"""The weight gradient: for every tap and channel of a group, a sum over the pixels of products of dy and x.

The sums of some rows of taps stay in registers over whole rows of pixels. A tile's dy is loaded, then each column of x
once, and used for all of its taps; then the same for the next channel of the groups. Slices of the rows of all images
have parts of their own, which are then added.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from numba.core import cgutils

from ...codegen.native import Native, Pointer, invoke, native
from ...codegen.simd import add_rows, at, copy_rows, fill_zero, i64, integers, numbers
from ...problem import ConvProblem
from ...program import Part, Step, places
from ...runtime import arrays, machine
from ...runtime.jit import Body, device
from ...runtime.records import record
from ..axes import forward_axes
from ..base import Wanted
from ..bias import sum_slices
from ..blocking import inside, point_pitch
from ..turning import transpose_matrix
from .constants import CUT
from .lanes import Lanes, Spread, vector
from .padded import Rows, View, left_behind, source_of_rows
from .price import price
from .rows import Care, Literal, RowEmitter, literal_of, sum_rows, sum_tiles

__all__ = ["WeightGrad", "sum_taps", "weight_grad", "weight_grad_steps"]


class WeightGrad(Rows):
    """The sums of all taps."""

    d: int  #: channels of y
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
    stride_h: int  #: how x is read: its first row and column; from one row of taps, and of outputs, to the next
    stride_w: int
    dilation_h: int
    dilation_w: int
    top: int
    first: int
    x_r: int
    x_p: int
    y_p: int
    pixel_d: int  #: from one pixel of dy to the next, where it is read, and where its rows are in scratch
    s_dy: int
    slices: int  #: of the rows of all images; rows that are summed in registers; vectors of a task
    lines: int
    block: int
    part: int  #: numbers of a part, of a vector in it, and of a row of taps and a tap in that
    part_v: int
    part_r: int
    part_q: int
    make_bias: int  #: whether rows of dy are summed, too
    sums: int  #: the native function


# ------------------------------------------------------------------------------------------------- plan


def _equal_slices(images: int, most: int) -> int:
    """Return about so many slices: a part of an image each, or some images where these can be shared out equally."""
    if most >= images:
        return most - most % images
    return next((slices for slices in range(most, most // 2, -1) if images % slices == 0), most)


def weight_grad_steps(problem: ConvProblem, wanted: Wanted) -> list[Step]:
    """Return the sums of all slices, and what adds them up."""
    itemsize = problem.dtype.itemsize
    lanes = machine.lanes(itemsize)
    rows, columns = forward_axes(problem)
    spread = Spread(problem.groups, problem.cg, problem.dg, lanes, permuted=True)
    literal = literal_of({columns.taps}, columns.stride, columns.dilation, spread.pattern)
    chunks, part_v = literal.split(columns.taps), problem.kh * problem.kw * problem.cg * lanes
    part, lines = part_v * spread.vectors, problem.n * problem.oh
    # Slices of all vectors read images in order. But each has a part, that of many channels a large one, and small
    # images few rows: then vectors are cut as well.
    tasks = min(CUT.most_slices, lines * problem.ow * part // lanes // CUT.slice_products)
    slices = _equal_slices(problem.n, max(1, min(tasks, CUT.parts_limit // (part * problem.cg), lines)))
    block = math.ceil(spread.vectors / max(1, max(tasks, CUT.least_tasks) // slices))
    lines_summed = max(1, CUT.sum_pixels // problem.ow)
    channels = min(problem.c, ((block + spread.pieces - 2) // spread.pieces + 1) * spread.whole * problem.cg)
    read = sum_rows(literal.q1) * ((sum_tiles()[0] - 1) * columns.stride + literal.q1)
    view = View(problem, spread, [(rows, columns)], False, channels, read)
    # With the rows of x go those of dy: both are read for every channel of a group.
    held = view.fields(lines_summed)
    pixel_d, s_dy = problem.d, held["scratch"]
    if view.gather:
        pixel_d = point_pitch(block * lanes, lanes)
        held["scratch"] += arrays.apart(lines_summed * problem.ow * pixel_d + lanes, itemsize)
    g = WeightGrad(
        **spread.fields(), **held, n=problem.n, h=problem.h, w=problem.w, c=problem.c, d=problem.d, p=problem.oh,
        q=problem.ow, R=rows.taps, chunks_1=chunks[0], chunks_2=chunks[1], q_1=literal.q1, q_2=literal.q2,
        rows_1=sum_rows(literal.q1), rows_2=sum_rows(max(literal.q2, 1)), Q=columns.taps,
        stride_h=rows.stride, stride_w=columns.stride, dilation_h=rows.dilation, dilation_w=columns.dilation,
        top=rows.before, first=view.before - columns.before, x_r=rows.dilation * view.columns * view.pixel,
        x_p=rows.stride * view.columns * view.pixel, y_p=problem.ow * pixel_d, pixel_d=pixel_d, s_dy=s_dy,
        slices=slices, lines=lines_summed, block=block, part=part, part_v=part_v,
        part_r=problem.kw * problem.cg * lanes, part_q=problem.cg * lanes, make_bias=wanted.bias,
        sums=_sums(problem.dtype_name, literal),
    )  # fmt: skip
    parts = Part(slices * part * itemsize, "parts of dw")
    sums = Part(slices * problem.d * itemsize if wanted.bias else 0, "parts of db")
    zeros = Part(_ZEROS * wanted.workers, "zeros")
    scratch = Part(g.scratch * itemsize * wanted.workers, "padded rows of x")
    body, tasks = weight_grad(lanes, itemsize), slices * math.ceil(spread.vectors / block)
    operands = places("x", "dy", parts, sums, zeros, scratch)
    product = CUT.sum if machine.registers() == 32 or problem.cg == 1 else CUT.sum_in_16
    copies = view.copies(lines_summed) * lines / lines_summed * math.ceil(spread.vectors / block)
    cycles = price(problem, spread, literal, sum_tiles(), product, copies)
    steps: list[Step] = [Step(body, (g,), tasks, operands, cycles)]
    if wanted.bias:
        steps.append(sum_slices(problem, slices, sums, wanted.accumulate))
    total = SumTaps(
        **spread.fields(), slices=slices, part=part, depth=part_v // lanes, accumulate=wanted.accumulate
    )  # fmt: skip
    return [*steps, Step(sum_taps(lanes, itemsize), (total,), spread.vectors, places(parts, "dw"))]


# ------------------------------------------------------------------------------------------------- code


class _Sums(NamedTuple):
    """The products of `lines` rows of dy with x, for one vector of channels, of which `channels` exist.

    They need `elements` of a pixel of x; `plain` tells whether whole vectors may be loaded from x and dy.
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
    geometry: int
    taps: int
    rows: int
    lines: int
    first: int
    channels: int
    elements: int
    plain: bool


_FIELDS = ("columns", "pixel", "pixel_d", "cg", "stride_w", "dilation_w", "q", "x_r", "x_p", "y_p", "part_r", "part_q")


def _sums(dtype: str, literal: Literal) -> Native:
    """Return the function that adds products to a part."""

    def emit(module, name):
        emitted = RowEmitter(module, name, dtype, _Sums, WeightGrad, _FIELDS, literal)
        builder, value = emitted.builder, emitted.value
        if literal.pattern.cg == 1:
            value["cg"] = i64(1)
        done = builder.append_basic_block("done")
        case = builder.add(builder.mul(value["taps"], i64(8)), value["rows"])
        switch = builder.switch(case, done)
        for taps in {literal.q1, literal.q2} - {0}:
            for rows in {1, sum_rows(taps)}:
                block = builder.append_basic_block(f"sums_{rows}x{taps}")
                switch.add_case(i64(taps * 8 + rows), block)
                builder.position_at_end(block)
                with cgutils.for_range(builder, value["cg"]) as k:
                    part = builder.gep(value["part"], [builder.mul(k.index, i64(emitted.emitter.lanes))])
                    _emit_sums(emitted, taps, rows, emitted.channel(value["x"], k.index), part)
                builder.branch(done)
        builder.position_at_end(done)
        builder.ret_void()

    return native(f"nhwconv_grouped_sums_{dtype}_{literal.name}", emit)


def _emit_sums(emitted, taps, rows, x, part):
    """Emit the sums of ``rows x taps`` taps over all lines, for one channel of each group."""
    builder, emit, value = emitted.builder, emitted.emitter, emitted.value
    sums = [[cgutils.alloca_once(builder, emit.vector) for _ in range(taps)] for _ in range(rows)]
    for s in (s for row in sums for s in row):
        builder.store(emit.zero, s)
    reach = builder.mul(i64(taps - 1), i64(emitted.dilation) if emitted.dilation else value["dilation_w"])
    with cgutils.for_range(builder, value["lines"]) as loop:
        x_line = builder.gep(x, [builder.mul(loop.index, value["x_p"])])
        dy_line = builder.gep(value["dy"], [builder.mul(loop.index, value["y_p"])])
        pixels_before = builder.mul(loop.index, value["q"])
        x_ahead = builder.gep(value["ahead_x"], [builder.mul(pixels_before, i64(emitted.lines * emit.lanes))])
        dy_ahead = builder.gep(value["ahead_dy"], [builder.mul(pixels_before, i64(emit.lanes))])

        def body(pixel, column, pixels, care):
            mask = emitted.mask if care == Care.ELEMENTS else None
            dy = builder.gep(dy_line, [builder.mul(pixel, value["pixel_d"])])
            factors = [emit.load(builder.gep(dy, [builder.mul(i64(i), value["pixel_d"])]), mask) for i in range(pixels)]
            x_tile = builder.gep(x_line, [builder.mul(column, value["pixel"])])
            if taps <= 3 and emitted.literal.pattern.cg == 1:  # more taps have work enough to hide the memory behind
                emitted.prefetch(x_ahead, pixel, pixels)
                emitted.prefetch(dy_ahead, pixel, pixels, 1)

            def add(vector, pairs, row):
                for i, s in pairs:
                    total = sums[row][s]
                    builder.store(emit.multiply_add(vector, factors[i], builder.load(total)), total)

            x_rows = [builder.mul(i64(row), value["x_r"]) for row in range(rows)]
            emitted.each_column(x_tile, column, pixels, taps, care, add, x_rows)

        emitted.each_tile(value["q"], reach, sum_tiles(), body)
    for r, row in enumerate(sums):
        for s, total in enumerate(row):
            offset = builder.add(builder.mul(i64(r), value["part_r"]), builder.mul(i64(s), value["part_q"]))
            address = builder.gep(part, [offset])
            emit.store(builder.fadd(emit.load(address), builder.load(total)), address)


# ----------------------------------------------------------------------------------------------- bodies

#: Bytes of a worker's vector of zeros.
_ZEROS = 64


class _Lines(NamedTuple):
    """Lines of an image, from row p on, all of which meet rows of taps ``r_0:r_1``, and where they are read.

    `source` points to channel `x_0` of the first pixel of x, `source_dy` to channel `d_0` of the first of dy.
    """

    line: int
    lines: int
    n: int
    p: int
    r_0: int
    r_1: int
    source: Pointer
    x_0: int
    source_dy: Pointer
    d_0: int


@device
def _add_vector(g, geometry, number, these, x, dy, part, zero, LANES):
    """Add the products of some lines for a vector of channels."""
    line, lines, n, p, r_0, r_1, source, x_0, source_dy, d_0 = these
    v = vector(g, number, LANES)
    row = p * g.stride_h - g.top
    ahead_row = n * g.h + row + (g.R - 1) * g.dilation_h + 1 + (lines - 1) * g.stride_h
    ahead_x = at(x, ahead_row * g.w * g.c + v.x * lines * g.w * g.stride_h)
    ahead_dy = at(dy, (line + lines) * g.q * g.d + v.y * lines * g.q)
    left = left_behind(g, n, row + (lines - 1) * g.stride_h + (r_1 - 1) * g.dilation_h)
    left_dy = (g.n * g.p - (line + lines)) * g.q * g.d + g.d
    plain = left - (v.x - x_0 if g.gather else v.x) >= g.reach and (g.gather != 0 or left_dy - v.y >= LANES)
    tap = 0
    for chunk in range(g.chunks_1 + g.chunks_2):
        taps, most = (g.q_1, g.rows_1) if chunk < g.chunks_1 else (g.q_2, g.rows_2)
        r = r_0
        while r < r_1:
            rows = most if r + most <= r_1 else 1
            invoke(
                g.sums,
                _Sums(
                    at(source, (row + r * g.dilation_h) * g.columns * g.pixel + v.x - x_0),
                    at(source_dy, v.y - d_0),
                    ahead_x,
                    ahead_dy,
                    zero,
                    at(part, number * g.part_v + r * g.part_r + tap * g.part_q),
                    geometry,
                    taps,
                    rows,
                    lines,
                    tap * g.dilation_w + g.first,
                    v.channels,
                    v.elements,
                    plain,
                ),
            )
            r += rows
        tap += taps


@cache
def weight_grad(LANES: int, ITEMSIZE: int) -> Body:
    """Make the body; it takes x, dy, the parts of dw, the parts of db, zeros and scratch.

    A task is a slice of the rows of all images, and some vectors of channels.
    """

    def weight_grad(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, WeightGrad)
        table = integers(operands)
        x, dy = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        zero = numbers(table[4] + worker * _ZEROS, ITEMSIZE)
        if fresh:
            fill_zero(zero, LANES)
        piece, v_0 = task % g.slices, task // g.slices * g.block
        v_1 = min(v_0 + g.block, g.vectors)
        d_0, d_1, x_0, x_1 = _channels(g, v_0, v_1, LANES)
        scratch = at(numbers(table[5], ITEMSIZE), worker * g.scratch)
        part, bias = at(numbers(table[2], ITEMSIZE), piece * g.part), at(numbers(table[3], ITEMSIZE), piece * g.d + d_0)
        fill_zero(at(part, v_0 * g.part_v), (v_1 - v_0) * g.part_v)
        if g.make_bias:
            fill_zero(bias, d_1 - d_0)
        line, end = piece * g.n * g.p // g.slices, (piece + 1) * g.n * g.p // g.slices
        while line < end:
            n, p = line // g.p, line % g.p
            r_0, r_1 = inside(p * g.stride_h - g.top, g.h, g.dilation_h, g.R)
            lines = _alike(g, p, min(g.lines, end - line, g.p - p), r_0, r_1)
            if g.make_bias:
                add_rows(at(dy, line * g.q * g.d + d_0), g.d, lines * g.q, d_1 - d_0, bias)
            image = at(x, n * g.h * g.w * g.c + x_0)
            source = source_of_rows(g, p * g.stride_h - g.top + g.above, image, x_1 - x_0, scratch)
            source_dy = _dy_rows(g, at(dy, line * g.q * g.d + d_0), lines * g.q, d_1 - d_0, at(scratch, g.s_dy))
            these = _Lines(line, lines, n, p, r_0, r_1, source, x_0, source_dy, d_0)
            for number in range(v_0, v_1):
                _add_vector(g, geometry, number, these, x, dy, part, zero, LANES)
            line += lines

    return Body(weight_grad)


@device
def _channels(g, v_0, v_1, LANES):
    """Return which channels of y some vectors are, from and up to, and which channels of x they need."""
    first, last = vector(g, v_0, LANES), vector(g, v_1 - 1, LANES)
    return first.y, last.y + last.channels, first.x, last.x + last.elements + g.cg - 1


@device
def _dy_rows(g, dy, pixels, channels, scratch):
    """Return where pixels of dy are read: as they lie, or in scratch, copied now."""
    if not g.gather:
        return dy
    copy_rows(scratch, g.pixel_d, dy, g.d, pixels, channels)
    return scratch


@device
def _alike(g, p, most, r_0, r_1):
    """Return how many lines, from row p on, meet rows of taps ``r_0:r_1``: they are summed together."""
    lines = 1
    while lines < most:
        low, high = inside((p + lines) * g.stride_h - g.top, g.h, g.dilation_h, g.R)
        if low != r_0 or high != r_1:
            break
        lines += 1
    return lines


class SumTaps(Lanes):
    """Slices of ``(vectors, depth, lanes)`` numbers, to be added and turned into ``dw (d, depth)``."""

    slices: int
    part: int
    depth: int
    accumulate: int


@cache
def sum_taps(LANES: int, ITEMSIZE: int) -> Body:
    """Make the body that adds the parts of all slices, in their order, a vector a task; it takes them and dw."""

    def sum_taps(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, SumTaps)
        table = integers(operands)
        v = vector(g, task, LANES)
        parts = at(numbers(table[0], ITEMSIZE), task * g.depth * LANES)
        dw = at(numbers(table[1], ITEMSIZE), v.y * g.depth)
        for piece in range(1, g.slices):
            for i in range(g.depth * LANES):
                parts[i] += parts[piece * g.part + i]
        if g.accumulate:
            for i in range(g.depth):
                for lane in range(v.channels):
                    parts[i * LANES + lane] += dw[lane * g.depth + i]
        transpose_matrix(parts, LANES, g.depth, v.channels, dw, g.depth, LANES)

    return Body(sum_taps)
