"""The weight gradient: dw is the correlation of x with dy, so a tile of dy is the filter, and the kernel comes out.

The products at each point are summed over tiles before the inverse transform, in a few slices. ``m_h x m_w`` is a
phase of the kernel, ``r_h x r_w`` a tile of dy.
"""

from __future__ import annotations

import math
from functools import cache

from ...codegen.simd import at, integers, numbers
from ...codegen.tile import Operand, Rows, Sum, column_tile, no_prefetch, tile_product, tile_shape
from ...problem import ConvProblem
from ...program import Part, Step, places
from ...runtime import arrays, machine
from ...runtime.jit import Body, ceil_div, device
from ...runtime.records import as_kind, record
from ..axes import correlation_fields
from ..base import Wanted
from ..bias import bias_steps
from ..blocking import channel_block, channel_blocks, largest_block, point_pitch
from ..direct.weight_grad import sum_parts_step
from ..turning import turn_step
from .constants import CUT
from .forms import Filtered, Form, bundles_of, cycles, filtered, lies_apart
from .tiles import Tiles, groups_of, points_of, tiles_of, transform_filters, transform_inputs
from .transform import Tile, Within, nothing, transform

__all__ = ["WinogradWeightGrad", "weight_grad", "weight_grad_steps"]


class WinogradWeightGrad(Tiles):
    """The product of one phase, which makes its own kernel positions."""

    slices: int  #: of the tiles, each of which has a part of so many numbers
    part: int
    w_0: int  #: where the phase's first tap is in dw, and from channel of y, row and tap to the next
    w_d: int
    w_r: int
    w_q: int
    s_dy: int  #: where a worker's scratch holds transformed dy, and the sums; transformed x comes first
    s_m: int


# ------------------------------------------------------------------------------------------------- plan


def _blocks(problem: ConvProblem, channels: int) -> int:
    """Return the blocks of so many channels of x and of y, as about equal parts as there are of whole vectors."""
    lanes = machine.lanes(problem.dtype.itemsize)
    cg, dg = (channel_blocks(size, min(size, channels), lanes) for size in (problem.cg, problem.dg))
    return int(cg * dg * _bundles(problem, channels))


def _bundles(problem: ConvProblem, channels: int) -> int:
    """Return the bundles of groups that have blocks of so many channels."""
    sizes, lanes = (problem.cg, problem.dg), machine.lanes(problem.dtype.itemsize)
    return bundles_of(problem.groups, sizes, lanes) if max(sizes) <= channels else problem.groups


def _scratch(problem: ConvProblem, form: Form, channels: int, block_t: int) -> dict[str, int]:
    """Return the blocks, and where a worker keeps transformed dy and the sums, behind transformed x."""
    lanes = machine.lanes(problem.dtype.itemsize)
    block_k, block_d, bundles = min(problem.cg, channels), min(problem.dg, channels), _bundles(problem, channels)
    groups = math.ceil(problem.groups / bundles)
    v, f = (form.points * point_pitch(block_t * groups * (block + lanes), lanes) for block in (block_k, block_d))
    m = form.points * point_pitch(groups * (block_k + lanes) * (block_d + lanes), lanes)
    scratch = arrays.apart(v + f + m, problem.dtype.itemsize)
    return {
        "block_t": block_t, "block_k": block_k, "block_d": block_d, "bundles": bundles,
        "s_dy": v, "s_m": v + f, "scratch": scratch,
    }  # fmt: skip


def _cut(problem: ConvProblem, found: list[Filtered], workers: int) -> tuple[int, int, list[dict[str, int]]]:
    """Return the slices, the channels of a block, and the blocks and scratch of each phase."""
    itemsize = problem.dtype.itemsize
    channels, limit = CUT.sum_bytes // itemsize, CUT.scratch_limit // itemsize
    tiles = [problem.n * c.all_tiles for c in found]
    few = min(math.ceil(CUT.sum_tasks / _blocks(problem, channels // 2)), min(tiles) // CUT.least_tiles)
    most = CUT.parts_limit // math.prod(problem.w_shape)
    slices = max(1, min(CUT.slices // _blocks(problem, channels), max(few, min(tiles) // CUT.sum_tiles), most))
    blocks_t = [largest_block(math.ceil(count / slices), CUT.sum_tiles) for count in tiles]

    def scratch() -> list[dict[str, int]]:
        return [_scratch(problem, c.form, channels, block) for c, block in zip(found, blocks_t, strict=True)]

    while channels > CUT.least_channels and (
        slices * _blocks(problem, channels) < 2 * workers or workers * max(s["scratch"] for s in scratch()) > limit
    ):
        channels //= 2
    return slices, channels, scratch()


def weight_grad_steps(problem: ConvProblem, wanted: Wanted) -> list[Step]:
    """Return the products of all phases, the sum of the slices, and with a bias its own steps."""
    itemsize, dtype = problem.dtype.itemsize, problem.dtype_name
    mr, nr, lanes = tile_shape(itemsize)
    found = filtered(problem, "weight_grad")
    part = math.prod(problem.w_shape)
    slices, channels, scratches = _cut(problem, found, wanted.workers)
    # One slice needs no sum.
    direct = slices == 1 and not wanted.accumulate
    hwio = wanted.weights == "HWIO"
    parts = "dw" if direct and not hwio else Part(slices * part * itemsize, "parts of dw")
    scratch = Part(max(s["scratch"] for s in scratches) * itemsize * wanted.workers)
    body, tasks = weight_grad(nr * lanes, lanes, itemsize), slices * _blocks(problem, channels)
    steps = (
        bias_steps(math.prod(problem.y_shape[:3]), problem.d, problem.dtype.itemsize, wanted.accumulate)
        if wanted.bias
        else []
    )
    for c, sizes in zip(found, scratches, strict=True):
        g = WinogradWeightGrad(
            **correlation_fields(problem, c.rows, c.columns, False), **c.grid, **c.form.transposed.fields(dtype),
            **sizes, slices=slices, part=part, w_0=(c.rows.first_tap * problem.kw + c.columns.first_tap) * problem.cg,
            w_d=problem.kh * problem.kw * problem.cg, w_r=c.rows.tap_step * problem.kw * problem.cg,
            w_q=c.columns.tap_step * problem.cg, tile=column_tile(dtype, mr, nr),
        )  # fmt: skip
        steps.append(
            Step(body, (g,), tasks, places("x", "dy", parts, scratch), _price(g, itemsize, lies_apart(problem)))
        )
    if direct and isinstance(parts, Part):
        steps.append(turn_step((1, problem.d, part // problem.d), itemsize, parts, "dw"))
    elif isinstance(parts, Part):
        steps.append(sum_parts_step(problem, slices, 1, 0, parts, wanted))
    return steps


def _price(g: WinogradWeightGrad, itemsize: int, apart: bool) -> float:
    """Return the cycles of one phase, where sums are continued from block to block and transformed in each slice."""
    block, shape = CUT.sum_bytes // itemsize, tile_shape(itemsize)
    x, dy = (channels / shape[2] for channels in (g.cg, g.dg))
    continued = tiles_of(g) / g.block_t * CUT.continued / CUT.transform
    weights = g.cg * math.ceil(dy) * (continued + g.slices)
    vectors = x * math.ceil(g.dg / block) + dy * math.ceil(g.cg / block)
    return float(cycles(g, vectors, apart * vectors, weights, shape))


# ------------------------------------------------------------------------------------------------- body


@device
def _multiply(g, v, v_apart, v_pitch, f, f_apart, f_pitch, m, m_apart, tiles, d, k, add, WIDTH):
    """Add, at each point, the product of ``(tiles, d)`` numbers of dy and ``(tiles, k)`` of x."""
    for point in range(points_of(as_kind(g, Tiles))):
        for j in range(0, k, WIDTH):
            target = Rows(at(m, point * m_apart + j), k)
            tile_product(
                g.tile,
                d,
                min(WIDTH, k - j),
                Sum(1, 1, tiles),
                Operand(at(f, point * f_apart), 0, 0, 1, f_pitch),
                Operand(at(v, point * v_apart + j), 0, 0, 0, v_pitch),
                add,
                target,
                target,
                0,
                no_prefetch(v),
            )


@device
def _write(g, m, m_apart, d, k, part):
    """Transform the sums of d channels of y and k of x back, into a part that points to the first of them."""
    within = Within(0, g.m_h, 0, g.m_w)
    for i in range(d):
        sums = Tile(at(m, i * k), (g.m_w + g.r_w - 1) * m_apart, m_apart)
        taps = Tile(at(part, i * g.w_d), g.w_r, g.w_q)
        transform(g.output_transform, sums, taps, within, k, nothing(m))


@cache
def weight_grad(WIDTH: int, LANES: int, ITEMSIZE: int) -> Body:
    """Make the body; it takes x, dy, the parts and scratch.

    A task is a slice of the tiles and a block of channels, of a group or of a bundle of them.
    """

    def weight_grad(operands, geometry, worker, task, fresh):
        g = record(geometry, 0, WinogradWeightGrad)
        table = integers(operands)
        x, dy, parts = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE), numbers(table[2], ITEMSIZE)
        v = at(numbers(table[3], ITEMSIZE), worker * g.scratch)
        f, m = at(v, g.s_dy), at(v, g.s_m)
        grid = as_kind(g, Tiles)
        all_tiles = tiles_of(grid)
        blocks_k, blocks_d = channel_blocks(g.cg, g.block_k, LANES), channel_blocks(g.dg, g.block_d, LANES)
        (d_0, d), rest = channel_block(task % blocks_d, g.dg, g.block_d, LANES), task // blocks_d
        (k_0, k), rest = channel_block(rest % blocks_k, g.cg, g.block_k, LANES), rest // blocks_k
        (group, groups), piece = groups_of(grid, rest % g.bundles), rest // g.bundles
        x, dy = at(x, group * g.cg + k_0), at(dy, group * g.dg + d_0)
        first, last = piece * all_tiles // g.slices, (piece + 1) * all_tiles // g.slices
        blocks_t = ceil_div(last - first, g.block_t)
        v_pitch, f_pitch, m_apart = groups * k, groups * d, point_pitch(groups * d * k, LANES)
        for block in range(blocks_t):
            tile = first + block * (last - first) // blocks_t
            tiles = first + (block + 1) * (last - first) // blocks_t - tile
            v_apart, f_apart = point_pitch(tiles * v_pitch, LANES), point_pitch(tiles * f_pitch, LANES)
            transform_inputs(grid, g.r_h, g.r_w, x, v_pitch, tile, tiles, v, v_apart)
            transform_filters(grid, dy, f_pitch, tile, tiles, f, f_apart)
            for i in range(groups):
                _multiply(
                    g, at(v, i * k), v_apart, v_pitch, at(f, i * d), f_apart, f_pitch, at(m, i * d * k), m_apart,
                    tiles, d, k, block > 0, WIDTH,
                )  # fmt: skip
        # The kernels of one group follow those of another.
        first_tap = at(parts, piece * g.part + g.w_0 + (group * g.dg + d_0) * g.w_d + k_0)
        _write(g, m, m_apart, groups * d, k, first_tap)

    return Body(weight_grad)
