"""Winograd's minimal filtering: fewer multiplications than any direct algorithm, on the same micro-kernel.

F(4x4, 3x3) does in 36 products what a direct convolution does in 144, for the price of transforms that cost less the
more channels share them. It needs stride 1: a dilated convolution has it on each of the interleaved grids, and a
strided input gradient in each of its phases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

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
from .axes import Axis, correlation_fields, forward_axes, input_grad_axes, pack_geometry
from .base import Array

__all__ = ["Winograd"]

#: Points of a tile's side that keep rounding errors within the bound: where both sides have taps, so that their errors
#: multiply, and where one side has them alone. Nine points round as much as ten.
POINTS = (3, 4, 5, 6, 7)
ALONE = (*POINTS, 8, 10)
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
#: weight_grad: tiles and channels of one block, slices, and elements of all slices' parts.
SUM_TILES = 56
SUM_CHANNELS = 64
SLICES = 16
PARTS_LIMIT = 4 * 2**20


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


def _tile(taps: int, outputs: int, points: tuple[int, ...]) -> tuple[int, int] | None:
    """Return the outputs of a tile of one axis, and the products that all of its tiles take; None without a form."""
    if taps == 1:
        return 1, outputs
    tiles = [(size - taps + 1, math.ceil(outputs / (size - taps + 1)) * size) for size in points if size > taps]
    return min(tiles, key=lambda tile: tile[1] * (1 + PRICE * (tile[0] + taps - 1) ** 2), default=None)


def _form(rows: int, columns: int, p: int, q: int) -> _Form | None:
    """Return the form for ``rows x columns`` taps and ``p x q`` outputs; None where it takes more products."""
    if not rows or not columns:
        return None
    points = ALONE if min(rows, columns) == 1 else POINTS
    high, wide = _tile(rows, p, points), _tile(columns, q, points)
    if high is None or wide is None or high[1] * wide[1] > rows * columns * p * q:
        return None
    return _Form(high[0], rows, wide[0], columns)


def _saves(forms: list[_Form | None]) -> bool:
    """Whether there is a form for each correlation, and one of them saves products: another's may be a single tap."""
    return all(forms) and any(form.points > 1 for form in forms if form)


@dataclass(frozen=True)
class _Step:
    """One correlation: how w is packed for it, its geometry, and the elements it needs."""

    pack: Array
    geometry: Array
    packed: int
    shared: int

    @property
    def scratch(self) -> int:
        return int(self.geometry["scratch"][0])


def _even(size: int, limit: int, multiple: int = 1) -> int:
    """Return the block that cuts `size` into equal parts of about `limit` at most, a multiple of `multiple`."""
    return math.ceil(size / math.ceil(size / limit) / multiple) * multiple


def _apart(size: int, lanes: int) -> int:
    """Return the distance between points' data, as the kernels have it."""
    return (math.ceil(size / lanes) | 1) * lanes


def _step(problem: ConvProblem, rows: Axis, columns: Axis, form: _Form, backward: bool, bias: bool) -> _Step:
    mr, nr, lanes = tile_shape(problem.dtype.itemsize)
    sides = correlation_fields(problem, rows, columns, backward)
    n, groups, cg, dg = (sides[name] for name in ("n", "groups", "cg", "dg"))
    tiles_h = math.ceil(math.ceil(rows.out / rows.dilation) / form.m_h)
    tiles_w = math.ceil(math.ceil(columns.out / columns.dilation) / form.m_w)
    tiles = n * rows.dilation * columns.dilation * tiles_h * tiles_w
    blocks = math.ceil(tiles / SHARED_TILES)
    shared = blocks > SHARED and form.points * cg * dg <= SHARED_WEIGHTS
    block_t = _even(tiles, SHARED_TILES if shared else OWN_POINTS // form.points)
    width = nr * lanes
    block_k = min(cg, _even(cg, SHARED_CHANNELS if shared else OWN_CHANNELS, lanes))
    blocks_t = math.ceil(tiles / block_t)
    block_d = _even(dg, max(width, min(BLOCK_CHANNELS, dg * blocks_t * groups // LEAST_TASKS)), width)
    blocks_d = math.ceil((dg - lanes + 1) / block_d)
    packed = packed_size(groups, dg, rows.taps * columns.taps * cg, lanes)
    v = form.points * _apart(block_t * (block_k + lanes), lanes)
    u = 0 if shared else form.points * _apart((block_k + lanes) * width, lanes)
    m = form.points * _apart(block_t * (block_d + lanes), lanes)
    geometry = WINOGRAD.record(
        sides
        | {
            "tiles_h": tiles_h, "tiles_w": tiles_w, "block_t": block_t, "block_k": block_k, "block_d": block_d,
            "shared": shared, "add_bias": bias, "s_u": v, "s_m": v + u,
            "scratch": arrays.apart(v + u + m, problem.dtype.itemsize),
            "tasks": groups * blocks_t * blocks_d,
            "tile": panel_tile(problem.dtype.name, mr, nr), **transforms(problem.dtype.name, *form.key),
            "m_h": form.m_h, "r_h": form.r_h, "m_w": form.m_w, "r_w": form.r_w,
        }
    )  # fmt: skip
    transformed = groups * math.ceil(dg / width) * form.points * _apart(cg * width, lanes) if shared else 0
    pack = pack_geometry(problem, rows, columns, backward, width)
    return _Step(pack, geometry, packed, transformed)


def _forms(problem: ConvProblem, pass_: Pass) -> list[tuple[Axis, Axis, _Form | None]]:
    axes = input_grad_axes(problem) if pass_ == "input_grad" else [forward_axes(problem)]
    return [
        (
            rows,
            columns,
            _form(rows.taps, columns.taps, -(-rows.out // rows.dilation), -(-columns.out // columns.dilation)),
        )
        for rows, columns in axes
    ]


@lru_cache(maxsize=1024)
def _steps(problem: ConvProblem, pass_: Pass, bias: bool) -> list[_Step]:
    steps = []
    for rows, columns, form in _forms(problem, pass_):
        assert form is not None
        steps.append(_step(problem, rows, columns, form, pass_ == "input_grad", bias))
    return steps


def _filter_form(problem: ConvProblem) -> _Form | None:
    """Return the form of the weight gradient: the kernel is what comes out, a tile of dy is the filter."""
    rows, columns = forward_axes(problem)
    p, q = -(-rows.out // rows.dilation), -(-columns.out // columns.dilation)
    form = _form(problem.kh, problem.kw, p, q)
    return form and _Form(form.r_h, form.m_h, form.r_w, form.m_w)


@lru_cache(maxsize=1024)
def _weight_grad_steps(problem: ConvProblem, accumulate: bool) -> tuple[Array, Array]:
    mr, nr, lanes = tile_shape(problem.dtype.itemsize)
    form = _filter_form(problem)
    assert form is not None
    rows, columns = forward_axes(problem)
    tiles_h = math.ceil(math.ceil(rows.out / rows.dilation) / form.r_h)
    tiles_w = math.ceil(math.ceil(columns.out / columns.dilation) / form.r_w)
    tiles = problem.n * rows.dilation * columns.dilation * tiles_h * tiles_w
    cg, dg, part = problem.cg, problem.dg, math.prod(problem.w_shape)
    block_k, block_d = min(cg, SUM_CHANNELS), min(dg, SUM_CHANNELS)
    blocks = math.ceil((cg - lanes + 1) / block_k) * math.ceil((dg - lanes + 1) / block_d) * problem.groups
    slices = max(1, min(SLICES // blocks, tiles // SUM_TILES, PARTS_LIMIT // part))
    block_t = _even(math.ceil(tiles / slices), SUM_TILES)
    v, f = (form.points * _apart(block_t * (block + lanes), lanes) for block in (block_k, block_d))
    m = form.points * _apart((block_k + lanes) * (block_d + lanes), lanes)
    product = WINOGRAD_WEIGHT_GRAD.record(
        {
            "n": problem.n, "groups": problem.groups, "h": problem.h, "w": problem.w, "c": problem.c, "cg": cg,
            "dg": dg, "dilation_h": rows.dilation, "dilation_w": columns.dilation,
            "top": rows.before, "left": columns.before, "p": rows.out, "q": columns.out,
            "tiles_h": tiles_h, "tiles_w": tiles_w, "block_t": block_t, "block_k": block_k, "block_d": block_d,
            "slices": slices, "part": part, "s_dy": v, "s_m": v + f,
            "scratch": arrays.apart(v + f + m, problem.dtype.itemsize), "tasks": slices * blocks,
            "tile": column_tile(problem.dtype.name, mr, nr), **transforms(problem.dtype.name, *form.key),
            "m_h": form.m_h, "r_h": form.r_h, "m_w": form.m_w, "r_w": form.r_w,
        }
    )  # fmt: skip
    total = SUM_PARTS.record(
        {
            "slices": slices, "part": part, "groups": 1, "depth": part // problem.d, "dg": problem.d, "swap": 0,
            "accumulate": accumulate, "tasks": problem.d,
        }
    )  # fmt: skip
    return product, total


def _tiles(g: Any) -> int:
    return int(g["n"] * g["dilation_h"] * g["dilation_w"] * g["tiles_h"] * g["tiles_w"])


def _cycles(g: Any, lanes: int, inputs: int, outputs: int, weights: float) -> float:
    """Return the cycles of a pass: its products, and its transforms, in channels of x and y a tile and in weights."""
    points = (g["m_h"] + g["r_h"] - 1) * (g["m_w"] + g["r_w"] - 1)
    products = _tiles(g) * g["cg"] * g["dg"] / (2 * EFFICIENCY)
    transforms = TRANSFORM * (_tiles(g) * (inputs + outputs) + weights)
    return float(g["groups"] * points * (products + transforms) / lanes)


class Winograd:
    """Winograd's minimal filtering F(4, 3) and its kin, blocked so that transformed data stay in L2."""

    name = "winograd"
    summary = "Winograd's minimal filtering, with transforms over channels and the same micro-kernel"

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Stride 1, which an input gradient's phases have of any; small kernels; a vector of channels in each group."""
        lanes = machine.lanes(problem.compute_dtype.itemsize)
        if min(problem.cg, problem.dg) < lanes:
            return f"it needs {lanes} channels in each group, of x and of y"
        if problem.stride != (1, 1) and pass_ != "input_grad":
            return "its forward pass and weight gradient need stride 1"
        forward = pass_ != "weight_grad"
        forms = [form for *_, form in _forms(problem, pass_)] if forward else [_filter_form(problem)]
        if not _saves(forms):
            return f"it saves nothing on {problem.kh}x{problem.kw} kernels and {problem.oh}x{problem.ow} outputs"
        return None

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Packed and transformed weights, each thread's blocks, and the parts of the weight gradient."""
        problem = replace(problem, dtype=problem.compute_dtype)
        if not problem.n:
            return 0
        if pass_ == "weight_grad":
            product, _ = _weight_grad_steps(problem, False)
            elements = int(product["scratch"][0]) * machine.workers(problem.flops) + int(
                product["slices"][0] * product["part"][0]
            )
        else:
            steps = _steps(problem, pass_, True)
            elements = max(s.packed + s.shared + s.scratch * machine.workers(problem.flops) for s in steps)
        return elements * problem.dtype.itemsize

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """The products of all tiles, and the transforms' vectors, read and written."""
        problem = replace(problem, dtype=problem.compute_dtype)
        lanes = machine.lanes(problem.dtype.itemsize)
        cg, dg = problem.cg, problem.dg
        if pass_ == "weight_grad":
            product, _ = _weight_grad_steps(problem, False)
            return _cycles(product[0], lanes, cg * -(-dg // SUM_CHANNELS), dg * -(-cg // SUM_CHANNELS), 0)
        total = 0.0
        for step in _steps(problem, pass_, False):
            g = step.geometry[0]
            weights = g["cg"] * g["dg"] * (1 if step.shared else _tiles(g) / g["block_t"])
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
        transformed = arrays.empty((max(s.shared for s in steps),), problem.dtype)
        scratch = arrays.empty((max(s.scratch for s in steps) * workers,), problem.dtype)
        for step in steps:
            weights = packed
            pack(nr * lanes, lanes).run(w, packed, geometry=step.pack, workers=workers)
            if step.shared:
                weights = transformed
                winograd_weights(nr * lanes, lanes).run(packed, weights, geometry=step.geometry, workers=workers)
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
        product, total = _weight_grad_steps(problem, accumulate)
        # One slice needs no sum.
        direct = product["slices"][0] == 1 and not accumulate
        parts = dw if direct else arrays.empty((int(product["slices"][0] * product["part"][0]),), problem.dtype)
        scratch = arrays.empty((int(product["scratch"][0]) * workers,), problem.dtype)
        winograd_weight_grad(nr * lanes, lanes).run(
            x.reshape(-1), dy.reshape(-1), parts.reshape(-1), scratch, geometry=product, workers=workers
        )
        if not direct:
            sum_parts().run(parts, dw.reshape(-1), geometry=total, workers=workers)
