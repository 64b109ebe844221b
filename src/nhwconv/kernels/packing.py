"""Weights in the order in which the micro-kernel reads them: panels of NR vectors, one row a step of the sum.

``packed[group][panel][r][q][k][j]``: a panel holds the columns ``j`` of one register tile for every tap ``(r, q)`` and
every step ``k``. All panels of a group are WIDTH columns wide, the last as many whole vectors as it needs; columns
past the end are zero.
"""

from __future__ import annotations

from functools import cache

from numba import prange

from .geometry import Fields
from .jit import Kernel, ceil_div, device, kernel
from .simd import copy, fill_zero, transpose
from .tasks import next_task

__all__ = ["PACK", "pack_columns", "pack_rows", "packed_size"]

#: columns, steps: of one group and tap. R, Q: taps. w_*: strides of w, in elements, and w_0 its first tap. packed_0:
#: where the packed weights start.
PACK = Fields("groups columns steps R Q w_0 w_g w_j w_k w_r w_q packed_0 tasks")


def packed_size(groups: int, columns: int, depth: int, lanes: int) -> int:
    """Return the elements of packed weights: `depth` rows of whole vectors for each group."""
    return groups * depth * (-(-columns // lanes) * lanes)


@device
def _panel_width(columns, j, WIDTH, LANES):
    """Columns of the panel that starts at column j, in whole vectors."""
    return min(WIDTH, ceil_div(columns - j, LANES) * LANES)


@device
def _panel_of_task(g, task, WIDTH, LANES):
    """Decode a task, which is one tap of one panel: its first column, offset in w, offset in packed, and width."""
    panels = ceil_div(g.columns, WIDTH)
    tap, rest = task % (g.R * g.Q), task // (g.R * g.Q)
    j, group = rest % panels * WIDTH, rest // panels
    width = _panel_width(g.columns, j, WIDTH, LANES)
    depth = g.R * g.Q * g.steps
    padded = ceil_div(g.columns, LANES) * LANES
    source = g.w_0 + group * g.w_g + j * g.w_j + tap // g.Q * g.w_r + tap % g.Q * g.w_q
    target = g.packed_0 + (group * padded + j) * depth + tap * g.steps * width
    return j, source, target, width


@cache
def pack_columns(WIDTH: int, LANES: int) -> Kernel:
    """Pack w whose steps ``k`` are contiguous (``w_k = 1``): every LANES x LANES block is transposed."""

    def pack_columns(w, packed, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                j, source, target, width = _panel_of_task(g, task, WIDTH, LANES)
                for v in range(0, width, LANES):
                    rows = min(LANES, g.columns - j - v)
                    for k in range(0, g.steps, LANES):
                        columns = min(LANES, g.steps - k)
                        transpose(
                            w, source + v * g.w_j + k, g.w_j, rows, columns, packed, target + k * width + v, width
                        )

    return kernel(pack_columns)


@cache
def pack_rows(WIDTH: int, LANES: int) -> Kernel:
    """Pack w whose columns ``j`` are contiguous (``w_j = 1``): every row is copied."""

    def pack_rows(w, packed, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                j, source, target, width = _panel_of_task(g, task, WIDTH, LANES)
                columns = min(width, g.columns - j)
                for k in range(g.steps):
                    copy(packed, target + k * width, w, source + k * g.w_k, columns)
                    if columns < width:
                        fill_zero(packed, target + k * width + columns, width - columns)

    return kernel(pack_rows)
