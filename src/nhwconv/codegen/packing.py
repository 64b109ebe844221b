"""Weights in the order in which the micro-kernel reads them: panels of NR vectors, one row a step of the sum.

``packed[group][panel][r][q][k][j]``: a panel holds the columns ``j`` of one register tile for every tap ``(r, q)`` and
every step ``k``. All panels of a group are WIDTH columns wide, the last as many whole vectors as it needs; columns
past the end are zero.

A step packs the weights of all phases of a pass, one record each.
"""

from __future__ import annotations

from functools import cache

from ..runtime.jit import Body, ceil_div, device
from ..runtime.records import Share, record, record_of_task
from .simd import at, copy, fill_zero, integers, numbers, transpose

__all__ = ["Packing", "pack", "pack_columns", "pack_rows", "packed_size"]


class Packing(Share):
    """How the weights of one correlation are packed; a task is a tap of a panel."""

    groups: int
    columns: int  #: of one group and tap
    steps: int
    R: int  #: rows of taps, and taps of a row
    Q: int
    w_0: int  #: the first tap in w, and w's strides, in elements
    w_g: int
    w_j: int
    w_k: int
    w_r: int
    w_q: int
    packed_0: int  #: where the packed weights start


def packed_size(groups: int, columns: int, depth: int, lanes: int) -> int:
    """Return the elements of packed weights: `depth` rows of whole vectors for each group."""
    return groups * depth * (-(-columns // lanes) * lanes)


@device
def _panel_of_task(g, task, WIDTH, LANES):
    """Decode a task, which is one tap of one panel: its first column, offset in w, offset in packed, and width."""
    panels = ceil_div(g.columns, WIDTH)
    tap, rest = task % (g.R * g.Q), task // (g.R * g.Q)
    j, group = rest % panels * WIDTH, rest // panels
    width = min(WIDTH, ceil_div(g.columns - j, LANES) * LANES)
    depth = g.R * g.Q * g.steps
    padded = ceil_div(g.columns, LANES) * LANES
    source = g.w_0 + group * g.w_g + j * g.w_j + tap // g.Q * g.w_r + tap % g.Q * g.w_q
    target = g.packed_0 + (group * padded + j) * depth + tap * g.steps * width
    return j, source, target, width


def pack(backward: bool, weights: str, width: int, lanes: int, itemsize: int) -> Body:
    """Return the body for weights that lie so, and whose channels of y (or of x, backwards) are the columns."""
    return (pack_rows if backward != (weights == "HWIO") else pack_columns)(width, lanes, itemsize)


@cache
def pack_columns(WIDTH: int, LANES: int, ITEMSIZE: int) -> Body:
    """Pack w whose steps ``k`` are contiguous (``w_k = 1``): every LANES x LANES block is transposed."""

    def pack_columns(operands, geometry, worker, task, fresh):
        g = record(geometry, record_of_task(geometry, task, Packing), Packing)
        table = integers(operands)
        w, packed = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        j, source, target, width = _panel_of_task(g, task - g.first_task, WIDTH, LANES)
        for v in range(0, width, LANES):
            rows = min(LANES, g.columns - j - v)
            for k in range(0, g.steps, LANES):
                columns = min(LANES, g.steps - k)
                block = at(w, source + v * g.w_j + k)
                transpose(block, g.w_j, rows, columns, at(packed, target + k * width + v), width)

    return Body(pack_columns)


@cache
def pack_rows(WIDTH: int, LANES: int, ITEMSIZE: int) -> Body:
    """Pack w whose columns ``j`` are contiguous (``w_j = 1``): every row is copied."""

    def pack_rows(operands, geometry, worker, task, fresh):
        g = record(geometry, record_of_task(geometry, task, Packing), Packing)
        table = integers(operands)
        w, packed = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        j, source, target, width = _panel_of_task(g, task - g.first_task, WIDTH, LANES)
        columns = min(width, g.columns - j)
        for k in range(g.steps):
            row = at(packed, target + k * width)
            copy(row, at(w, source + k * g.w_k), columns)
            if columns < width:
                fill_zero(at(row, columns), width - columns)

    return Body(pack_rows)
