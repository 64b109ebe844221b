"""The correlation of `nhwconv.kernels.correlate` for few output channels: pixels on the vectors, not channels.

Input gradients of image layers have three output channels, which would leave most of a vector empty. Here a task copies
its rows of x with pixels side by side, ``(rows, channels, columns)``, and a register tile is a few output channels
times a run of pixels of one row. Outputs are a stride apart in y, never in x: ``stride_w`` is one.

All phases of a strided input gradient read the same rows of dy, so one copy serves them: there is a record of the
geometry for each.
"""

from __future__ import annotations

from functools import cache

from numba import prange

from .geometry import Fields, inside
from .jit import Kernel, ceil_div, device, kernel
from .simd import copy, fill_zero, transpose, transpose_exact
from .tasks import next_task
from .tile import tile_product

__all__ = ["NARROW", "correlate_narrow"]

NARROW = Fields(
    # of all phases
    # sizes: images, groups, x, channels of a group in x and in y; how x is read
    "n groups h w c cg dg stride_h dilation_h dilation_w "
    # most rows of outputs, those of a task, and how far it reads: x is copied from `before_h` rows and `before_w`
    # columns before an output's place on, and over `reach` rows for each output
    "rows block_p before_h before_w reach "
    # columns of the copy of x; where a row of sums is, and the size of scratch
    "pitch s_sums scratch tasks add_bias "
    # the micro-kernel's address, and the columns of its register tile
    "tile width "
    # of one phase
    # taps, their borders, and where their weights are
    "R Q top left packed_0 "
    # the grid of outputs, and where they lie in y, in elements
    "p q y_0 y_n y_p y_q "
    # rows of taps, and channels, that are summed at a time
    "sum_r sum_k"
)


@device
def _turn_row(g, x, x_row, channels, scratch, target, LANES):
    """Copy a row of x with pixels side by side: ``(channels, pitch)``; what is left and right of it stays zero."""
    first, last = max(0, -g.before_w), min(g.w, g.pitch - LANES - g.before_w)
    if g.c == 1:
        copy(scratch, target + g.before_w + first, x, x_row + first, max(0, last - first))
        return
    for j in range(first, last, LANES):
        pixels = min(LANES, last - j)
        for k in range(0, channels, LANES):
            transpose(
                x, x_row + j * g.c + k, g.c, pixels, min(LANES, channels - k),
                scratch, target + k * g.pitch + g.before_w + j, g.pitch,
            )  # fmt: skip


@device
def _write_row(g, scratch, source, bias, channel, y, target, LANES):
    """Write a row of sums ``(dg, pitch)`` to y, where channels are side by side, with the bias."""
    for q in range(0, g.q, LANES):
        transpose_exact(
            scratch, source + q, g.pitch, g.dg, min(LANES, g.q - q), g.add_bias != 0, bias, channel,
            y, target + q * g.y_q, g.y_q,
        )  # fmt: skip


@cache
def correlate_narrow(LANES: int) -> Kernel:
    """Make the kernel. Weights are packed as ``(groups, R, Q, cg, LANES)``, one panel a group."""

    def correlate_narrow(x, packed, bias, y, scratch, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            blocks_p = ceil_div(g.rows, g.block_p)
            s_0 = worker * g.scratch
            s_sums = s_0 + g.s_sums
            fill_zero(scratch, s_0, g.s_sums)
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                # the task: rows p_0:p_1 of outputs of a group of image n
                p_0, rest = task % blocks_p * g.block_p, task // blocks_p
                n, group = rest % g.n, rest // g.n
                p_1 = min(p_0 + g.block_p, g.rows)
                row = p_0 * g.stride_h - g.before_h
                for i in range((p_1 - p_0 - 1) * g.stride_h + g.reach):
                    target = s_0 + i * g.cg * g.pitch
                    if 0 <= row + i < g.h:
                        x_row = (n * g.h + row + i) * g.w * g.c + group * g.cg
                        _turn_row(g, x, x_row, g.cg, scratch, target, LANES)
                    else:
                        fill_zero(scratch, target, g.cg * g.pitch)
                for phase in range(len(geometry)):
                    h = geometry[phase]
                    s_x = s_0 + (h.before_h - h.top) * h.cg * h.pitch + h.before_w - h.left
                    for p in range(p_0, min(p_1, h.p)):
                        r_0, r_1 = inside(p * h.stride_h - h.top, h.h, h.dilation_h, h.R)
                        b_p = s_x + (p - p_0) * h.stride_h * h.cg * h.pitch
                        for q in range(0, h.q, h.width):
                            c_0 = s_sums + q
                            for r in range(r_0, max(r_1, r_0 + 1), h.sum_r):
                                for k in range(0, h.cg, h.sum_k):
                                    tile_product(
                                        h.tile, h.dg, min(h.width, h.q - q),
                                        min(h.sum_r, r_1 - r), h.Q, min(h.sum_k, h.cg - k),
                                        packed, h.packed_0 + ((group * h.R + r) * h.Q * h.cg + k) * LANES,
                                        h.Q * h.cg * LANES, h.cg * LANES, 1, LANES,
                                        scratch, b_p + (r * h.dilation_h * h.cg + k) * h.pitch + q,
                                        h.dilation_h * h.cg * h.pitch, h.dilation_w, h.pitch,
                                        r > r_0 or k > 0, scratch, c_0, h.pitch, scratch, c_0, h.pitch, 0,
                                        scratch, 0, 0, 0,
                                    )  # fmt: skip
                        y_p = h.y_0 + n * h.y_n + p * h.y_p + group * h.dg
                        _write_row(h, scratch, s_sums, bias, group * h.dg, y, y_p, LANES)

    return kernel(correlate_narrow)
