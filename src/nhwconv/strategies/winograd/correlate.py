"""The forward pass, and one phase of the input gradient: a matrix product for each point, between transforms.

A task works on a block of tiles whose transformed data stay in L2, and transforms the weights it needs beside them,
unless they are shared by so many tasks that they were transformed before. A strided forward pass is a sum over phases:
one record of the geometry each, all with the same tiles and blocks.
"""

from __future__ import annotations

import math
from functools import cache

from ...codegen.packing import pack
from ...codegen.simd import at, integers, numbers
from ...codegen.tile import Operand, Rows, Sum, no_prefetch, panel_tile, tile_product, tile_shape
from ...problem import ConvProblem
from ...program import Part, Step, places
from ...runtime import arrays
from ...runtime.jit import Body, ceil_div, device
from ...runtime.records import as_kind, record
from ..axes import correlation_fields, packings
from ..base import Wanted
from ..blocking import channel_block, channel_blocks, largest_block, point_pitch
from .constants import CUT
from .forms import Filtered, bundles_of, cycles, lies_apart
from .tiles import Tiles, groups_of, points_of, tiles_of, transform_inputs, transform_outputs, transform_weights

__all__ = ["Winograd", "correlate", "correlate_steps", "transform_all_weights"]


class Winograd(Tiles):
    """One correlation, or one phase of a sum of them."""

    phases: int
    shared: int  #: whether the weights are transformed already
    add_bias: int
    packed_0: int  #: where the phase's weights are, packed and transformed
    transformed_0: int
    s_u: int  #: where a worker's scratch holds transformed weights, and products; transformed x comes first
    s_m: int


# ------------------------------------------------------------------------------------------------- plan


def _blocks(problem: ConvProblem, phases: list[Filtered], groups: int, cg: int, dg: int) -> dict[str, int]:
    """Return the blocks of a task, and where its scratch holds what."""
    _, nr, lanes = tile_shape(problem.dtype.itemsize)
    width, tiles = nr * lanes, problem.n * phases[0].all_tiles
    points, all_points = max(c.form.points for c in phases), sum(c.form.points for c in phases)
    shared = math.ceil(tiles / CUT.shared_tiles) > CUT.shared and all_points * cg * dg <= CUT.shared_weights
    block_t = largest_block(tiles, CUT.shared_tiles if shared else CUT.own_points // points)
    block_k = min(cg, largest_block(cg, CUT.shared_channels if shared else CUT.own_channels, lanes))
    blocks_t = math.ceil(tiles / block_t)
    most_d = max(width, min(CUT.block_channels, dg * blocks_t * groups // CUT.least_tasks))
    block_d = largest_block(dg, most_d, width)
    least = math.ceil(CUT.least_tasks / blocks_t)
    bundles = bundles_of(groups, (cg, dg), lanes, least) if block_k >= cg and block_d >= dg else groups
    together = math.ceil(groups / bundles)
    v = points * point_pitch(block_t * together * (block_k + lanes), lanes)
    u = 0 if shared else points * point_pitch((block_k + lanes) * width, lanes)
    m = points * point_pitch(block_t * together * (block_d + lanes), lanes)
    return {
        "shared": shared, "block_t": block_t, "block_k": block_k, "block_d": block_d, "bundles": bundles,
        "s_u": v, "s_m": v + u, "scratch": arrays.apart(v + u + m, problem.dtype.itemsize),
    }  # fmt: skip


def correlate_steps(problem: ConvProblem, phases: list[Filtered], backward: bool, wanted: Wanted) -> list[Step]:
    """Return the steps of a correlation, or of the sum of several phases: packing, transformed weights, and itself."""
    itemsize, dtype = problem.dtype.itemsize, problem.dtype_name
    mr, nr, lanes = tile_shape(itemsize)
    width = nr * lanes
    fields = [correlation_fields(problem, c.rows, c.columns, backward) for c in phases]
    groups, cg, dg = (fields[0][name] for name in ("groups", "cg", "dg"))
    blocks = _blocks(problem, phases, groups, cg, dg)
    packs, pack_tasks, ends = packings(
        problem, [(c.rows, c.columns) for c in phases], backward, width, lanes, wanted.weights
    )
    records: list[Winograd] = []
    transformed = 0
    for c, side, packed_0 in zip(phases, fields, ends[:-1], strict=True):
        records.append(
            Winograd(
                **side, **c.grid, **c.form.fields(dtype), **blocks, phases=len(phases),
                add_bias=wanted.bias and not records, packed_0=packed_0,
                transformed_0=transformed, tile=panel_tile(dtype, mr, nr),
            )
        )  # fmt: skip
        transformed += groups * math.ceil(dg / width) * c.form.points * point_pitch(cg * width, lanes)
    packed = Part(ends[-1] * itemsize, "packed weights")
    body = pack(backward, wanted.weights, width, lanes, itemsize)
    steps = [Step(body, tuple(packs), pack_tasks, places("w", packed))]
    weights = packed
    if blocks["shared"]:
        weights = Part(transformed * itemsize, "transformed weights")
        tasks = len(records) * groups * math.ceil(dg / width) * channel_blocks(cg, blocks["block_k"], lanes)
        body = transform_all_weights(width, lanes, itemsize)
        steps.append(Step(body, tuple(records), tasks, places(packed, weights)))
    scratch = Part(blocks["scratch"] * itemsize * wanted.workers)
    operands = places(
        "dy" if backward else "x", weights, "b" if wanted.bias else weights, "dx" if backward else "y", scratch
    )
    tasks = blocks["bundles"] * math.ceil(problem.n * phases[0].all_tiles / blocks["block_t"])
    tasks *= channel_blocks(dg, blocks["block_d"], lanes)
    price = sum(_price(g, (mr, nr, lanes), lies_apart(problem)) for g in records)
    return [*steps, Step(correlate(width, lanes, itemsize), tuple(records), tasks, operands, price)]


def _price(g: Winograd, shape: tuple[int, int, int], apart: bool) -> float:
    """Return the cycles of one phase."""
    inputs, outputs = (channels / shape[2] for channels in (g.cg, g.dg))
    weights = g.cg * math.ceil(outputs) * (1 if g.shared else tiles_of(g) / g.block_t)
    inputs *= math.ceil(g.dg / g.block_d)
    # What is written is fetched before.
    return float(cycles(g, inputs + outputs, apart * (inputs + 2 * outputs), weights, shape))


# ----------------------------------------------------------------------------------------------- bodies


@cache
def transform_all_weights(WIDTH: int, LANES: int, ITEMSIZE: int) -> Body:
    """Make the body that transforms packed weights: their taps become points, and all else keeps its order.

    It takes the packed weights and the transformed ones; a task is a block of channels of a panel, of a phase.
    """

    def transform_all_weights(operands, geometry, worker, task, fresh):
        cut = record(geometry, 0, Winograd)
        table = integers(operands)
        packed, transformed = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        padded, panels = ceil_div(cut.dg, LANES) * LANES, ceil_div(cut.dg, WIDTH)
        blocks = channel_blocks(cut.cg, cut.block_k, LANES)
        (k, channels), rest = channel_block(task % blocks, cut.cg, cut.block_k, LANES), task // blocks
        j, rest = rest % panels * WIDTH, rest // panels
        group, g = rest % cut.groups, record(geometry, rest // cut.groups, Winograd)
        width = min(WIDTH, padded - j)
        source = g.packed_0 + (group * padded + j) * g.r_h * g.r_w * g.cg + k * width
        apart = point_pitch(g.cg * WIDTH, LANES)
        target = g.transformed_0 + (group * panels + j // WIDTH) * points_of(as_kind(g, Tiles)) * apart + k * width
        transform_weights(
            as_kind(g, Tiles), at(packed, source), g.cg * width, at(transformed, target), apart, channels * width
        )

    return Body(transform_all_weights)


@device
def _multiply(g, v, v_apart, v_pitch, u, u_apart, m, m_apart, m_pitch, tiles, columns, channels, width, add):
    """Multiply, at each point, ``(tiles, channels)`` numbers of x with a panel of weights."""
    for point in range(points_of(as_kind(g, Tiles))):
        target = Rows(at(m, point * m_apart), m_pitch)
        tile_product(
            g.tile,
            tiles,
            columns,
            Sum(1, 1, channels),
            Operand(at(v, point * v_apart), 0, 0, v_pitch, 1),
            Operand(at(u, point * u_apart), 0, 0, 0, width),
            add,
            target,
            target,
            0,
            no_prefetch(v),
        )


@device
def _weights(g, weights, own, group, j, k, channels, width, LANES, WIDTH):
    """Return some rows of a group's panel of transformed weights, and how far apart its points are."""
    padded = ceil_div(g.dg, LANES) * LANES
    if g.shared:
        apart = point_pitch(g.cg * WIDTH, LANES)
        panel = group * ceil_div(g.dg, WIDTH) + j // WIDTH
        return at(weights, g.transformed_0 + panel * points_of(as_kind(g, Tiles)) * apart + k * width), apart
    apart = point_pitch(channels * width, LANES)
    source = at(weights, g.packed_0 + (group * padded + j) * g.r_h * g.r_w * g.cg + k * width)
    transform_weights(as_kind(g, Tiles), source, g.cg * width, own, apart, channels * width)
    return own, apart


@device
def _phase(g, x, weights, scratch, first, groups, d_0, width_d, tile, tiles, LANES, WIDTH):
    """Sum the products of one phase at all points, for some groups from the first on, over blocks of channels."""
    padded = ceil_div(g.dg, LANES) * LANES
    own, m, m_pitch = at(scratch, g.s_u), at(scratch, g.s_m), groups * width_d
    m_apart = point_pitch(tiles * m_pitch, LANES)
    for block in range(channel_blocks(g.cg, g.block_k, LANES)):
        k, channels = channel_block(block, g.cg, g.block_k, LANES)
        v_pitch = groups * channels
        v_apart = point_pitch(tiles * v_pitch, LANES)
        transform_inputs(
            as_kind(g, Tiles), g.m_h, g.m_w, at(x, first * g.cg + k), v_pitch, tile, tiles, scratch, v_apart
        )
        for i in range(groups):
            for j in range(d_0, d_0 + width_d, WIDTH):
                width = min(WIDTH, padded - j)
                u, u_apart = _weights(g, weights, own, first + i, j, k, channels, width, LANES, WIDTH)
                columns = min(WIDTH, d_0 + width_d - j)
                v, target = at(scratch, i * channels), at(m, i * width_d + j - d_0)
                _multiply(
                    g, v, v_apart, v_pitch, u, u_apart, target, m_apart, m_pitch, tiles, columns, channels, width, k > 0
                )  # fmt: skip


@cache
def correlate(WIDTH: int, LANES: int, ITEMSIZE: int) -> Body:
    """Make the body; it takes x, the weights, the bias, y and scratch.

    A task is a block of tiles and channels of y, of a group or of a bundle of them.
    """

    def correlate(operands, geometry, worker, task, fresh):
        cut = record(geometry, 0, Winograd)
        table = integers(operands)
        x, weights = numbers(table[0], ITEMSIZE), numbers(table[1], ITEMSIZE)
        bias, y = numbers(table[2], ITEMSIZE), numbers(table[3], ITEMSIZE)
        scratch = at(numbers(table[4], ITEMSIZE), worker * cut.scratch)
        all_tiles = tiles_of(as_kind(cut, Tiles))
        blocks_t = ceil_div(all_tiles, cut.block_t)
        blocks_d = channel_blocks(cut.dg, cut.block_d, LANES)
        block, rest = task % blocks_t, task // blocks_t
        d_0, width_d = channel_block(rest % blocks_d, cut.dg, cut.block_d, LANES)
        first, groups = groups_of(as_kind(cut, Tiles), rest // blocks_d)
        tile = block * all_tiles // blocks_t
        tiles = (block + 1) * all_tiles // blocks_t - tile
        channel, width = first * cut.dg + d_0, groups * width_d
        for phase in range(cut.phases):
            g = record(geometry, phase, Winograd)
            _phase(g, x, weights, scratch, first, groups, d_0, width_d, tile, tiles, LANES, WIDTH)
            m_apart = point_pitch(tiles * width, LANES)
            grid, products = as_kind(g, Tiles), at(scratch, g.s_m)
            transform_outputs(
                grid,
                products,
                m_apart,
                tile,
                tiles,
                width,
                phase > 0,
                g.add_bias != 0,
                at(bias, channel),
                at(y, channel),
            )

    return Body(correlate)
