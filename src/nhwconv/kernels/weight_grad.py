"""The weight gradient: for every tap, a matrix product of dy and x whose long axis is the pixels.

    dw[j, r, s, k] = sum over n, p, q of
                     dy[n, p, q, j] * x[n, p*stride - top + r*dilation, q*stride - left + s*dilation, k]

The pixels are cut into slices, each of them into blocks of rows that stay in L2. A slice sums its blocks into a part of
its own; the parts are added in their order. Both cuts follow from the problem, so the bits do too.

Channels of y go on the broadcast side and ``(s, k)`` on the vectors, or the other way round where that takes fewer
cycles (`swap`): then a part is ``(r, s, k, j)`` and is transposed when it is added.
"""

from __future__ import annotations

from functools import cache

from numba import prange

from .correlate import gather_block
from .geometry import Fields, inside
from .jit import Kernel, ceil_div, device, kernel
from .simd import add_rows, copy
from .tasks import next_task
from .tile import tile_product

__all__ = ["SUM_PARTS", "WEIGHT_GRAD", "sum_parts", "weight_grad"]

WEIGHT_GRAD = Fields(
    # sizes: images, groups, x, channels of a group in x and in y, outputs
    "n groups h w c cg dg p q "
    # taps, and how x is read
    "R Q stride_h stride_w dilation_h dilation_w top left "
    # slices of the pixels, rows and columns of a block; rows of taps, channels of y and channels of x of a task
    "slices block_p block_q block_r block_d block_k "
    # `gather` copies a block of x to scratch (as `correlate` does), `gather_dy` one of dy, from `s_dy` on; `ahead` asks
    # for the next block; `swap` is said above; `accumulate` adds to parts
    "gather step_h step_w pixel merged gather_dy s_dy scratch ahead swap accumulate part tasks "
    # the address of the micro-kernel
    "tile"
)


@device
def _gather_dy(g, dy, line, lines, q_0, q_1, channel, channels, scratch, target):
    """Copy a block of dy, some channels of each pixel, to scratch: ``(lines, q_1 - q_0, channels)``."""
    for p in range(lines):
        for q in range(q_0, q_1):
            copy(scratch, target, dy, (line + p * g.q + q) * g.groups * g.dg + channel, channels)
            target += channels


@device
def _multiply(tile, MR, WIDTH, lines, pixels, rows_side, columns_side, parts, c_0, c_m, add, ahead, share):
    """Multiply two sides over a block of pixels.

    A side is an array, an offset, its pitch from line to line and from pixel to pixel, and how many of its numbers take
    part. Meanwhile a share, ``i`` of so many, of what `ahead` describes is asked for: each tile brings a line of every
    pixel.
    """
    x, x_0, x_pixel, x_lines, dy, dy_0, dy_pixel, dy_lines, line = ahead
    i, shares = share
    a, a_0, a_line, a_pixel, rows = rows_side
    b, b_0, b_line, b_pixel, columns = columns_side
    panels = ceil_div(columns, WIDTH)
    fetched = max(ceil_div(rows, MR), (x_lines + dy_lines) // (shares * panels))
    for panel in range(panels):
        j = panel * WIDTH
        first = (i * panels + panel) * fetched
        f, f_0, f_pixel = x, x_0 + first * line, x_pixel
        if first >= x_lines:
            first -= x_lines
            f, f_0, f_pixel = dy, dy_0 + first * line, dy_pixel if first < dy_lines else 0
        tile_product(
            tile, rows, min(WIDTH, columns - j), lines, 1, pixels, a, a_0, a_line, 0, 1, a_pixel,
            b, b_0 + j, b_line, 0, b_pixel, add, parts, c_0 + j, c_m, parts, c_0 + j, c_m, 0, f, f_0, line, f_pixel,
        )  # fmt: skip


@cache
def weight_grad(MR: int, WIDTH: int, LINE: int) -> Kernel:
    """Make the kernel for register tiles of so many columns, and cache lines of so many numbers."""

    def weight_grad(x, dy, parts, bias_parts, scratch, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            D, depth = g.groups * g.dg, g.R * g.Q * g.cg
            blocks_r, blocks_d, blocks_k = (
                ceil_div(g.R, g.block_r),
                ceil_div(g.dg, g.block_d),
                ceil_div(g.cg, g.block_k),
            )
            s_0 = worker * g.scratch
            s_dy = s_0 + g.s_dy
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                # the task: taps r_0:r_1, channels d_0:d_1 and k_0:k_1 of a group, and a slice of the rows of all images
                d_0, rest = task % blocks_d * g.block_d, task // blocks_d
                k_0, rest = rest % blocks_k * g.block_k, rest // blocks_k
                r_0, rest = rest % blocks_r * g.block_r, rest // blocks_r
                group, piece = rest % g.groups, rest // g.groups
                r_1, d_1, k_1 = min(r_0 + g.block_r, g.R), min(d_0 + g.block_d, g.dg), min(k_0 + g.block_k, g.cg)
                runs, run = (1, g.Q * g.cg) if g.merged else (g.Q, k_1 - k_0)
                next_line, last = piece * g.n * g.p // g.slices, (piece + 1) * g.n * g.p // g.slices
                add = g.accumulate != 0
                while next_line < last:
                    n, p_0 = next_line // g.p, next_line % g.p
                    p_1 = min(p_0 + g.block_p, g.p, p_0 + last - next_line)
                    next_line += p_1 - p_0
                    for q_0 in range(0, g.q, g.block_q):
                        q_1 = min(q_0 + g.block_q, g.q)
                        row, column = p_0 * g.stride_h - g.top + r_0 * g.dilation_h, q_0 * g.stride_w - g.left
                        a, a_0, pixel, pitch, down, right = x, 0, g.c, g.w * g.c, g.stride_h, g.stride_w
                        if g.gather:
                            down, right = g.stride_h // g.step_h, g.stride_w // g.step_w
                            rows = (p_1 - p_0 - 1) * down + (r_1 - r_0 - 1) * g.dilation_h + 1
                            columns = (q_1 - q_0 - 1) * right + (g.Q - 1) * g.dilation_w + 1
                            pixel, pitch = g.pixel, columns * g.pixel
                            gather_block(
                                g, x, n, row, rows, column, columns, group * g.cg + k_0, k_1 - k_0, scratch, s_0
                            )
                            a, a_0 = scratch, s_0
                        else:
                            a_0 = ((n * g.h + row) * g.w + column) * g.c + group * g.cg + k_0
                        b, b_0, b_pixel, b_pitch = dy, 0, D, g.q * D
                        if g.gather_dy:
                            b_pixel, b_pitch = d_1 - d_0, (q_1 - q_0) * (d_1 - d_0)
                            _gather_dy(g, dy, (n * g.p + p_0) * g.q, p_1 - p_0, q_0, q_1, group * g.dg + d_0, b_pixel,
                                       scratch, s_dy)  # fmt: skip
                            b, b_0 = scratch, s_dy
                        else:
                            b_0 = ((n * g.p + p_0) * g.q + q_0) * D + group * g.dg + d_0
                        if bias_parts.size and r_0 == 0 and k_0 == 0:  # each pixel of dy once, while it is in cache
                            for line in range(p_1 - p_0):
                                add_rows(
                                    b, b_0 + line * b_pitch, b_pixel, q_1 - q_0, d_1 - d_0,
                                    bias_parts, piece * D + group * g.dg + d_0,
                                )  # fmt: skip
                        # what the next block reads
                        next_q, next_p = q_0 + g.block_q, n * g.p + p_0
                        if next_q >= g.q:
                            next_q, next_p = 0, next_line
                        ahead = x, 0, 0, 0, dy, 0, 0, 0, 0
                        if g.ahead and next_p < last:
                            next_row = next_p // g.p * g.h + next_p % g.p - g.top + r_0 * g.dilation_h
                            ahead = (
                                x, (next_row * g.w + next_q - g.left) * g.c + group * g.cg + k_0, g.c,
                                (k_1 - k_0) // LINE,
                                dy, (next_p * g.q + next_q) * D + group * g.dg + d_0, D, (d_1 - d_0) // LINE, LINE,
                            )  # fmt: skip
                        for r in range(r_0, r_1):
                            # Lines of dy that meet this row of taps in the padding are left out.
                            first, end = inside(p_0 * g.stride_h - g.top + r * g.dilation_h, g.h, g.stride_h, p_1 - p_0)
                            for s in range(runs):
                                a_s = a_0 + (r - r_0) * g.dilation_h * pitch + s * g.dilation_w * pixel
                                tap = (r * g.Q + s) * g.cg + k_0
                                x_side = a, a_s + first * down * pitch, down * pitch, right * pixel, run
                                dy_side = b, b_0 + first * b_pitch, b_pitch, b_pixel, d_1 - d_0
                                if g.swap:
                                    rows_side, columns_side = x_side, dy_side
                                    c_0, c_m = (group * depth + tap) * g.dg + d_0, g.dg
                                else:
                                    rows_side, columns_side = dy_side, x_side
                                    c_0, c_m = (group * g.dg + d_0) * depth + tap, depth
                                _multiply(
                                    g.tile, MR, WIDTH, end - first, q_1 - q_0, rows_side, columns_side,
                                    parts, piece * g.part + c_0, c_m, add,
                                    ahead, ((r - r_0) * runs + s, (r_1 - r_0) * runs),
                                )  # fmt: skip
                        add = True

    return kernel(weight_grad)


#: slices parts of `part` numbers; swap: each is (groups, depth, dg) and dw is (groups, dg, depth).
SUM_PARTS = Fields("slices part groups depth dg swap accumulate tasks")


@cache
def sum_parts() -> Kernel:
    """Make the kernel that adds the parts of all slices, in their order, into dw."""

    def sum_parts(parts, dw, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            while True:
                task = next_task(queue, worker, workers, g.tasks)
                if task >= g.tasks:
                    break
                # a task is one channel of y: `depth` numbers of dw
                start = task * g.depth
                group, j = task // g.dg, task % g.dg
                row = dw[start : start + g.depth]
                if not g.accumulate:
                    row[:] = 0
                for piece in range(g.slices):
                    part = parts[piece * g.part : (piece + 1) * g.part]
                    if g.swap:
                        for k in range(g.depth):
                            row[k] += part[(group * g.depth + k) * g.dg + j]
                    else:
                        part = part[start : start + g.depth]
                        for k in range(g.depth):
                            row[k] += part[k]

    return kernel(sum_parts)
