"""The correlation of `nhwconv.kernels.correlate` for few output channels: pixels on the vectors, not channels.

Input gradients of image layers have three output channels, which would leave most of a vector empty. Here a task copies
its rows of x with pixels side by side, ``(rows, channels, columns)``, and a register tile is a few output channels
times a run of pixels of one row. Outputs are a stride apart in y, never in x: ``stride_w`` is one.
"""

from __future__ import annotations

from functools import cache

from numba import prange

from .geometry import Fields
from .jit import Kernel, ceil_div, device, kernel
from .simd import copy, fill_zero, transpose, transpose_exact
from .tasks import next_task
from .tile import tile_product

__all__ = ["NARROW", "correlate_narrow"]

NARROW = Fields(
    # sizes: images, groups, x, channels of a group in x and in y
    "n groups h w c cg dg "
    # taps, and how x is read
    "R Q stride_h dilation_h dilation_w top left "
    # the grid of outputs, and where they lie in y, in elements
    "p q y_0 y_n y_p y_q "
    # rows of outputs of a task; columns of its copy of x; where its sums are, and the size of its scratch
    "block_p pitch s_sums scratch tasks add_bias "
    # rows of taps, and channels, that are summed at a time
    "sum_r sum_k "
    # the micro-kernel's address, and the columns of its register tile
    "tile width"
)


@device
def _turn_row(g, x, x_row, channels, scratch, target, LANES):
    """Copy a row of x with pixels side by side: ``(channels, pitch)``; what is left and right of it stays zero."""
    first, last = max(0, -g.left), min(g.w, g.pitch - LANES - g.left)
    if g.c == 1:
        copy(scratch, target + g.left + first, x, x_row + first, max(0, last - first))
        return
    for j in range(first, last, LANES):
        pixels = min(LANES, last - j)
        for k in range(0, channels, LANES):
            transpose(
                x, x_row + j * g.c + k, g.c, pixels, min(LANES, channels - k),
                scratch, target + k * g.pitch + g.left + j, g.pitch,
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
            blocks_p = ceil_div(g.p, g.block_p)
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
                p_1 = min(p_0 + g.block_p, g.p)
                row = p_0 * g.stride_h - g.top
                rows = (p_1 - p_0 - 1) * g.stride_h + (g.R - 1) * g.dilation_h + 1
                for i in range(rows):
                    target = s_0 + i * g.cg * g.pitch
                    if 0 <= row + i < g.h:
                        x_row = (n * g.h + row + i) * g.w * g.c + group * g.cg
                        _turn_row(g, x, x_row, g.cg, scratch, target, LANES)
                    else:
                        fill_zero(scratch, target, g.cg * g.pitch)
                for p in range(p_0, p_1):
                    b_p = s_0 + (p - p_0) * g.stride_h * g.cg * g.pitch
                    for q in range(0, g.q, g.width):
                        c_0 = s_sums + q
                        for r in range(0, max(g.R, 1), g.sum_r):
                            for k in range(0, g.cg, g.sum_k):
                                tile_product(
                                    g.tile, g.dg, min(g.width, g.q - q),
                                    min(g.sum_r, g.R - r), g.Q, min(g.sum_k, g.cg - k),
                                    packed, ((group * g.R + r) * g.Q * g.cg + k) * LANES,
                                    g.Q * g.cg * LANES, g.cg * LANES, 1, LANES,
                                    scratch, b_p + (r * g.dilation_h * g.cg + k) * g.pitch + q,
                                    g.dilation_h * g.cg * g.pitch, g.dilation_w, g.pitch,
                                    r + k > 0, scratch, c_0, g.pitch, scratch, c_0, g.pitch, 0, scratch, 0, 0, 0,
                                )  # fmt: skip
                    y_p = g.y_0 + n * g.y_n + p * g.y_p + group * g.dg
                    _write_row(g, scratch, s_sums, bias, group * g.dg, y, y_p, LANES)

    return kernel(correlate_narrow)
