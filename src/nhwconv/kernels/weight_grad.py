"""The weight gradient: for every tap, a matrix product of dy and x whose long axis is the pixels.

    dw[j, r, s, k] = sum over n, p, q of dy[n, p, q, j] * x[n, p*stride - top + r*dilation, q*stride - left + s*dilation, k]

The pixels are cut into slices, each of them into blocks of rows that stay in L2. A slice sums its blocks into a part of
its own; the parts are added in their order. Both cuts follow from the problem, so the bits do too.

Channels of y go on the broadcast side and ``(s, k)`` on the vectors, or the other way round where a row of taps has
fewer numbers than a vector has lanes (`swap`): then a part is ``(r, s, k, j)`` and is transposed when it is added.
"""

from __future__ import annotations

from functools import cache

from numba import prange

from .correlate import gather_block
from .geometry import Fields
from .jit import Kernel, kernel
from .simd import fetch_add
from .tile import tile_product

__all__ = ["SUM_PARTS", "WEIGHT_GRAD", "sum_parts", "weight_grad"]

WEIGHT_GRAD = Fields(
    # sizes: images, groups, x, channels of a group in x and in y, outputs
    "n groups h w c cg dg p q "
    # taps, and how x is read
    "R Q stride_h stride_w dilation_h dilation_w top left "
    # slices of the pixels, rows and columns of a block, rows of taps and channels of y of a task
    "slices block_p block_q block_r block_d "
    # `gather` copies a block of x to scratch; `swap` is said above; `accumulate` adds to what a part holds
    "gather scratch swap accumulate part tasks"
)


@cache
def weight_grad(MR: int, NR: int, LANES: int) -> Kernel:
    """Make the kernel for one register tile."""
    WIDTH = NR * LANES

    def weight_grad(x, dy, parts, scratch, queue, workers, geometry):
        for worker in prange(workers):
            g = geometry[0]
            D = g.groups * g.dg
            merged = g.dilation_w == 1 and (g.gather or g.groups == 1)
            runs, run = (1, g.Q * g.cg) if merged else (g.Q, g.cg)
            blocks_r, blocks_d = (g.R + g.block_r - 1) // g.block_r, (g.dg + g.block_d - 1) // g.block_d
            s_0 = worker * g.scratch
            while True:
                task = fetch_add(queue)
                if task >= g.tasks:
                    break
                # the task: taps r_0:r_1, channels d_0:d_1 of a group, and a slice of the rows of all images
                d_0, rest = task % blocks_d * g.block_d, task // blocks_d
                r_0, rest = rest % blocks_r * g.block_r, rest // blocks_r
                group, piece = rest % g.groups, rest // g.groups
                r_1, d_1 = min(r_0 + g.block_r, g.R), min(d_0 + g.block_d, g.dg)
                line, last = piece * g.n * g.p // g.slices, (piece + 1) * g.n * g.p // g.slices
                first = True
                while line < last:
                    n, p_0 = line // g.p, line % g.p
                    p_1 = min(p_0 + g.block_p, g.p, p_0 + last - line)
                    for q_0 in range(0, g.q, g.block_q):
                        q_1 = min(q_0 + g.block_q, g.q)
                        row = p_0 * g.stride_h - g.top + r_0 * g.dilation_h
                        column = q_0 * g.stride_w - g.left
                        if g.gather:
                            rows = (p_1 - p_0 - 1) * g.stride_h + (r_1 - r_0 - 1) * g.dilation_h + 1
                            columns = (q_1 - q_0 - 1) * g.stride_w + (g.Q - 1) * g.dilation_w + 1
                            gather_block(g, x, n, group, row, rows, column, columns, scratch, s_0)
                            a, a_0, pixel, pitch = scratch, s_0, g.cg, columns * g.cg
                        else:
                            a, a_0 = x, ((n * g.h + row) * g.w + column) * g.c + group * g.cg
                            pixel, pitch = g.c, g.w * g.c
                        dy_0 = ((n * g.p + p_0) * g.q + q_0) * D + group * g.dg
                        add = g.accumulate or not first
                        first = False
                        for r in range(r_0, r_1):
                            for s in range(runs):
                                a_s = a_0 + (r - r_0) * g.dilation_h * pitch + s * g.dilation_w * pixel
                                tap = r * g.Q * g.cg + s * run
                                if g.swap:
                                    c_0 = piece * g.part + (group * g.R * g.Q * g.cg + tap) * g.dg
                                    tiles = (run + MR - 1) // MR
                                    for j in range(d_0, d_1, WIDTH):
                                        for t in range(tiles):
                                            m_0, m_1 = t * run // tiles, (t + 1) * run // tiles
                                            c_t = c_0 + m_0 * g.dg + j
                                            tile_product(
                                                MR, NR, 1, m_1 - m_0, min(WIDTH, d_1 - j), p_1 - p_0, 1, q_1 - q_0,
                                                a, a_s + m_0, g.stride_h * pitch, 0, 1, g.stride_w * pixel,
                                                dy, dy_0 + j, g.q * D, 0, D,
                                                add, parts, c_t, g.dg, parts, c_t, g.dg,
                                            )  # fmt: skip
                                else:
                                    depth = g.R * g.Q * g.cg
                                    c_0 = piece * g.part + group * g.dg * depth + tap
                                    tiles = (d_1 - d_0 + MR - 1) // MR
                                    for j in range(0, run, WIDTH):
                                        for t in range(tiles):
                                            m_0 = d_0 + t * (d_1 - d_0) // tiles
                                            m_1 = d_0 + (t + 1) * (d_1 - d_0) // tiles
                                            c_t = c_0 + m_0 * depth + j
                                            tile_product(
                                                MR, NR, 1, m_1 - m_0, min(WIDTH, run - j), p_1 - p_0, 1, q_1 - q_0,
                                                dy, dy_0 + m_0, g.q * D, 0, 1, D,
                                                a, a_s + j, g.stride_h * pitch, 0, g.stride_w * pixel,
                                                add, parts, c_t, depth, parts, c_t, depth,
                                            )  # fmt: skip
                    line += p_1 - p_0

    return kernel(weight_grad)


#: slices parts of `part` numbers; swap: each is (groups, depth, dg) and dw is (groups, dg, depth).
SUM_PARTS = Fields("slices part groups depth dg swap accumulate tasks")


@cache
def sum_parts() -> Kernel:
    """Make the kernel that adds the parts of all slices, in their order, into dw."""

    def sum_parts(parts, dw, queue, workers, geometry):
        for _worker in prange(workers):
            g = geometry[0]
            while True:
                task = fetch_add(queue)
                if task >= g.tasks:
                    break
                # a task is one channel of y: `depth` numbers of dw
                start = task * g.depth
                group, j = task // g.dg, task % g.dg
                source, step = (group * g.depth * g.dg + j, g.dg) if g.swap else (start, 1)
                for piece in range(g.slices):
                    if piece == 0 and not g.accumulate:
                        for k in range(g.depth):
                            dw[start + k] = parts[source + k * step]
                    else:
                        for k in range(g.depth):
                            dw[start + k] += parts[source + piece * g.part + k * step]

    return kernel(sum_parts)
