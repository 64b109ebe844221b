"""The correlation of images with packed weights: the forward pass, and the input gradient phase by phase.

    y[n, p, q, j] = sum over r < R, s < Q, k < cg of
                    x[n, p*stride - top + r*dilation, q*stride - left + s*dilation, k] * packed[r, s, k, j]  (+ bias[j])

for the channels of each group; pixels outside x are zero. y is written through strides, so that a phase of the input
gradient writes every stride-th pixel. `top` and `left` may be negative.
"""

from __future__ import annotations

from functools import cache

from numba import prange

from .geometry import Fields, inside
from .jit import Kernel, ceil_div, device, kernel
from .simd import copy, fill_zero
from .tasks import next_task
from .tile import tile_product

__all__ = ["CORRELATE", "correlate", "gather_block"]

CORRELATE = Fields(
    # sizes: images, groups, x, channels of a group in x and in y
    "n groups h w c cg dg "
    # taps, and how x is read
    "R Q stride_h stride_w dilation_h dilation_w top left "
    # the grid of outputs, and where they lie in y, in elements
    "p q y_0 y_n y_p y_q "
    # one task: block_p rows of outputs, block_q of a row, block_d channels; `d_first` takes all channels of the same
    # outputs one after the other
    "block_p block_q block_d d_first tasks add_bias stream "
    # `gather` copies what a task reads of x to scratch: every step-th row and column, pixels so many elements apart
    "gather step_h step_w pixel scratch "
    # a row of taps is one run where pixels are contiguous, otherwise a run for each tap
    "merged "
    # rows of taps, and steps of a run, that are summed at a time
    "sum_r sum_k "
    # the address of the micro-kernel
    "tile"
)


#: Tiles whose sums are kept from block to block of the sum.
STRIP_TILES = 6


@device
def _gather_row(g, x, x_row, first, count, channels, scratch, target):
    """Copy `count` columns of a row of x from `first` on, some channels of each, zeros where they are outside."""
    before = min(max(ceil_div(-first, g.step_w), 0), count)
    inside = max(min(ceil_div(g.w - first, g.step_w), count) - before, 0)
    after = count - before - inside
    fill_zero(scratch, target, before * g.pixel)
    target += before * g.pixel
    source, step = x_row + (first + before * g.step_w) * g.c, g.step_w * g.c
    if channels == step and channels == g.pixel:
        copy(scratch, target, x, source, inside * channels)
    elif channels < 8:
        for i in range(inside):
            for k in range(channels):
                scratch[target + i * g.pixel + k] = x[source + i * step + k]
    else:
        for i in range(inside):
            copy(scratch, target + i * g.pixel, x, source + i * step, channels)
    fill_zero(scratch, target + inside * g.pixel, after * g.pixel)


@device
def gather_block(g, x, n, row, rows, column, columns, channel, channels, scratch, s_0):
    """Copy a part of image n to scratch, as ``(rows, columns, pixel)``: zeros for columns outside, nothing for rows."""
    pitch = columns * g.pixel
    for i in range(rows):
        target, source = s_0 + i * pitch, row + i * g.step_h
        if 0 <= source < g.h:
            _gather_row(g, x, (n * g.h + source) * g.w * g.c + channel, column, columns, channels, scratch, target)


@cache
def correlate(MR: int, NR: int, LANES: int) -> Kernel:
    """Make the kernel for one register tile."""
    WIDTH, LINE, STRIP = NR * LANES, LANES, STRIP_TILES * MR

    def correlate(x, packed, bias, y, scratch, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            blocks_p, blocks_q, blocks_d = ceil_div(g.p, g.block_p), ceil_div(g.q, g.block_q), ceil_div(g.dg, g.block_d)
            blocks = g.tasks // blocks_d
            depth = g.R * g.Q * g.cg
            padded = ceil_div(g.dg, LANES) * LANES
            Q, K = (1, g.Q * g.cg) if g.merged else (g.Q, g.cg)
            s_0 = worker * g.scratch
            held = -1  # the block whose x is in scratch
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                # the task: outputs p_0:p_1 x q_0:q_1, channels d_0:d_1 of a group, of image n
                block, d_0 = (task // blocks_d, task % blocks_d) if g.d_first else (task % blocks, task // blocks)
                d_0 *= g.block_d
                q_0, rest = block % blocks_q * g.block_q, block // blocks_q
                p_0, rest = rest % blocks_p * g.block_p, rest // blocks_p
                n, group = rest % g.n, rest // g.n
                p_1, q_1 = min(p_0 + g.block_p, g.p), min(q_0 + g.block_q, g.q)
                d_1 = min(d_0 + g.block_d, g.dg)
                if depth == 0:  # no taps: the phase of an input gradient that nothing flows to
                    for p in range(p_0, p_1):
                        for q in range(q_0, q_1):
                            y_q = g.y_0 + n * g.y_n + p * g.y_p + q * g.y_q
                            fill_zero(y, y_q + group * g.dg + d_0, d_1 - d_0)
                    continue
                row, column = p_0 * g.stride_h - g.top, q_0 * g.stride_w - g.left
                if g.gather:
                    down, right = g.stride_h // g.step_h, g.stride_w // g.step_w
                    rows = (p_1 - p_0 - 1) * down + (g.R - 1) * g.dilation_h + 1
                    columns = (q_1 - q_0 - 1) * right + (g.Q - 1) * g.dilation_w + 1
                    if block != held:
                        gather_block(g, x, n, row, rows, column, columns, group * g.cg, g.cg, scratch, s_0)
                        held = block
                    a, a_0, pixel, pitch = scratch, s_0, g.pixel, columns * g.pixel
                else:
                    down, right = g.stride_h, g.stride_w
                    a, a_0 = x, ((n * g.h + row) * g.w + column) * g.c + group * g.cg
                    pixel, pitch = g.c, g.w * g.c
                # Where a tile's pixels are one run of memory, the first panel brings the next tile's.
                line = LINE if not g.gather and g.R * g.Q * g.stride_w == 1 else 0
                for j in range(d_0, d_1, WIDTH):
                    width = min(WIDTH, ceil_div(g.dg - j, LANES) * LANES)
                    b_0 = (group * padded + j) * depth
                    channel = group * g.dg + j
                    step = line if j == d_0 else 0
                    for p in range(p_0, p_1):
                        # Rows of taps in the padding are left out.
                        r_0, r_1 = inside(p * g.stride_h - g.top, g.h, g.dilation_h, g.R)
                        # Of a sum of many blocks, a strip of tiles stays in L1 from one block to the next.
                        strip = STRIP if g.sum_r < g.R or g.sum_k < K else q_1 - q_0
                        for q in range(q_0, q_1, strip):
                            a_q = a_0 + (p - p_0) * down * pitch + (q - q_0) * right * pixel
                            y_q = g.y_0 + n * g.y_n + p * g.y_p + q * g.y_q + channel
                            count = min(strip, q_1 - q)
                            next_tile = ceil_div(count, ceil_div(count, MR)) * pixel
                            # Long sums are sums of blocks, which round less.
                            for r in range(r_0, max(r_1, r_0 + 1), g.sum_r):
                                for k in range(0, K, g.sum_k):
                                    last = r + g.sum_r >= r_1 and k + g.sum_k >= K
                                    e, e_0, e_m, add = bias, channel, 0, g.add_bias != 0
                                    if r > r_0 or k > 0:
                                        e, e_0, e_m, add = y, y_q, g.y_q, True
                                    tile_product(
                                        g.tile, count, min(WIDTH, d_1 - j),
                                        min(g.sum_r, r_1 - r), Q, min(g.sum_k, K - k),
                                        a, a_q + r * g.dilation_h * pitch + k,
                                        g.dilation_h * pitch, g.dilation_w * pixel, right * pixel, 1,
                                        packed, b_0 + (r * g.Q * g.cg + k) * width,
                                        g.Q * g.cg * width, g.cg * width, width,
                                        add, e, e_0, e_m, y, y_q, g.y_q, g.stream if last else 0,
                                        a, a_q + next_tile + k * step, next_tile, step,
                                    )  # fmt: skip

    return kernel(correlate)
