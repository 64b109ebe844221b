"""The weight gradient: for every tap, a matrix product of dy and x whose long axis is the pixels.

    dw[j, r, s, k] = sum over n, p, q of
                     dy[n, p, q, j] * x[n, p*stride - top + r*dilation, q*stride - left + s*dilation, k]

The pixels are cut into slices, each of them into blocks of rows that stay in L2. A slice sums its blocks into a part of
its own; the parts are added in their order. Both cuts follow from the problem, so the bits do too.

Channels of y go on the broadcast side and ``(s, k)`` on the vectors, or the other way round where that takes fewer
cycles (`swap`): then a part is ``(r, s, k, j)`` and is transposed when it is added.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from ...codegen.native import Pointer
from ...codegen.simd import add_rows, at, copy_rows, fill_zero, integers, numbers
from ...codegen.tile import Operand, Prefetch, Rows, Sum, column_tile, cycles, tile_product, tile_shape
from ...problem import ConvProblem
from ...program import Part, Step, places
from ...runtime import arrays, machine
from ...runtime.jit import Body, ceil_div, device
from ...runtime.records import Record, record
from ..axes import Axis, forward_axes
from ..base import Wanted
from ..bias import sum_slices
from ..blocking import equal_blocks, inside
from .constants import CUT
from .correlate import collide
from .gather import Gathered, copy_cycles, gather_block

__all__ = ["WeightGrad", "sum_parts", "sum_parts_step", "weight_grad", "weight_grad_steps"]


class WeightGrad(Gathered):
    """The product of dy and x."""

    n: int  #: images
    groups: int
    h: int  #: rows, columns and channels of x; channels of x and y in a group
    w: int
    c: int
    cg: int
    dg: int
    p: int  #: rows and columns of outputs
    q: int
    R: int  #: rows of taps, and taps of a row; how x is read
    Q: int
    stride_h: int
    stride_w: int
    dilation_h: int
    dilation_w: int
    top: int
    left: int
    slices: int  #: of the pixels; rows and columns of a block of them
    block_p: int
    block_q: int
    block_r: int  #: a task's rows of taps, channels of y and of x
    block_d: int
    block_k: int
    merged: int  #: whether a row of taps is one run
    gather_dy: int  #: whether a block of dy is copied to scratch as well, from `s_dy` on
    s_dy: int
    ahead: int  #: whether the next block is asked for
    swap: int  #: which side is on the vectors, as said above
    accumulate: int  #: whether parts are added to
    part: int  #: elements of a part
    make_bias: int  #: whether pixels of dy are summed, too
    tile: int  #: the micro-kernel


# ------------------------------------------------------------------------------------------------- plan


def _axes(problem: ConvProblem, rows: Axis, columns: Axis) -> tuple[bool, dict[str, int]]:
    """Return whether x has to be gathered for its borders or groups, and the sizes of what is multiplied."""
    n, h, w, p, q = problem.n, problem.h, problem.w, problem.oh, problem.ow
    gather = rows.padded or columns.padded or (problem.groups > 1 and problem.kh * problem.kw > 1)
    if not gather and problem.kh == problem.kw == 1 and rows.stride == columns.stride == 1:
        # One matrix product over all pixels, in rows of any length that divides them.
        pixels = n * p * q
        q = max(v for v in range(1, CUT.block_pixels + 1) if pixels % v == 0)
        n, h, w, p = 1, pixels // q, q, pixels // q
    return gather, {"n": n, "h": h, "w": w, "p": p, "q": q}


def _blocks(problem: ConvProblem, slices: int) -> tuple[int, int, int]:
    """Return (block_r, block_d, block_k): the rows of taps, channels of y and channels of x of a task."""
    _, nr, lanes = tile_shape(problem.dtype.itemsize)
    cg, dg = problem.cg, problem.dg
    blocks_k, blocks_d = math.ceil(cg / CUT.block_channels), math.ceil(dg / CUT.block_channels)
    tasks = slices * problem.groups * blocks_k * blocks_d
    block_r = equal_blocks(problem.kh, math.ceil(CUT.sum_tasks / tasks))
    tasks *= math.ceil(problem.kh / block_r)
    # Where tasks are too few, the channels of one side are shared out, and each task reads the other side: the smaller.
    if cg > dg and problem.kw == 1:
        blocks_k *= math.ceil(CUT.sum_tasks / tasks)
    else:
        blocks_d *= math.ceil(CUT.sum_tasks / tasks)
    return (
        block_r,
        min(dg, equal_blocks(dg, blocks_d, nr * lanes)),
        min(cg, equal_blocks(cg, blocks_k, nr * lanes)),
    )


def _geometry(problem: ConvProblem, wanted: Wanted) -> tuple[WeightGrad, bool]:
    """Describe the product; say whether its only part is dw itself."""
    itemsize = problem.dtype.itemsize
    shape = mr, nr, lanes = tile_shape(itemsize)
    rows, columns = forward_axes(problem)
    cg, dg, groups = problem.cg, problem.dg, problem.groups
    part = problem.d * problem.kh * problem.kw * cg
    gather, sizes = _axes(problem, rows, columns)
    lines, q = sizes["n"] * sizes["p"], sizes["q"]
    slices = min(max(1, lines * q // CUT.slice_pixels), CUT.sum_tasks, max(1, CUT.parts_limit // part), lines)
    block_r, block_d, block_k = _blocks(problem, slices)
    # Pixels that lie far apart are read much slower than they are copied.
    gather = gather or block_k < cg or (problem.stride == (1, 1) and cg * itemsize >= CUT.far)
    step_h, step_w = (axis.stride if gather and axis.taps == 1 else 1 for axis in (rows, columns))
    merged = columns.dilation == 1 and (gather or groups == 1) and block_k == cg
    run = problem.kw * cg if merged else block_k
    dy_rows, x_rows = (cycles(*sides, CUT.block_pixels, shape) for sides in ((dg, run), (run, dg)))
    swap = x_rows < CUT.swap * dy_rows
    straight = slices == 1 and not swap
    if straight and wanted.weights == "HWIO":
        swap = True  # which is how dw lies; sums are the same, with the factors of their products exchanged
    gather_dy = block_d < dg
    block_q = equal_blocks(q, math.ceil(q / CUT.block_pixels))
    per_slice = math.ceil(lines / slices)
    block_p = equal_blocks(per_slice, math.ceil(per_slice * block_q / CUT.block_pixels))
    s_dy = scratch_dy = 0
    if gather:
        s_dy = ((block_p - 1) * (rows.stride // step_h) + (block_r - 1) * rows.dilation + 1) * block_k
        s_dy *= (block_q - 1) * (columns.stride // step_w) + (problem.kw - 1) * columns.dilation + 1
    s_dy = -(-s_dy // lanes) * lanes
    if gather_dy:
        scratch_dy = block_p * block_q * block_d
    # The next block is asked for where pixels follow one another, spread over the sets of L2, and find room there
    # beside the sums.
    ahead = rows.stride == columns.stride == 1 and not collide(problem.c, problem)
    ahead = ahead and block_r * problem.kw * block_k * block_d * itemsize <= CUT.task_bytes
    g = WeightGrad(
        **sizes, groups=groups, c=problem.c, cg=cg, dg=dg, R=problem.kh, Q=problem.kw,
        stride_h=rows.stride, stride_w=columns.stride, dilation_h=rows.dilation, dilation_w=columns.dilation,
        top=rows.before, left=columns.before, slices=slices, block_p=block_p, block_q=block_q, block_r=block_r,
        block_d=block_d, block_k=block_k, gather=gather, step_h=step_h, step_w=step_w, pixel=block_k, s_dy=s_dy,
        scratch=arrays.apart(s_dy + scratch_dy, itemsize), merged=merged, gather_dy=gather_dy, ahead=ahead, swap=swap,
        accumulate=wanted.accumulate and straight, part=part, make_bias=wanted.bias,
        tile=column_tile(problem.dtype_name, mr, nr),
    )  # fmt: skip
    return g, straight


def _price(g: WeightGrad, itemsize: int) -> float:
    """Return the cycles of all register tiles, and of the copies that they read."""
    run, runs = (g.Q * g.cg, g.R) if g.merged else (g.cg, g.R * g.Q)
    rows, columns = (run, g.dg) if g.swap else (g.dg, run)
    pixels = g.block_p * g.block_q
    blocks = g.n * g.groups * g.p * g.q / pixels
    products = blocks * runs * cycles(rows, columns, pixels, tile_shape(itemsize))
    copies = 0.0
    if g.gather:
        held_h = (g.block_p - 1) * (g.stride_h // g.step_h) + (g.block_r - 1) * g.dilation_h + 1
        held_w = (g.block_q - 1) * (g.stride_w // g.step_w) + (g.Q - 1) * g.dilation_w + 1
        copies += copy_cycles(held_h, held_w, g.block_k, g.block_k == g.c * g.step_w, itemsize)
    if g.gather_dy:
        copies += copy_cycles(g.block_p, g.block_q, g.block_d, False, itemsize)
    return products + blocks * _tasks(g) * copies


def _tasks(g: WeightGrad) -> int:
    """Return the tasks that share a slice of a group."""
    return math.ceil(g.R / g.block_r) * math.ceil(g.dg / g.block_d) * math.ceil(g.cg / g.block_k)


def weight_grad_steps(problem: ConvProblem, wanted: Wanted) -> list[Step]:
    """Return the product and, where its parts are not dw itself, their sum; with a bias, the sums of dy as well."""
    itemsize = problem.dtype.itemsize
    mr, nr, lanes = tile_shape(itemsize)
    g, straight = _geometry(problem, wanted)
    parts = "dw" if straight else Part(g.slices * g.part * itemsize, "parts of dw")
    scratch = Part(g.scratch * itemsize * wanted.workers)
    sums = Part(g.slices * problem.d * itemsize if wanted.bias else 0, "parts of db")
    body = weight_grad(mr, nr * lanes, machine.LINE // itemsize, itemsize)
    operands = places("x", "dy", parts, sums, scratch)
    steps = [Step(body, (g,), g.slices * g.groups * _tasks(g), operands, _price(g, itemsize))]
    if wanted.bias:
        steps.append(sum_slices(problem, g.slices, sums, wanted.accumulate))
    if not isinstance(parts, str):
        steps.append(sum_parts_step(problem, g.slices, g.groups, g.swap, parts, wanted))
    return steps


# ------------------------------------------------------------------------------------------------- body


class _Task(NamedTuple):
    """Taps ``r_0:r_1``, channels ``d_0:d_1`` and ``k_0:k_1`` of a group, and a slice of the rows of all images."""

    group: int
    piece: int
    r_0: int
    r_1: int
    d_0: int
    d_1: int
    k_0: int
    k_1: int


class _Block(NamedTuple):
    """Outputs ``p_0:p_1`` x ``q_0:q_1`` of an image."""

    n: int
    p_0: int
    p_1: int
    q_0: int
    q_1: int


class _Side(NamedTuple):
    """One side of the product: its first number, from line to line and from pixel to pixel, and its numbers a pixel."""

    at: Pointer
    line: int
    pixel: int
    width: int


class _Ahead(NamedTuple):
    """What the next block reads of x and of dy: where it starts, from pixel to pixel, and cache lines of a pixel."""

    x: Pointer
    x_pixel: int
    x_lines: int
    dy: Pointer
    dy_pixel: int
    dy_lines: int
    line: int


@device
def _task_of(g, task):
    """Decode a task."""
    blocks_r, blocks_d, blocks_k = ceil_div(g.R, g.block_r), ceil_div(g.dg, g.block_d), ceil_div(g.cg, g.block_k)
    d_0, rest = task % blocks_d * g.block_d, task // blocks_d
    k_0, rest = rest % blocks_k * g.block_k, rest // blocks_k
    r_0, rest = rest % blocks_r * g.block_r, rest // blocks_r
    r_1, d_1, k_1 = min(r_0 + g.block_r, g.R), min(d_0 + g.block_d, g.dg), min(k_0 + g.block_k, g.cg)
    return _Task(rest % g.groups, rest // g.groups, r_0, r_1, d_0, d_1, k_0, k_1)


@device
def _x_side(g, t, block, x, scratch):
    """Return a block of x, gathered where that is so, and how far rows of it are apart: (side, pitch)."""
    row = block.p_0 * g.stride_h - g.top + t.r_0 * g.dilation_h
    column = block.q_0 * g.stride_w - g.left
    image = at(x, block.n * g.h * g.w * g.c + t.group * g.cg + t.k_0)
    channels = t.k_1 - t.k_0
    if not g.gather:
        pitch = g.w * g.c
        return _Side(at(image, (row * g.w + column) * g.c), g.stride_h * pitch, g.stride_w * g.c, channels), pitch, g.c
    down, right = g.stride_h // g.step_h, g.stride_w // g.step_w
    rows = (block.p_1 - block.p_0 - 1) * down + (t.r_1 - t.r_0 - 1) * g.dilation_h + 1
    columns = (block.q_1 - block.q_0 - 1) * right + (g.Q - 1) * g.dilation_w + 1
    gather_block(g, image, row, rows, column, columns, channels, scratch)
    pitch = columns * g.pixel
    return _Side(scratch, down * pitch, right * g.pixel, channels), pitch, g.pixel


@device
def _dy_side(g, t, block, dy, scratch):
    """Return a block of dy, gathered where that is so."""
    D, channels = g.groups * g.dg, t.d_1 - t.d_0
    first = at(dy, ((block.n * g.p + block.p_0) * g.q + block.q_0) * D + t.group * g.dg + t.d_0)
    if not g.gather_dy:
        return _Side(first, g.q * D, D, channels)
    pixels = block.q_1 - block.q_0
    for p in range(block.p_1 - block.p_0):
        copy_rows(at(scratch, p * pixels * channels), channels, at(first, p * g.q * D), D, pixels, channels)
    return _Side(scratch, pixels * channels, channels, channels)


@device
def _next_block(g, t, x, dy, line, q, last, LINE):
    """Return what the block at column q of a line of outputs reads, if it is asked for and is not past the last."""
    if not g.ahead or line >= last:
        return _Ahead(x, 0, 0, dy, 0, 0, 0)
    row = line // g.p * g.h + line % g.p - g.top + t.r_0 * g.dilation_h
    x_0 = (row * g.w + q - g.left) * g.c + t.group * g.cg + t.k_0
    D = g.groups * g.dg
    dy_0 = (line * g.q + q) * D + t.group * g.dg + t.d_0
    return _Ahead(at(x, x_0), g.c, (t.k_1 - t.k_0) // LINE, at(dy, dy_0), D, (t.d_1 - t.d_0) // LINE, LINE)


@device
def _multiply(tile, a, b, lines, pixels, c, add, ahead, i, shares, MR, WIDTH):
    """Multiply two sides over a block of pixels.

    Meanwhile share `i` of `shares` of what `ahead` describes is asked for: each tile brings a line of every pixel.
    """
    panels = ceil_div(b.width, WIDTH)
    fetched = max(ceil_div(a.width, MR), (ahead.x_lines + ahead.dy_lines) // (shares * panels))
    for panel in range(panels):
        j = panel * WIDTH
        first = (i * panels + panel) * fetched
        f, step = at(ahead.x, first * ahead.line), ahead.x_pixel
        if first >= ahead.x_lines:
            first -= ahead.x_lines
            f, step = at(ahead.dy, first * ahead.line), ahead.dy_pixel if first < ahead.dy_lines else 0
        target = Rows(at(c.at, j), c.row)
        tile_product(
            tile,
            a.width,
            min(WIDTH, b.width - j),
            Sum(lines, 1, pixels),
            Operand(a.at, a.line, 0, 1, a.pixel),
            Operand(at(b.at, j), b.line, 0, 0, b.pixel),
            add,
            target,
            target,
            0,
            Prefetch(f, ahead.line, step),
        )


@device
def _add_block(g, t, block, x, dy, parts, bias, scratch, add, ahead, MR, WIDTH):
    """Add the products of one block to a part."""
    depth, lines, pixels = g.R * g.Q * g.cg, block.p_1 - block.p_0, block.q_1 - block.q_0
    x_side, pitch, pixel = _x_side(g, t, block, x, scratch)
    dy_side = _dy_side(g, t, block, dy, at(scratch, g.s_dy))
    if g.make_bias and t.r_0 == 0 and t.k_0 == 0:  # each pixel of dy once, while it is in cache
        for line in range(lines):
            add_rows(at(dy_side.at, line * dy_side.line), dy_side.pixel, pixels, dy_side.width, at(bias, t.d_0))
    runs, run = (1, g.Q * g.cg) if g.merged else (g.Q, t.k_1 - t.k_0)
    for r in range(t.r_0, t.r_1):
        # Lines of dy that meet this row of taps in the padding are left out.
        first, end = inside(block.p_0 * g.stride_h - g.top + r * g.dilation_h, g.h, g.stride_h, lines)
        for s in range(runs):
            start = (r - t.r_0) * g.dilation_h * pitch + s * g.dilation_w * pixel + first * x_side.line
            of_x = _Side(at(x_side.at, start), x_side.line, x_side.pixel, run)
            of_dy = _Side(at(dy_side.at, first * dy_side.line), dy_side.line, dy_side.pixel, dy_side.width)
            tap = (r * g.Q + s) * g.cg + t.k_0
            if g.swap:
                a, b, c = of_x, of_dy, Rows(at(parts, (t.group * depth + tap) * g.dg + t.d_0), g.dg)
            else:
                a, b, c = of_dy, of_x, Rows(at(parts, (t.group * g.dg + t.d_0) * depth + tap), depth)
            share = (r - t.r_0) * runs + s
            _multiply(g.tile, a, b, end - first, pixels, c, add, ahead, share, (t.r_1 - t.r_0) * runs, MR, WIDTH)


@cache
def weight_grad(MR: int, WIDTH: int, LINE: int, ITEMSIZE: int) -> Body:
    """Make the body for register tiles of WIDTH columns, and cache lines of LINE numbers.

    It takes x, dy, the parts of dw, the parts of db and scratch.
    """

    def weight_grad(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, WeightGrad)
        table = integers(operands)
        x, dy = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        t = _task_of(g, task)
        parts = at(numbers(table[2], ITEMSIZE), t.piece * g.part)
        bias = at(numbers(table[3], ITEMSIZE), (t.piece * g.groups + t.group) * g.dg)
        scratch = at(numbers(table[4], ITEMSIZE), worker * g.scratch)
        if g.make_bias and t.r_0 == 0 and t.k_0 == 0:
            fill_zero(at(bias, t.d_0), t.d_1 - t.d_0)
        line, last = t.piece * g.n * g.p // g.slices, (t.piece + 1) * g.n * g.p // g.slices
        add = g.accumulate != 0
        while line < last:
            n, p_0 = line // g.p, line % g.p
            p_1 = min(p_0 + g.block_p, g.p, p_0 + last - line)
            following = line + p_1 - p_0
            for q_0 in range(0, g.q, g.block_q):
                block = _Block(n, p_0, p_1, q_0, min(q_0 + g.block_q, g.q))
                next_line, next_q = line, q_0 + g.block_q
                if next_q >= g.q:
                    next_line, next_q = following, 0
                ahead = _next_block(g, t, x, dy, next_line, next_q, last, LINE)
                _add_block(g, t, block, x, dy, parts, bias, scratch, add, ahead, MR, WIDTH)
                add = True
            line = following

    return Body(weight_grad)


# ------------------------------------------------------------------------------------------------ slices


class SumParts(Record):
    """Slices of `part` numbers, each (groups, dg, depth), or (groups, depth, dg) where `swap`.

    dw is (groups, dg, depth), or as "HWIO" (depth, d): with one group then, or without `swap`.
    """

    slices: int
    part: int
    depth: int
    d: int  #: channels of y, all and of a group
    dg: int
    swap: int
    accumulate: int


def sum_parts_step(problem: ConvProblem, slices: int, groups: int, swap: int, parts: Part, wanted: Wanted) -> Step:
    """Return the step that adds the parts of all slices into dw."""
    part, d = math.prod(problem.w_shape), problem.d
    g = SumParts(
        slices=slices, part=part, depth=part // d, d=d, dg=d // groups, swap=swap, accumulate=wanted.accumulate
    )
    if wanted.weights == "HWIO":
        return Step(sum_parts_hwio(problem.dtype.itemsize), (g,), ceil_div(d, COLUMNS), places(parts, "dw"))
    return Step(sum_parts(problem.dtype.itemsize), (g,), d, places(parts, "dw"))


@cache
def sum_parts(ITEMSIZE: int) -> Body:
    """Make the body that adds the parts of all slices, in their order, into dw; a task is one channel of y."""

    def sum_parts(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, SumParts)
        table = integers(operands)
        start = task * g.depth
        group, j = task // g.dg, task % g.dg
        row = at(numbers(table[1], ITEMSIZE), start)
        if not g.accumulate:
            fill_zero(row, g.depth)
        for piece in range(g.slices):
            part = at(numbers(table[0], ITEMSIZE), piece * g.part)
            if g.swap:
                for k in range(g.depth):
                    row[k] += part[(group * g.depth + k) * g.dg + j]
            else:
                for k in range(g.depth):
                    row[k] += part[start + k]

    return Body(sum_parts)


#: Channels of y of a task where dw has these side by side: some cache lines.
COLUMNS = 32


@cache
def sum_parts_hwio(ITEMSIZE: int) -> Body:
    """Make the body that adds the parts of all slices, in order, to dw as "HWIO"; a task is some channels of y."""

    def sum_parts_hwio(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, SumParts)
        table = integers(operands)
        j_0 = task * COLUMNS
        width = min(COLUMNS, g.d - j_0)
        for k in range(g.depth):
            row = at(numbers(table[1], ITEMSIZE), k * g.d + j_0)
            if not g.accumulate:
                fill_zero(row, width)
            for piece in range(g.slices):
                part = at(numbers(table[0], ITEMSIZE), piece * g.part)
                s_k, s_j = (g.d, 1) if g.swap else (1, g.depth)
                for j in range(width):
                    row[j] += part[k * s_k + (j_0 + j) * s_j]

    return Body(sum_parts_hwio)
