"""The correlation of `.correlate` for few output channels: pixels on the vectors, not channels.

Input gradients of image layers have three output channels, which would leave most of a vector empty. Here a task copies
its rows of x with pixels side by side, ``(rows, channels, columns)``, and a register tile is a few output channels
times a run of pixels of one row. Outputs are a stride apart in y, never in x: the columns' stride is one.

All phases of a strided input gradient read the same rows of dy, so one copy serves them: there is a record of the
geometry for each.
"""

from __future__ import annotations

import math
from functools import cache

from ...codegen.simd import at, copy, fill_zero, integers, numbers, transpose, transpose_exact
from ...codegen.tile import (
    Operand,
    Rows,
    Sum,
    column_tile,
    cycles,
    narrow_tiles,
    no_prefetch,
    tile_product,
)
from ...problem import ConvProblem
from ...program import Part, Step, places
from ...runtime import arrays, machine
from ...runtime.jit import Body, ceil_div, device
from ...runtime.records import record
from ..axes import Axis, correlation_fields
from ..base import Wanted
from ..blocking import equal_blocks, inside
from .constants import CUT
from .correlate import Taps, pack_step, sum_blocks

__all__ = ["Narrow", "correlate_narrow", "narrow_steps"]


class Narrow(Taps):
    """One phase; all but its taps, their borders and its outputs are the same for all phases."""

    phases: int
    rows: int  #: most rows of outputs, and those of a task
    block_p: int
    before_h: int  #: x is copied from so many rows and columns before an output's place on,
    before_w: int
    reach: int  #: and over so many rows for each output
    pitch: int  #: columns of the copy
    s_sums: int  #: where a row of sums is in a worker's scratch, and from one worker's scratch to the next
    scratch: int
    width: int  #: columns of a register tile
    packed_0: int  #: where the phase's weights are


# ------------------------------------------------------------------------------------------------- plan


def _tile(itemsize: int, dg: int, q: int, depth: int) -> tuple[int, int, float]:
    """Return (MR, NR) for ``dg`` channels and ``q`` pixels, and the cycles of a row."""
    lanes = machine.lanes(itemsize)
    tiles = [(mr, nr, cycles(dg, q, depth, (mr, nr, lanes))) for mr, nr in narrow_tiles(itemsize)]
    return min(tiles, key=lambda tile: tile[2])


def _span(axes: list[Axis]) -> tuple[int, int]:
    """Return how far before an output's place all phases together read, and over how many pixels from there on."""
    axes = [axis for axis in axes if axis.taps] or axes[:1]
    before = max(axis.before for axis in axes)
    return before, before + max(max(axis.taps - 1, 0) * axis.dilation - axis.before for axis in axes) + 1


def _copy_fields(
    problem: ConvProblem, phases: list[tuple[Axis, Axis]], p: int, q: int, cg: int, dg: int
) -> dict[str, int]:
    """Return what the copy of x is like, and how many rows of outputs a task has."""
    itemsize = problem.dtype.itemsize
    lanes, stride = machine.lanes(itemsize), phases[0][0].stride
    high, wide = (_span([phase[axis] for phase in phases]) for axis in (0, 1))
    # An odd number of vectors, so that the same pixels of all channels spread over the cache's sets.
    pitch = (math.ceil((q - 1 + wide[1]) / lanes) + 1 | 1) * lanes
    block_p = max(1, min(CUT.task_bytes // (pitch * cg * itemsize) - high[1], CUT.task_pixels // q) // stride)
    block_p = equal_blocks(p, math.ceil(p / max(block_p, high[1])))
    s_sums = ((block_p - 1) * stride + high[1]) * cg * pitch
    return {
        "stride_h": stride, "rows": p, "block_p": block_p, "before_h": high[0], "before_w": wide[0], "reach": high[1],
        "pitch": pitch, "s_sums": s_sums, "scratch": arrays.apart(s_sums + dg * pitch, itemsize),
    }  # fmt: skip


def narrow_steps(problem: ConvProblem, phases: list[tuple[Axis, Axis]], backward: bool, wanted: Wanted) -> list[Step]:
    """Return the steps of the correlations of all phases: their packing, and themselves."""
    itemsize = problem.dtype.itemsize
    lanes = machine.lanes(itemsize)
    fields = [correlation_fields(problem, rows, columns, backward) for rows, columns in phases]
    n, groups, cg, dg = (fields[0][name] for name in ("n", "groups", "cg", "dg"))
    p, q = max(side["p"] for side in fields), max(side["q"] for side in fields)
    mr, nr, _ = _tile(itemsize, dg, q, max(rows.taps * columns.taps * cg for rows, columns in phases))
    shared = _copy_fields(problem, phases, p, q, cg, dg)
    pack, packed, ends = pack_step(problem, phases, backward, wanted.weights)
    records = [
        Narrow(
            **side, **shared, **sum_blocks(rows.taps, columns.taps, cg), phases=len(phases), add_bias=wanted.bias,
            tile=column_tile(problem.dtype_name, mr, nr), width=nr * lanes, R=rows.taps, Q=columns.taps, packed_0=first,
        )
        for side, (rows, columns), first in zip(fields, phases, ends[:-1], strict=True)
    ]  # fmt: skip
    price = float(n * groups * fields[0]["h"] * fields[0]["w"] * cg)  # x turned
    for side, (rows, columns) in zip(fields, phases, strict=True):
        row = _tile(itemsize, dg, side["q"], rows.taps * columns.taps * cg)[2]
        price += n * groups * side["p"] * (row + side["q"] * dg)  # and y turned
    scratch = Part(shared["scratch"] * itemsize * wanted.workers)
    operands = places(
        "dy" if backward else "x", packed, "b" if wanted.bias else packed, "dx" if backward else "y", scratch
    )
    tasks = n * groups * math.ceil(p / shared["block_p"])
    step = Step(correlate_narrow(lanes, itemsize), tuple(records), tasks, operands, price)
    return [pack, step] if pack.tasks else [step]


# ------------------------------------------------------------------------------------------------- body


@device
def _turn_row(g, x_row, channels, target, LANES):
    """Copy a row of x with pixels side by side: ``(channels, pitch)``; what is left and right of it stays zero."""
    first, last = max(0, -g.before_w), min(g.w, g.pitch - LANES - g.before_w)
    target = at(target, g.before_w)
    if g.c == 1:
        copy(at(target, first), at(x_row, first), max(0, last - first))
        return
    for j in range(first, last, LANES):
        pixels = min(LANES, last - j)
        for k in range(0, channels, LANES):
            block = at(x_row, j * g.c + k)
            transpose(block, g.c, pixels, min(LANES, channels - k), at(target, k * g.pitch + j), g.pitch)


@device
def _turn_rows(g, x, n, group, p_0, p_1, scratch, LANES):
    """Copy the rows of x that outputs ``p_0:p_1`` of an image read."""
    row = p_0 * g.stride_h - g.before_h
    for i in range((p_1 - p_0 - 1) * g.stride_h + g.reach):
        target = at(scratch, i * g.cg * g.pitch)
        if 0 <= row + i < g.h:
            _turn_row(g, at(x, (n * g.h + row + i) * g.w * g.c + group * g.cg), g.cg, target, LANES)
        else:
            fill_zero(target, g.cg * g.pitch)


@device
def _write_row(g, sums, bias, y, LANES):
    """Write a row of sums ``(dg, pitch)`` to y, where channels are side by side, with the bias."""
    for q in range(0, g.q, LANES):
        pixels = min(LANES, g.q - q)
        transpose_exact(at(sums, q), g.pitch, g.dg, pixels, g.add_bias != 0, bias, at(y, q * g.y_q), g.y_q)


@device
def _sum_row(g, packed, pixels, p, sums, LANES):
    """Sum the products of one row of outputs; `pixels` points to its first pixel in the copy of x."""
    r_0, r_1 = inside(p * g.stride_h - g.top, g.h, g.dilation_h, g.R)
    b_row = g.dilation_h * g.cg * g.pitch
    for q in range(0, g.q, g.width):
        c = Rows(at(sums, q), g.pitch)
        for r in range(r_0, max(r_1, r_0 + 1), g.sum_r):
            for k in range(0, g.cg, g.sum_k):
                tile_product(
                    g.tile,
                    g.dg,
                    min(g.width, g.q - q),
                    Sum(min(g.sum_r, r_1 - r), g.Q, min(g.sum_k, g.cg - k)),
                    Operand(at(packed, (r * g.Q * g.cg + k) * LANES), g.Q * g.cg * LANES, g.cg * LANES, 1, LANES),
                    Operand(at(pixels, r * b_row + k * g.pitch + q), b_row, g.dilation_w, 0, g.pitch),
                    r > r_0 or k > 0,
                    c,
                    c,
                    0,
                    no_prefetch(sums),
                )


@cache
def correlate_narrow(LANES: int, ITEMSIZE: int) -> Body:
    """Make the body; it takes x, weights packed as ``(groups, R, Q, cg, LANES)``, the bias, y and scratch."""

    def correlate_narrow(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, Narrow)
        table = integers(operands)
        x, packed = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        bias, y = numbers(table[2], ITEMSIZE), numbers(table[3], ITEMSIZE)
        scratch = at(numbers(table[4], ITEMSIZE), worker * g.scratch)
        sums = at(scratch, g.s_sums)
        if fresh:
            fill_zero(scratch, g.s_sums)
        # the task: rows p_0:p_1 of outputs of a group of image n
        blocks_p = ceil_div(g.rows, g.block_p)
        p_0, rest = task % blocks_p * g.block_p, task // blocks_p
        n, group = rest % g.n, rest // g.n
        p_1 = min(p_0 + g.block_p, g.rows)
        _turn_rows(g, x, n, group, p_0, p_1, scratch, LANES)
        for phase in range(g.phases):
            h = record(geometry, phase, Narrow)
            origin = at(scratch, (h.before_h - h.top) * h.cg * h.pitch + h.before_w - h.left)
            weights = at(packed, h.packed_0 + group * h.R * h.Q * h.cg * LANES)
            for p in range(p_0, min(p_1, h.p)):
                _sum_row(h, weights, at(origin, (p - p_0) * h.stride_h * h.cg * h.pitch), p, sums, LANES)
                channel = group * h.dg
                _write_row(h, sums, at(bias, channel), at(y, h.y_0 + n * h.y_n + p * h.y_p + channel), LANES)

    return Body(correlate_narrow)
