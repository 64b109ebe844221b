"""Winograd's minimal filtering: fewer multiplications than any direct algorithm, on the same micro-kernel.

F(4x4, 3x3) does in 36 products what a direct convolution does in 144, for the price of transforms that cost less the
more channels share them. It needs stride 1: a dilated convolution has it on each of the interleaved grids, and a
strided one in each of its phases, which the forward pass adds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from .. import arrays, machine
from ..bias import bias_grad
from ..kernels.jit import Kernel
from ..kernels.packing import pack_columns, pack_rows, packed_size
from ..kernels.tile import column_tile, panel_tile, tile_shape
from ..kernels.weight_grad import SUM_PARTS, sum_parts
from ..kernels.winograd import (
    WINOGRAD,
    WINOGRAD_WEIGHT_GRAD,
    transforms,
    winograd_correlate,
    winograd_weight_grad,
    winograd_weights,
)
from ..problem import ConvProblem, Pass
from .axes import Axis, correlation_fields, forward_axes, input_grad_axes, pack_geometry, tap_phases
from .base import Array

__all__ = ["Winograd"]

#: Points of a tile's side that keep rounding errors within the bound: where both sides have taps, so that their errors
#: multiply, and where the kernel has one row or one column. Nine points round as much as ten.
POINTS = (3, 4, 5, 6, 7)
ALONE = (*POINTS, 8, 10)
#: Outputs of a tile's side that has a single tap, a phase of several: the first that wastes least. They are copied
#: and multiplied as they are, in fewer and larger tiles.
SINGLE = (4, 3, 2, 1)
#: A product costs more by this, times the square of the points of its tile's side: longer transforms, larger errors.
PRICE = 0.005
#: Elements of transformed weights up to which they are made once, for all tasks, where more blocks of tiles than this
#: read them. More of them come so slowly from the last-level cache that each task rather makes its own.
SHARED_WEIGHTS = 1536 * 1024
SHARED = 4
#: Tiles of a block, and channels of x, with shared weights; points of a block, and channels of x, without: so that
#: transformed x stays in L2.
SHARED_TILES, SHARED_CHANNELS = 28, 128
OWN_POINTS, OWN_CHANNELS = 2048, 64
#: Channels of y of a block; fewer, where there would be fewer tasks than this.
BLOCK_CHANNELS = 128
LEAST_TASKS = 8
#: The part of the peak at which the micro-kernel runs, and the cycles in which a transform makes a vector.
EFFICIENCY = 0.75
TRANSFORM = 4
#: The cycles in which a register tile fetches and stores a vector of its sums, which matters where these are short.
CONTINUE = 1
#: weight_grad: tiles of a block, and bytes of its channels in one pixel; slices, and elements of all their parts.
SUM_TILES = 56
SUM_BYTES = 512
SLICES = 4
PARTS_LIMIT = 4 * 2**20
#: weight_grad: where there would be fewer tasks than this, slices are shorter, down to so many tiles.
SUM_TASKS = 4
LEAST_TILES = 14
#: weight_grad: most bytes of all workers' scratch; where they would be more, or tasks fewer than two a worker, blocks
#: have fewer channels, down to so many. That changes no bit: a sum is the same in any block.
SCRATCH_LIMIT = 32 * 2**20
LEAST_CHANNELS = 32


@dataclass(frozen=True)
class _Form:
    """F(m_h, r_h) x F(m_w, r_w)."""

    m_h: int
    r_h: int
    m_w: int
    r_w: int

    @property
    def points(self) -> int:
        return (self.m_h + self.r_h - 1) * (self.m_w + self.r_w - 1)

    @property
    def key(self) -> tuple[int, int, int, int]:
        return self.m_h, self.r_h, self.m_w, self.r_w


def _outputs(taps: list[int], outputs: int, alone: bool) -> int | None:
    """Return the outputs of a tile of one axis, for correlations of so many taps that share it; None without a form.

    `alone` says that the kernel has one row or one column.
    """
    most = max(taps)
    if min(taps) == 0:
        return None
    if most == 1:
        return 1 if alone else min(SINGLE, key=lambda m: math.ceil(outputs / m) * m)

    def price(m: int) -> float:
        # A single tap needs no transform.
        sizes = [(m + t - 1) * (1 + PRICE * (m + t - 1) ** 2) if t > 1 else m for t in taps]
        return math.ceil(outputs / m) * sum(sizes)

    return min((size - most + 1 for size in (ALONE if alone else POINTS) if size > most), key=price, default=None)


@dataclass(frozen=True)
class _Correlation:
    """One correlation of stride 1, on its grids, and its form; or one phase of a sum of them."""

    rows: Axis
    columns: Axis
    form: _Form

    @property
    def tiles(self) -> tuple[int, int]:
        """The tiles of one grid of one image, down and across."""
        return math.ceil(self.rows.outputs / self.form.m_h), math.ceil(self.columns.outputs / self.form.m_w)

    @property
    def grid(self) -> dict[str, int]:
        """The grids and their tiles, as the geometry has them."""
        rows, columns, (tiles_h, tiles_w) = self.rows, self.columns, self.tiles
        return {
            "stride_h": rows.stride, "stride_w": columns.stride, "grids_h": rows.grids, "grids_w": columns.grids,
            "tiles_h": tiles_h, "tiles_w": tiles_w,
        }  # fmt: skip

    @property
    def products(self) -> int:
        """The products of all tiles of an image, for each pair of channels."""
        return self.form.points * math.prod(self.tiles) * self.rows.grids * self.columns.grids

    @property
    def direct(self) -> int:
        """The same without a form."""
        return self.rows.taps * self.columns.taps * self.rows.out * self.columns.out


@lru_cache(maxsize=1024)
def _correlations(problem: ConvProblem, pass_: Pass) -> list[_Correlation]:
    """Return the correlations that a pass consists of; none where they save no products.

    Those of a strided forward pass are added, tile by tile, so their tiles have the same outputs.
    """
    if pass_ == "input_grad":
        pairs = input_grad_axes(problem)
    else:
        rows, columns = map(tap_phases, forward_axes(problem))
        pairs = list(product(rows, columns))
    alone = min(problem.kh, problem.kw) == 1
    found = []
    for pair in pairs:
        together = pairs if pass_ == "forward" else [pair]
        m_h, m_w = (_outputs([axes[i].taps for axes in together], pair[i].outputs, alone) for i in (0, 1))
        if m_h is None or m_w is None:
            return []
        found.append(_Correlation(*pair, _Form(m_h, pair[0].taps, m_w, pair[1].taps)))
    return found if sum(c.products for c in found) < sum(c.direct for c in found) else []


@dataclass(frozen=True)
class _Step:
    """One correlation, or a sum of them: how w is packed for it, its geometry, and the elements it needs."""

    packs: list[Array]
    geometry: Array
    packed: int
    transformed: int

    @property
    def scratch(self) -> int:
        return int(self.geometry["scratch"][0])


def _even(size: int, limit: int, multiple: int = 1) -> int:
    """Return the block that cuts `size` into equal parts of about `limit` at most, a multiple of `multiple`."""
    return math.ceil(size / math.ceil(size / limit) / multiple) * multiple


def _point_pitch(size: int, lanes: int) -> int:
    """Return the distance between points' data, as the kernels have it."""
    return (math.ceil(size / lanes) | 1) * lanes


def _form_fields(problem: ConvProblem, form: _Form) -> dict[str, int]:
    """Return a form as the geometry has it."""
    return {
        **transforms(problem.dtype.name, *form.key), "m_h": form.m_h, "r_h": form.r_h, "m_w": form.m_w, "r_w": form.r_w,
    }  # fmt: skip


def _step(problem: ConvProblem, phases: list[_Correlation], backward: bool, bias: bool) -> _Step:
    """Describe a correlation, or the sum of several phases."""
    mr, nr, lanes = tile_shape(problem.dtype.itemsize)
    sides = [correlation_fields(problem, c.rows, c.columns, backward) for c in phases]
    grids = [c.grid for c in phases]
    groups, cg, dg = (sides[0][name] for name in ("groups", "cg", "dg"))
    tiles = _tiles(sides[0] | grids[0])
    points, all_points = max(c.form.points for c in phases), sum(c.form.points for c in phases)
    blocks = math.ceil(tiles / SHARED_TILES)
    shared = blocks > SHARED and all_points * cg * dg <= SHARED_WEIGHTS
    block_t = _even(tiles, SHARED_TILES if shared else OWN_POINTS // points)
    width = nr * lanes
    block_k = min(cg, _even(cg, SHARED_CHANNELS if shared else OWN_CHANNELS, lanes))
    blocks_t = math.ceil(tiles / block_t)
    block_d = _even(dg, max(width, min(BLOCK_CHANNELS, dg * blocks_t * groups // LEAST_TASKS)), width)
    blocks_d = math.ceil((dg - lanes + 1) / block_d)
    v = points * _point_pitch(block_t * (block_k + lanes), lanes)
    u = 0 if shared else points * _point_pitch((block_k + lanes) * width, lanes)
    m = points * _point_pitch(block_t * (block_d + lanes), lanes)
    packs: list[Array] = []
    records: list[Array] = []
    packed = transformed = 0
    for correlation, side, grid in zip(phases, sides, grids, strict=True):
        rows, columns, form = correlation.rows, correlation.columns, correlation.form
        packs.append(pack_geometry(problem, rows, columns, backward, width, packed))
        fields = {name: value for name, value in side.items() if name in WINOGRAD.names}
        records.append(
            WINOGRAD.record(
                fields | grid | _form_fields(problem, form) | {
                    "block_t": block_t, "block_k": block_k, "block_d": block_d, "shared": shared,
                    "add_bias": bias and not records, "packed_0": packed, "transformed_0": transformed,
                    "s_u": v, "s_m": v + u, "scratch": arrays.apart(v + u + m, problem.dtype.itemsize),
                    "tasks": groups * blocks_t * blocks_d, "tile": panel_tile(problem.dtype.name, mr, nr),
                }
            )
        )  # fmt: skip
        packed += packed_size(groups, dg, rows.taps * columns.taps * cg, lanes)
        transformed += groups * math.ceil(dg / width) * form.points * _point_pitch(cg * width, lanes) if shared else 0
    return _Step(packs, np.concatenate(records), packed, transformed)


@lru_cache(maxsize=1024)
def _steps(problem: ConvProblem, pass_: Pass, bias: bool) -> list[_Step]:
    found = _correlations(problem, pass_)
    if pass_ == "forward":
        return [_step(problem, found, False, bias)]
    return [_step(problem, [correlation], True, False) for correlation in found]


def _sum_blocks(problem: ConvProblem, channels: int) -> int:
    """Return the blocks of so many channels of x and of y."""
    lanes = machine.lanes(problem.dtype.itemsize)
    cg, dg = ((size - lanes + 1) / min(size, channels) for size in (problem.cg, problem.dg))
    return math.ceil(cg) * math.ceil(dg) * problem.groups


def _sum_scratch(problem: ConvProblem, form: _Form, channels: int, block_t: int) -> dict[str, int]:
    """Return where a worker keeps transformed dy and the sums, behind transformed x, and all that it takes."""
    lanes = machine.lanes(problem.dtype.itemsize)
    block_k, block_d = min(problem.cg, channels), min(problem.dg, channels)
    v, f = (form.points * _point_pitch(block_t * (block + lanes), lanes) for block in (block_k, block_d))
    m = form.points * _point_pitch((block_k + lanes) * (block_d + lanes), lanes)
    scratch = arrays.apart(v + f + m, problem.dtype.itemsize)
    return {"block_t": block_t, "block_k": block_k, "block_d": block_d, "s_dy": v, "s_m": v + f, "scratch": scratch}


@lru_cache(maxsize=1024)
def _weight_grad_steps(problem: ConvProblem, accumulate: bool, workers: int) -> tuple[list[Array], Array]:
    """Describe the products of all phases, each of which makes its own kernel positions, and the sum of the slices.

    The kernel is what comes out, and a tile of dy is the filter: a form's outputs and taps change places.
    """
    mr, nr, _ = tile_shape(problem.dtype.itemsize)
    found = _correlations(problem, "weight_grad")
    cg, dg, part = problem.cg, problem.dg, math.prod(problem.w_shape)
    channels, limit = SUM_BYTES // problem.dtype.itemsize, SCRATCH_LIMIT // problem.dtype.itemsize
    blocks = _sum_blocks(problem, channels)
    grids = [c.grid for c in found]
    tiles = [_tiles({"n": problem.n} | grid) for grid in grids]
    few = min(math.ceil(SUM_TASKS / _sum_blocks(problem, channels // 2)), min(tiles) // LEAST_TILES)
    slices = max(1, min(SLICES // blocks, max(few, min(tiles) // SUM_TILES), PARTS_LIMIT // part))
    blocks_t = [_even(math.ceil(count / slices), SUM_TILES) for count in tiles]

    def scratch() -> list[dict[str, int]]:
        return [_sum_scratch(problem, c.form, channels, block) for c, block in zip(found, blocks_t, strict=True)]

    while channels > LEAST_CHANNELS and (
        slices * _sum_blocks(problem, channels) < 2 * workers or workers * max(s["scratch"] for s in scratch()) > limit
    ):
        channels //= 2
    products = []
    for correlation, grid, sizes in zip(found, grids, scratch(), strict=True):
        rows, columns, form = correlation.rows, correlation.columns, correlation.form
        products.append(
            WINOGRAD_WEIGHT_GRAD.record(
                grid | sizes | _form_fields(problem, _Form(form.r_h, form.m_h, form.r_w, form.m_w)) | {
                    "n": problem.n, "groups": problem.groups, "h": problem.h, "w": problem.w, "c": problem.c,
                    "cg": cg, "dg": dg, "top": rows.before, "left": columns.before, "p": rows.out, "q": columns.out,
                    "slices": slices, "part": part,
                    "w_0": (rows.first_tap * problem.kw + columns.first_tap) * cg, "w_d": problem.kh * problem.kw * cg,
                    "w_r": rows.tap_step * problem.kw * cg, "w_q": columns.tap_step * cg,
                    "tasks": slices * _sum_blocks(problem, channels), "tile": column_tile(problem.dtype.name, mr, nr),
                }
            )
        )  # fmt: skip
    total = SUM_PARTS.record(
        {
            "slices": slices, "part": part, "groups": 1, "depth": part // problem.d, "dg": problem.d, "swap": 0,
            "accumulate": accumulate, "tasks": problem.d,
        }
    )  # fmt: skip
    return products, total


def _tiles(g: Any) -> int:
    return int(g["n"] * g["grids_h"] * g["grids_w"] * g["tiles_h"] * g["tiles_w"])


def _cycles(g: Any, lanes: int, inputs: int, outputs: int, weights: float) -> float:
    """Return the cycles of a correlation: its products', and its transforms', of channels a tile and of weights."""
    points = (g["m_h"] + g["r_h"] - 1) * (g["m_w"] + g["r_w"] - 1)
    products = _tiles(g) * g["cg"] * g["dg"] / (2 * EFFICIENCY)
    transforms = TRANSFORM * (_tiles(g) * (inputs + outputs) + weights)
    return float(g["groups"] * points * (products + transforms) / lanes)


class Winograd:
    """Winograd's minimal filtering F(4, 3) and its kin, blocked so that transformed data stay in L2."""

    name = "winograd"
    summary = "Winograd's minimal filtering, with transforms over channels and the same micro-kernel"

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Small kernels, with a stride or without, and a vector of channels in each group."""
        lanes = machine.lanes(problem.compute_dtype.itemsize)
        if min(problem.cg, problem.dg) < lanes:
            return f"it needs {lanes} channels in each group, of x and of y"
        found = _correlations(problem, pass_)
        if not found:
            (sh, sw), kernels = problem.stride, f"{problem.kh}x{problem.kw} kernels"
            return f"it saves nothing on {kernels} with stride {sh}x{sw} and {problem.oh}x{problem.ow} outputs"
        if pass_ == "forward" and len(found) > 1 and problem.dg % lanes:
            return f"its strided forward pass needs a multiple of {lanes} channels of y in each group"
        return None

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Packed and transformed weights, each thread's blocks, and the parts of the weight gradient."""
        problem = replace(problem, dtype=problem.compute_dtype)
        if not problem.n:
            return 0
        workers = machine.workers(problem.flops)
        if pass_ == "weight_grad":
            products, total = _weight_grad_steps(problem, False, workers)
            elements = int(total["slices"][0] * total["part"][0])
            elements += workers * max(int(g["scratch"][0]) for g in products)
        else:
            steps = _steps(problem, pass_, True)
            elements = max(s.packed + s.transformed + s.scratch * workers for s in steps)
        return elements * problem.dtype.itemsize

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """The products of all tiles, and the transforms' vectors, read and written."""
        problem = replace(problem, dtype=problem.compute_dtype)
        lanes = machine.lanes(problem.dtype.itemsize)
        cg, dg = problem.cg, problem.dg
        if pass_ == "weight_grad":
            block = SUM_BYTES // problem.dtype.itemsize
            inputs, outputs = cg * -(-dg // block), dg * -(-cg // block)
            total = 0.0
            for (g,) in _weight_grad_steps(problem, False, 1)[0]:
                # Sums are continued from block to block of tiles, and transformed in each slice.
                continued = _tiles(g) / g["block_t"] * CONTINUE / TRANSFORM
                total += _cycles(g, lanes, inputs, outputs, cg * dg * (continued + g["slices"]))
            return total
        total = 0.0
        for g in np.concatenate([step.geometry for step in _steps(problem, pass_, False)]):
            weights = g["cg"] * g["dg"] * (1 if g["shared"] else _tiles(g) / g["block_t"])
            total += _cycles(g, lanes, g["cg"] * -(-g["dg"] // g["block_d"]), g["dg"], weights)
        return float(total)

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Correlate x with w."""
        self._correlate(problem, _steps(problem, "forward", b is not None), x, w, b, y, pack_columns)

    def input_grad(self, problem: ConvProblem, dy: Array, w: Array, dx: Array) -> None:
        """Correlate dy with the flipped w, phase by phase."""
        self._correlate(problem, _steps(problem, "input_grad", False), dy, w, None, dx, pack_rows)

    def _correlate(
        self,
        problem: ConvProblem,
        steps: list[_Step],
        x: Array,
        w: Array,
        b: Array | None,
        y: Array,
        pack: Callable[[int, int], Kernel],
    ) -> None:
        _, nr, lanes = tile_shape(problem.dtype.itemsize)
        workers = machine.workers(problem.flops)
        x, w, y = x.reshape(-1), w.reshape(-1), y.reshape(-1)
        packed = arrays.empty((max(s.packed for s in steps),), problem.dtype)
        transformed = arrays.empty((max(s.transformed for s in steps),), problem.dtype)
        scratch = arrays.empty((max(s.scratch for s in steps) * workers,), problem.dtype)
        for step in steps:
            weights = transformed if step.transformed else packed
            for geometry in step.packs:
                pack(nr * lanes, lanes).run(w, packed, geometry=geometry, workers=workers)
            if step.transformed:
                for phase in range(len(step.geometry)):
                    geometry = step.geometry[phase : phase + 1]
                    winograd_weights(nr * lanes, lanes).run(packed, transformed, geometry=geometry, workers=workers)
            winograd_correlate(nr * lanes, lanes).run(
                x, weights, y if b is None else b, y, scratch, geometry=step.geometry, workers=workers
            )

    def weight_grad(
        self, problem: ConvProblem, x: Array, dy: Array, dw: Array, accumulate: bool, db: Array | None = None
    ) -> None:
        """Correlate x with dy, tile by tile, and add the slices."""
        if db is not None:
            bias_grad(dy.reshape(-1, problem.d), db, accumulate)
        _, nr, lanes = tile_shape(problem.dtype.itemsize)
        workers = machine.workers(problem.flops)
        products, total = _weight_grad_steps(problem, accumulate, workers)
        # One slice needs no sum.
        slices, part = int(total["slices"][0]), int(total["part"][0])
        direct = slices == 1 and not accumulate
        parts = dw if direct else arrays.empty((slices * part,), problem.dtype)
        scratch = arrays.empty((max(int(g["scratch"][0]) for g in products) * workers,), problem.dtype)
        for geometry in products:
            winograd_weight_grad(nr * lanes, lanes).run(
                x.reshape(-1), dy.reshape(-1), parts.reshape(-1), scratch, geometry=geometry, workers=workers
            )
        if not direct:
            sum_parts().run(parts, dw.reshape(-1), geometry=total, workers=workers)
