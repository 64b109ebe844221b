"""The correlation of images with packed weights: the forward pass, and the input gradient phase by phase.

    y[n, p, q, j] = sum over r < R, s < Q, k < cg of
                    x[n, p*stride - top + r*dilation, q*stride - left + s*dilation, k] * packed[r, s, k, j]  (+ bias[j])

for the channels of each group; pixels outside x are zero. y is written through strides, so that a phase of the input
gradient writes every stride-th pixel. `top` and `left` may be negative.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple, SupportsInt

from ...codegen.native import Pointer
from ...codegen.packing import pack
from ...codegen.simd import at, copy, fill_zero, integers, numbers
from ...codegen.tile import Operand, Prefetch, Rows, Sum, cycles, panel_tile, tile_product, tile_shape
from ...problem import ConvProblem
from ...program import Part, Step, places
from ...runtime import arrays, machine
from ...runtime.jit import Body, ceil_div, device
from ...runtime.records import Share, record, record_of_task
from ..axes import Axis, Correlation, correlation_fields, packings
from ..base import Wanted
from ..blocking import equal_blocks, inside
from .constants import CUT
from .gather import Gathered, copy_cycles, gather_block

__all__ = ["Correlate", "Taps", "collide", "correlate", "correlate_steps", "pack_step", "sum_blocks"]


class Taps(Correlation):
    """The taps, and how x is read."""

    R: int  #: rows of taps, and taps of a row
    Q: int
    stride_h: int
    sum_r: int  #: rows of taps, and steps of a run, that are summed at a time
    sum_k: int
    add_bias: int
    tile: int  #: the micro-kernel


class Correlate(Share, Taps, Gathered):
    """One correlation: of a phase, where a pass has several."""

    packed_0: int  #: where its packed weights start
    stride_w: int
    block_p: int  #: a task: rows of outputs, outputs of a row, and channels
    block_q: int
    block_d: int
    d_first: int  #: whether all channels of the same outputs follow one another
    blocks_d: int
    blocks: int  #: of outputs, in all groups
    stream: int  #: whether results go past the caches
    merged: int  #: whether a row of taps is one run, because pixels are contiguous; otherwise each tap is one


# ------------------------------------------------------------------------------------------------- plan


def sum_blocks(rows: int, taps: int, run: int) -> dict[str, int]:
    """Return how much of ``rows`` times ``taps`` times ``run`` products is summed at a time."""
    sum_r = max(1, min(rows, CUT.sum_steps // max(taps * run, 1)))
    parts = math.ceil(run / max(1, CUT.sum_steps // max(taps, 1)))
    return {"sum_r": sum_r, "sum_k": max(1, equal_blocks(run, parts))}


def collide(pixel: int, problem: ConvProblem, pixels: int = 0) -> bool:
    """Whether pixels that lie `pixel` elements apart fall into so few sets of L1 that `pixels` of them do not fit.

    That is a register tile's, where it is not said.
    """
    rows = pixels or tile_shape(problem.dtype.itemsize)[0]
    return rows * math.gcd(pixel * problem.dtype.itemsize, CUT.l1_way) > CUT.l1_ways * CUT.l1_way


def pack_step(
    problem: ConvProblem, phases: list[tuple[Axis, Axis]], backward: bool, weights: str
) -> tuple[Step, Part, list[int]]:
    """Return the step that packs w for these phases, where it packs them, and where each phase begins."""
    itemsize = problem.dtype.itemsize
    _, nr, lanes = tile_shape(itemsize)
    records, tasks, ends = packings(problem, phases, backward, nr * lanes, lanes, weights)
    packed = Part(ends[-1] * itemsize, "packed weights")
    body = pack(backward, weights, nr * lanes, lanes, itemsize)
    return Step(body, tuple(records), tasks, places("w", packed)), packed, ends


def _blocking(p: int, q: int, pixels: int, reach: int, pixel: int, stride: tuple[int, int], mr: int) -> tuple[int, int]:
    """Return (block_p, block_q): the rows and columns of outputs that one task computes, about `pixels` at most.

    `pixel` is the bytes of x that a task reads of each, `reach` the rows of x that an output's taps span.
    """
    limit = max(mr, min(pixels, CUT.task_bytes // pixel // stride[0]))
    block_q = q if q <= limit else equal_blocks(q, math.ceil(q / limit), mr)
    block_p = max(1, min(p, limit // block_q))
    while block_p > 1 and ((block_p - 1) * stride[0] + reach) * block_q * stride[1] * pixel > 2 * CUT.task_bytes:
        block_p -= 1
    return equal_blocks(p, math.ceil(p / block_p)), block_q


def _gathering(problem: ConvProblem, rows: Axis, columns: Axis, fields: dict[str, int]) -> dict[str, int]:
    """Return whether and how x is gathered; the scratch is left to whoever knows the blocks."""
    lanes = machine.lanes(problem.dtype.itemsize)
    # Of groups, the channels of a row's pixels do not lie side by side; a single tap does not mind.
    taps = rows.taps * columns.taps
    apart = (problem.groups > 1 and taps > 1) or collide(columns.stride * fields["c"], problem)
    gather = taps > 0 and (rows.padded or columns.padded or apart)
    # Where rows or columns have a single tap, only those that it reads are gathered.
    step_h, step_w = (axis.stride if gather and axis.taps == 1 else 1 for axis in (rows, columns))
    pixel, cg = fields["c"], fields["cg"]
    if gather:
        pixel = cg + lanes if collide(columns.stride // step_w * cg, problem) else cg
    return {"gather": gather, "step_h": step_h, "step_w": step_w, "pixel": pixel}


def _geometry(
    problem: ConvProblem, rows: Axis, columns: Axis, backward: bool, bias: bool
) -> tuple[dict[str, SupportsInt], int, float]:
    """Return the fields of one correlation, but for its place among others, its tasks and its price."""
    itemsize = problem.dtype.itemsize
    shape = mr, nr, lanes = tile_shape(itemsize)
    fields = correlation_fields(problem, rows, columns, backward)
    gathering = _gathering(problem, rows, columns, fields)
    taps = rows.taps * columns.taps
    n, groups, cg, dg, p, q = (fields[name] for name in ("n", "groups", "cg", "dg", "p", "q"))
    if taps == 1 and rows.plain and columns.plain:
        # A matrix product over all pixels.
        fields["y_n"] *= n
        q, n, p = n * p * q, 1, 1
        fields |= {"n": 1, "h": 1, "w": q, "p": 1, "q": q}
    reach = (rows.taps - 1) * rows.dilation + 1
    merged = columns.dilation == 1 and gathering["pixel"] == cg
    # Weights that stay in L2 are read by any number of tasks; more of them are read by as few as can be.
    small = taps * cg * dg * itemsize <= CUT.task_bytes
    pixels = max(CUT.least_pixels, min(CUT.task_pixels, n * p * q // CUT.tasks)) if small else CUT.task_pixels
    block_p, block_q = _blocking(p, q, pixels, reach, cg * itemsize, (rows.stride, columns.stride), mr)
    blocks = n * math.ceil(p / block_p) * math.ceil(q / block_q)
    block_d = equal_blocks(dg, math.ceil(CUT.tasks / (blocks * groups)), nr * lanes)
    blocks_d = math.ceil(dg / block_d)
    held_h = (block_p - 1) * (rows.stride // gathering["step_h"]) + reach
    held_w = (block_q - 1) * (columns.stride // gathering["step_w"]) + (columns.taps - 1) * columns.dilation + 1
    held = held_h * held_w * gathering["pixel"]
    # Of x and the weights, one is read once and the other again and again: x for each block of channels, the weights,
    # where they do not stay in L2, for each block of outputs.
    x_again = blocks * held * (CUT.gather if gathering["gather"] else 1) * (blocks_d - 1)
    weights_again = 0 if small else taps * cg * dg * (blocks - 1)
    sums = sum_blocks(rows.taps, 1, columns.taps * cg) if merged else sum_blocks(rows.taps, columns.taps, cg)
    geometry: dict[str, SupportsInt] = dict(
        **fields, **gathering, **sums, R=rows.taps, Q=columns.taps, stride_h=rows.stride, stride_w=columns.stride,
        block_p=block_p, block_q=block_q, block_d=block_d, d_first=weights_again < x_again, merged=merged,
        blocks_d=blocks_d, blocks=blocks * groups, add_bias=bias,
        scratch=arrays.apart(held if gathering["gather"] else 0, itemsize),
        stream=n * fields["y_n"] * itemsize >= machine.STREAM_BYTES,
        tile=panel_tile(problem.dtype_name, mr, nr),
    )  # fmt: skip
    price = n * groups * p * cycles(q, dg, taps * cg, shape)
    if gathering["gather"]:
        together = gathering["pixel"] == fields["c"] * gathering["step_w"]
        price += copy_cycles(blocks * groups * held_h, held_w, cg, together, itemsize)
    return geometry, blocks * groups * blocks_d, price


def correlate_steps(
    problem: ConvProblem, phases: list[tuple[Axis, Axis]], backward: bool, wanted: Wanted
) -> list[Step]:
    """Return the steps of correlations with channels on the vectors: the packing of all phases, and all of them."""
    itemsize = problem.dtype.itemsize
    packing, packed, starts = pack_step(problem, phases, backward, wanted.weights)
    each = [_geometry(problem, *axes, backward, wanted.bias) for axes in phases]
    scratch = max(int(fields["scratch"]) for fields, _, _ in each)
    records, tasks, price = [], 0, 0.0
    for (fields, own, cost), packed_0 in zip(each, starts[:-1], strict=True):
        fields["scratch"] = scratch
        records.append(Correlate(**fields, records=len(phases), first_task=tasks, packed_0=packed_0))
        tasks, price = tasks + own, price + cost
    parts = Part(scratch * itemsize * wanted.workers), Part(_STATE * wanted.workers, "what is gathered")
    operands = places(
        "dy" if backward else "x", packed, "b" if wanted.bias else packed, "dx" if backward else "y", *parts
    )
    step = Step(correlate(*tile_shape(itemsize), itemsize), tuple(records), tasks, operands, price)
    return [packing, step] if packing.tasks else [step]


# ------------------------------------------------------------------------------------------------- body

#: Products of a sum up to which a tile asks for the outputs of the next: it asks for a line with each.
_SHORT = 64
#: Bytes of a worker's own numbers: here that of the block whose x is in its scratch.
_STATE = 64


class _Block(NamedTuple):
    """A task: outputs ``p_0:p_1`` x ``q_0:q_1`` of an image, channels ``d_0:d_1`` of a group."""

    number: int  # without its channels, other than those of all phases
    n: int
    group: int
    p_0: int
    p_1: int
    q_0: int
    q_1: int
    d_0: int
    d_1: int


class _Source(NamedTuple):
    """What a block reads of x: its first pixel, and how far pixels, rows and their outputs are apart."""

    at: Pointer
    pixel: int
    pitch: int
    down: int
    right: int


@device
def _block_of_task(g, task):
    """Decode a task of a correlation."""
    number, d = (task // g.blocks_d, task % g.blocks_d) if g.d_first else (task % g.blocks, task // g.blocks)
    blocks_p, blocks_q = ceil_div(g.p, g.block_p), ceil_div(g.q, g.block_q)
    q_0, rest = number % blocks_q * g.block_q, number // blocks_q
    p_0, rest = rest % blocks_p * g.block_p, rest // blocks_p
    d_0 = d * g.block_d
    p_1, q_1, d_1 = min(p_0 + g.block_p, g.p), min(q_0 + g.block_q, g.q), min(d_0 + g.block_d, g.dg)
    return _Block(number + g.first_task, rest % g.n, rest // g.n, p_0, p_1, q_0, q_1, d_0, d_1)


@device
def _fill(g, block, bias, y):
    """Without taps, the phase of an input gradient that nothing flows to is zero, or the bias."""
    channel, channels = block.group * g.dg + block.d_0, block.d_1 - block.d_0
    for p in range(block.p_0, block.p_1):
        for q in range(block.q_0, block.q_1):
            pixel = at(y, g.y_0 + block.n * g.y_n + p * g.y_p + q * g.y_q + channel)
            if g.add_bias:
                copy(pixel, at(bias, channel), channels)
            else:
                fill_zero(pixel, channels)


@device
def _source_of_block(g, block, x, scratch, held):
    """Return where a block's x is: as it lies, or in scratch, gathered now unless `held` says that it is there."""
    row, column = block.p_0 * g.stride_h - g.top, block.q_0 * g.stride_w - g.left
    image = at(x, block.n * g.h * g.w * g.c + block.group * g.cg)
    if not g.gather:
        return _Source(at(image, (row * g.w + column) * g.c), g.c, g.w * g.c, g.stride_h, g.stride_w)
    down, right = g.stride_h // g.step_h, g.stride_w // g.step_w
    rows = (block.p_1 - block.p_0 - 1) * down + (g.R - 1) * g.dilation_h + 1
    columns = (block.q_1 - block.q_0 - 1) * right + (g.Q - 1) * g.dilation_w + 1
    if held[0] != block.number:
        gather_block(g, image, row, rows, column, columns, g.cg, scratch)
        held[0] = block.number
    return _Source(scratch, g.pixel, columns * g.pixel, down, right)


@device
def _ahead(g, a, y, tile, pixel, k, line, WIDTH):
    """Return what tiles of so many pixels ask for: the next one's x, or its outputs, or nothing.

    Its outputs where sums are short, and a panel's are a part of each pixel's: the processor does not see them coming.
    """
    if line == 0 and g.y_q > WIDTH and g.stream == 0 and g.R * g.Q * g.cg <= _SHORT:
        return Prefetch(at(y, tile * g.y_q), tile * g.y_q, g.y_q)
    return Prefetch(at(a, tile * pixel + k * line), tile * pixel, line)


@device
def _strip(g, source, a, b, width, columns, r_0, r_1, count, line, bias, y, MR, WIDTH):
    """Compute `count` outputs of a row, from a pixel on; long sums are sums of blocks, which round less."""
    Q, K = (1, g.Q * g.cg) if g.merged else (g.Q, g.cg)
    tile = ceil_div(count, ceil_div(count, MR))
    for r in range(r_0, max(r_1, r_0 + 1), g.sum_r):
        for k in range(0, K, g.sum_k):
            first = r == r_0 and k == 0
            last = r + g.sum_r >= r_1 and k + g.sum_k >= K
            e, e_row = (bias, 0) if first else (y, g.y_q)
            tile_product(
                g.tile,
                count,
                columns,
                Sum(min(g.sum_r, r_1 - r), Q, min(g.sum_k, K - k)),
                Operand(
                    at(a, r * g.dilation_h * source.pitch + k),
                    g.dilation_h * source.pitch,
                    g.dilation_w * source.pixel,
                    source.right * source.pixel,
                    1,
                ),
                Operand(at(b, (r * g.Q * g.cg + k) * width), g.Q * g.cg * width, g.cg * width, 0, width),
                g.add_bias != 0 if first else True,
                Rows(e, e_row),
                Rows(y, g.y_q),
                g.stream if last else 0,
                _ahead(g, a, y, tile, source.pixel, k, line, WIDTH),
            )


@device
def _panel(g, block, source, packed, bias, y, j, line, MR, STRIP, LANES, WIDTH):
    """Compute a panel's channels, from j on, of all outputs of a block."""
    K = g.Q * g.cg if g.merged else g.cg
    width = min(WIDTH, ceil_div(g.dg - j, LANES) * LANES)
    b = at(packed, (block.group * ceil_div(g.dg, LANES) * LANES + j) * g.R * g.Q * g.cg)
    channel = block.group * g.dg + j
    # Of a sum of many blocks, a strip of tiles stays in L1 from one block to the next.
    strip = STRIP if g.sum_r < g.R or g.sum_k < K else block.q_1 - block.q_0
    for p in range(block.p_0, block.p_1):
        # Rows of taps in the padding are left out.
        r_0, r_1 = inside(p * g.stride_h - g.top, g.h, g.dilation_h, g.R)
        a_row = at(source.at, (p - block.p_0) * source.down * source.pitch)
        y_row = at(y, g.y_0 + block.n * g.y_n + p * g.y_p + channel)
        for q in range(block.q_0, block.q_1, strip):
            count = min(strip, block.q_1 - q)
            a = at(a_row, (q - block.q_0) * source.right * source.pixel)
            columns = min(WIDTH, block.d_1 - j)
            _strip(
                g,
                source,
                a,
                b,
                width,
                columns,
                r_0,
                r_1,
                count,
                line,
                at(bias, channel),
                at(y_row, q * g.y_q),
                MR,
                WIDTH,
            )


@cache
def correlate(MR: int, NR: int, LANES: int, ITEMSIZE: int) -> Body:
    """Make the body for one register tile; it takes x, the packed weights, the bias, y, scratch and state."""
    WIDTH, LINE, STRIP = NR * LANES, LANES, CUT.strip_tiles * MR

    def correlate(operands, geometry, worker, task, fresh):
        g = record(geometry, record_of_task(geometry, task, Correlate), Correlate)
        table = integers(operands)
        x, packed = numbers(table[0], ITEMSIZE), at(numbers(table[1], ITEMSIZE), g.packed_0)
        bias, y = numbers(table[2], ITEMSIZE), numbers(table[3], ITEMSIZE)
        scratch, held = at(numbers(table[4], ITEMSIZE), worker * g.scratch), integers(table[5] + worker * 64)
        if fresh:
            held[0] = -1
        block = _block_of_task(g, task - g.first_task)
        if g.R * g.Q * g.cg == 0:
            _fill(g, block, bias, y)
            return
        source = _source_of_block(g, block, x, scratch, held)
        # Where a tile's pixels are one run of memory, the first panel brings the next tile's.
        line = LINE if not g.gather and g.R * g.Q * g.stride_w == 1 else 0
        for j in range(block.d_0, block.d_1, WIDTH):
            _panel(g, block, source, packed, bias, y, j, line if j == block.d_0 else 0, MR, STRIP, LANES, WIDTH)

    return Body(correlate)
