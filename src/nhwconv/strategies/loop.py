"""Loops over kernel positions and channels around the register-tile micro-kernel; no im2col.

In NHWC, for one row of the kernel, the ``(kw, c)`` values that an output pixel reads lie side by side, in x and in
w. So each pass is a short sum of plain matrix products (`nhwconv.kernels.tile`) on the arrays as they are:

- forward: a correlation of x with w;
- input_grad: a correlation of dy with the flipped w, once for every phase of the stride;
- weight_grad: a product of dy and x whose long axis is the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .. import arrays, bias, machine
from ..kernels.correlate import CORRELATE, correlate
from ..kernels.jit import Kernel
from ..kernels.narrow import NARROW, correlate_narrow
from ..kernels.packing import pack_columns, pack_rows, packed_size
from ..kernels.tile import column_tile, narrow_tiles, panel_tile, tile_shape
from ..kernels.weight_grad import SUM_PARTS, WEIGHT_GRAD, sum_parts, weight_grad
from ..problem import ConvProblem, Pass
from .axes import Axis, correlation_fields, forward_axes, input_grad_axes, pack_geometry
from .base import Array

__all__ = ["Loop"]

#: Output pixels of one task: enough to use a panel of weights many times, few enough for its x to stay in L2.
TASK_PIXELS = 1024
#: Tasks that a pass is cut into where it is large enough: fine enough for any number of threads to share.
TASKS = 64
#: Least output pixels of a task, where there are too few tasks; below that its output channels are split.
LEAST_PIXELS = 256
#: Bytes of x that a task keeps in L2 while it walks over the output channels, beside what they are read from.
TASK_BYTES = 384 * 1024
#: Products that are summed in one go: a running sum of so many equal numbers in float32 errs by 8.6e-6 at most,
#: whichever number it is. The bound is 1e-5.
SUM_STEPS = 576
#: Least bytes of a way of the L1 cache, and least ways, among the processors of the day.
L1_WAY, L1_WAYS = 4096, 8
#: Bytes of a cache line.
LINE = 64
#: What gathering an element costs, in elements read.
GATHER = 3
#: The part of the peak at which the micro-kernel runs in a pass.
EFFICIENCY = 0.9
#: Cycles of a register tile beside its sum: the call, the first and the last of it.
TILE_CYCLES = 80
#: weight_grad: tasks; pixels of a block, whose x and dy stay in cache, and least pixels of a slice.
SUM_TASKS = 16
BLOCK_PIXELS = 256
SLICE_PIXELS = 1024
#: weight_grad: channels of x and of y that a task gathers where there are more: their rows then lie close together.
BLOCK_CHANNELS = 256
#: weight_grad: bytes from one pixel of x to the next from which on blocks are copied.
FAR = 1024
#: weight_grad: the part of its cycles that it has to come down to for its two sides to change places.
SWAP = 0.95
#: weight_grad: most elements of all slices' parts.
PARTS_LIMIT = 2 * 2**20


@dataclass(frozen=True)
class _Step:
    """One correlation: its kernel, how w is packed for it, and its geometry; without taps it only fills y."""

    make: Callable[..., Kernel]
    packs: list[Array]
    geometry: Array
    packed: int

    @property
    def scratch(self) -> int:
        return int(self.geometry["scratch"][0])


def _even(size: int, parts: int, multiple: int = 1) -> int:
    """Return the block that cuts `size` into about `parts` equal blocks, a multiple of `multiple`."""
    block = math.ceil(size / max(parts, 1))
    return min(math.ceil(block / multiple) * multiple, math.ceil(size / multiple) * multiple)


def _blocking(p: int, q: int, pixels: int, rows_of: int, pixel: int, stride: int, mr: int) -> tuple[int, int]:
    """Return (block_p, block_q): the rows and columns of outputs that one task computes, about `pixels` at most.

    `pixel` is the bytes of x that a task reads of each.
    """
    limit = max(mr, min(pixels, TASK_BYTES // pixel // stride))
    block_q = q if q <= limit else _even(q, math.ceil(q / limit), mr)
    block_p = max(1, min(p, limit // block_q))
    while block_p > 1 and ((block_p - 1) * stride + rows_of) * block_q * stride * pixel > 2 * TASK_BYTES:
        block_p -= 1
    return _even(p, math.ceil(p / block_p)), block_q


def _steps(problem: ConvProblem, phases: list[tuple[Axis, Axis]], backward: bool, bias: bool) -> list[_Step]:
    """Describe the correlations of all phases: of x with w forward, of dy with w in each phase backward."""
    lanes = machine.lanes(problem.dtype.itemsize)
    dg = problem.cg if backward else problem.dg
    # Where channels of y are few, pixels go on the vectors, for all phases at once.
    few = dg < lanes and all(columns.stride == 1 for _, columns in phases)
    if few and max(columns.out for _, columns in phases) >= lanes // 2:
        return [_narrow(problem, phases, backward, bias)]
    return [_wide(problem, rows, columns, backward, bias) for rows, columns in phases]


def _packing(problem: ConvProblem, phases: list[tuple[Axis, Axis]], backward: bool) -> tuple[list[Array], list[int]]:
    """Return how each phase's weights are packed, one behind the other, and where each ends."""
    _, nr, lanes = tile_shape(problem.dtype.itemsize)
    cg, dg = (problem.dg, problem.cg) if backward else (problem.cg, problem.dg)
    packs, ends = [], [0]
    for rows, columns in phases:
        packs.append(pack_geometry(problem, rows, columns, backward, nr * lanes, ends[-1]))
        ends.append(ends[-1] + packed_size(problem.groups, dg, rows.taps * columns.taps * cg, lanes))
    return packs, ends


def _sums(rows: int, taps: int, run: int) -> dict[str, int]:
    """Return how much of ``rows`` times ``taps`` times ``run`` products is summed at a time."""
    sum_r = max(1, min(rows, SUM_STEPS // max(taps * run, 1)))
    return {"sum_r": sum_r, "sum_k": max(1, _even(run, math.ceil(run / max(1, SUM_STEPS // max(taps, 1)))))}


def _collide(pixel: int, problem: ConvProblem) -> bool:
    """Whether pixels that lie `pixel` elements apart fall into so few sets of L1 that a register tile's do not fit."""
    rows, _, _ = tile_shape(problem.dtype.itemsize)
    return rows * math.gcd(pixel * problem.dtype.itemsize, L1_WAY) > L1_WAYS * L1_WAY


def _wide(problem: ConvProblem, rows: Axis, columns: Axis, backward: bool, bias: bool) -> _Step:
    """Describe a correlation with channels on the vectors."""
    itemsize = problem.dtype.itemsize
    mr, nr, lanes = tile_shape(itemsize)
    sides = correlation_fields(problem, rows, columns, backward)
    sides |= {"R": rows.taps, "Q": columns.taps, "stride_h": rows.stride}
    n, groups, cg, dg, p, q = (sides[name] for name in ("n", "groups", "cg", "dg", "p", "q"))
    taps = rows.taps * columns.taps
    gather = taps > 0 and (
        rows.padded or columns.padded or groups > 1 or _collide(columns.stride * sides["c"], problem)
    )
    if taps == 1 and groups == 1 and all(axis.plain for axis in (rows, columns)):
        # A matrix product over all pixels.
        sides |= {"n": 1, "h": 1, "w": n * p * q, "p": 1, "q": n * p * q, "y_n": n * sides["y_n"]}
        n, p, q = 1, 1, n * p * q
    reach = (rows.taps - 1) * rows.dilation + 1
    # Where rows or columns have a single tap, only those that it reads are gathered.
    step_h, step_w = (axis.stride if gather and axis.taps == 1 else 1 for axis in (rows, columns))
    pixel = (cg + lanes if _collide(columns.stride // step_w * cg, problem) else cg) if gather else sides["c"]
    merged = columns.dilation == 1 and pixel == cg
    # Weights that stay in L2 are read by any number of tasks; more of them are read by as few as can be.
    small = taps * cg * dg * itemsize <= TASK_BYTES
    pixels = max(LEAST_PIXELS, min(TASK_PIXELS, n * p * q // TASKS)) if small else TASK_PIXELS
    block_p, block_q = _blocking(p, q, pixels, reach, cg * itemsize, rows.stride, mr)
    blocks = n * math.ceil(p / block_p) * math.ceil(q / block_q)
    block_d = _even(dg, math.ceil(TASKS / (blocks * groups)), nr * lanes)
    blocks_d = math.ceil(dg / block_d)
    held = ((block_p - 1) * (rows.stride // step_h) + reach) * pixel
    held *= (block_q - 1) * (columns.stride // step_w) + (columns.taps - 1) * columns.dilation + 1
    # Of x and the weights, one is read once and the other again and again: x for each block of channels, the weights,
    # where they do not stay in L2, for each block of outputs.
    x_again = blocks * held * (GATHER if gather else 1) * (blocks_d - 1)
    weights_again = 0 if small else taps * cg * dg * (blocks - 1)
    scratch = held if gather else 0
    geometry = CORRELATE.record(
        sides
        | {
            "stride_w": columns.stride, "block_p": block_p, "block_q": block_q, "block_d": block_d,
            "d_first": weights_again < x_again, "tasks": blocks * groups * blocks_d, "add_bias": bias,
            "gather": gather, "step_h": step_h, "step_w": step_w, "pixel": pixel,
            "scratch": arrays.apart(scratch, itemsize), "merged": merged,
            **(_sums(rows.taps, 1, columns.taps * cg) if merged else _sums(rows.taps, columns.taps, cg)),
            "stream": sides["n"] * sides["y_n"] * itemsize >= machine.STREAM_BYTES,
            "tile": panel_tile(problem.dtype.name, mr, nr),
        }
    )  # fmt: skip
    packs, ends = _packing(problem, [(rows, columns)], backward)
    return _Step(correlate, packs, geometry, ends[-1])


def _narrow_tile(itemsize: int, dg: int, q: int, depth: int) -> tuple[int, int, float]:
    """Return (MR, NR) of `correlate_narrow` for ``dg`` channels and ``q`` pixels, and the cycles of a row."""
    lanes = machine.lanes(itemsize)
    tiles = [(mr, nr, _tile_cycles(dg, q, depth, mr, nr, lanes)) for mr, nr in narrow_tiles(itemsize)]
    return min(tiles, key=lambda tile: tile[2])


def _narrow(problem: ConvProblem, phases: list[tuple[Axis, Axis]], backward: bool, bias: bool) -> _Step:
    """Describe the correlations of all phases with pixels on the vectors."""
    itemsize = problem.dtype.itemsize
    lanes = machine.lanes(itemsize)
    sides = [correlation_fields(problem, rows, columns, backward) for rows, columns in phases]
    cg, dg = sides[0]["cg"], sides[0]["dg"]
    p, q = max(side["p"] for side in sides), max(side["q"] for side in sides)
    depth = max(rows.taps * columns.taps * cg for rows, columns in phases)
    mr, nr, _ = _narrow_tile(itemsize, dg, q, depth)
    high, wide = (_span([phase[axis] for phase in phases]) for axis in (0, 1))
    # An odd number of vectors, so that the same pixels of all channels spread over the cache's sets.
    pitch = (math.ceil((q - 1 + wide[1]) / lanes) + 1 | 1) * lanes
    stride = phases[0][0].stride
    block_p = max(1, min(TASK_BYTES // (pitch * cg * itemsize) - high[1], TASK_PIXELS // q) // stride)
    block_p = _even(p, math.ceil(p / max(block_p, high[1])))
    s_sums = ((block_p - 1) * stride + high[1]) * cg * pitch
    packs, ends = _packing(problem, phases, backward)
    records = [
        NARROW.record(
            {name: value for name, value in side.items() if name in NARROW.names}
            | {
                "stride_h": stride, "rows": p, "block_p": block_p,
                "before_h": high[0], "before_w": wide[0], "reach": high[1], "pitch": pitch, "s_sums": s_sums,
                "scratch": arrays.apart(s_sums + dg * pitch, itemsize),
                "tasks": problem.n * problem.groups * math.ceil(p / block_p),
                "add_bias": bias, "tile": column_tile(problem.dtype.name, mr, nr), "width": nr * lanes,
                "R": rows.taps, "Q": columns.taps, "packed_0": first, **_sums(rows.taps, columns.taps, cg),
            }
        )
        for side, (rows, columns), first in zip(sides, phases, ends[:-1], strict=True)
    ]  # fmt: skip
    return _Step(correlate_narrow, packs, np.concatenate(records), ends[-1])


def _span(axes: list[Axis]) -> tuple[int, int]:
    """Return how far before an output's place all phases together read, and over how many pixels from there on."""
    axes = [axis for axis in axes if axis.taps] or axes[:1]
    before = max(axis.before for axis in axes)
    return before, before + max(max(axis.taps - 1, 0) * axis.dilation - axis.before for axis in axes) + 1


@lru_cache(maxsize=1024)
def _forward_steps(problem: ConvProblem, bias: bool) -> list[_Step]:
    return _steps(problem, [forward_axes(problem)], backward=False, bias=bias)


@lru_cache(maxsize=1024)
def _input_grad_steps(problem: ConvProblem) -> list[_Step]:
    return _steps(problem, input_grad_axes(problem), backward=True, bias=False)


def _parts(product: Array) -> int:
    """Return the elements of all slices' parts."""
    return int(product["slices"][0] * product["part"][0])


@lru_cache(maxsize=1024)
def _weight_grad_steps(problem: ConvProblem, accumulate: bool) -> tuple[Array, Array | None]:
    """Describe the product and, where its parts are not dw itself, their sum."""
    itemsize = problem.dtype.itemsize
    mr, nr, lanes = tile_shape(itemsize)
    rows, columns = forward_axes(problem)
    n, h, w, p, q = problem.n, problem.h, problem.w, problem.oh, problem.ow
    cg, dg, groups = problem.cg, problem.dg, problem.groups
    depth = problem.kh * problem.kw * cg
    part = problem.d * depth
    gather = rows.padded or columns.padded or groups > 1
    if not gather and problem.kh == problem.kw == 1 and rows.stride == columns.stride == 1:
        # One matrix product over all pixels, in rows of any length that divides them.
        pixels = n * p * q
        q = max(v for v in range(1, BLOCK_PIXELS + 1) if pixels % v == 0)
        n, h, w, p = 1, pixels // q, q, pixels // q
    lines = n * p
    slices = min(max(1, lines * q // SLICE_PIXELS), SUM_TASKS, max(1, PARTS_LIMIT // part), lines)

    blocks_k, blocks_d = math.ceil(cg / BLOCK_CHANNELS), math.ceil(dg / BLOCK_CHANNELS)
    tasks = slices * groups * blocks_k * blocks_d
    block_r = _even(problem.kh, math.ceil(SUM_TASKS / tasks))
    tasks *= math.ceil(problem.kh / block_r)
    # Where tasks are too few, the channels of one side are shared out, and each task reads the other side: the smaller.
    if cg > dg and problem.kw == 1:
        blocks_k *= math.ceil(SUM_TASKS / tasks)
    else:
        blocks_d *= math.ceil(SUM_TASKS / tasks)
    block_k, block_d = min(cg, _even(cg, blocks_k, nr * lanes)), min(dg, _even(dg, blocks_d, nr * lanes))
    # Pixels that lie far apart are read much slower than they are copied.
    gather = gather or block_k < cg or (problem.stride == (1, 1) and cg * itemsize >= FAR)
    step_h, step_w = (axis.stride if gather and axis.taps == 1 else 1 for axis in (rows, columns))
    merged = columns.dilation == 1 and (gather or groups == 1) and block_k == cg
    run = problem.kw * cg if merged else block_k
    dy_rows, x_rows = (_tile_cycles(*sides, BLOCK_PIXELS, mr, nr, lanes) for sides in ((dg, run), (run, dg)))
    swap = x_rows < SWAP * dy_rows
    gather_dy = block_d < dg
    block_q = _even(q, math.ceil(q / BLOCK_PIXELS))
    per_slice = math.ceil(lines / slices)
    block_p = _even(per_slice, math.ceil(per_slice * block_q / BLOCK_PIXELS))
    tasks = slices * groups * math.ceil(problem.kh / block_r) * math.ceil(dg / block_d) * math.ceil(cg / block_k)
    s_dy = scratch_dy = 0
    if gather:
        s_dy = ((block_p - 1) * (rows.stride // step_h) + (block_r - 1) * rows.dilation + 1) * block_k
        s_dy *= (block_q - 1) * (columns.stride // step_w) + (problem.kw - 1) * columns.dilation + 1
    s_dy = -(-s_dy // lanes) * lanes
    if gather_dy:
        scratch_dy = block_p * block_q * block_d
    # The next block is asked for where pixels follow one another, spread over the sets of L2, and find room there
    # beside the sums.
    ahead = rows.stride == columns.stride == 1 and not _collide(problem.c, problem)
    ahead = ahead and block_r * problem.kw * block_k * block_d * itemsize <= TASK_BYTES
    direct = slices == 1 and not swap
    product = WEIGHT_GRAD.record(
        {
            "n": n, "groups": groups, "h": h, "w": w, "c": problem.c, "cg": cg, "dg": dg, "p": p, "q": q,
            "R": problem.kh, "Q": problem.kw, "stride_h": rows.stride, "stride_w": columns.stride,
            "dilation_h": rows.dilation, "dilation_w": columns.dilation, "top": rows.before, "left": columns.before,
            "slices": slices, "block_p": block_p, "block_q": block_q, "block_r": block_r, "block_d": block_d,
            "block_k": block_k, "gather": gather, "step_h": step_h, "step_w": step_w, "pixel": block_k,
            "s_dy": s_dy, "scratch": arrays.apart(s_dy + scratch_dy, itemsize),
            "merged": merged, "gather_dy": gather_dy, "ahead": ahead, "swap": swap,
            "accumulate": accumulate and direct, "part": part, "tasks": tasks,
            "tile": column_tile(problem.dtype.name, mr, nr),
        }
    )  # fmt: skip
    if direct:
        return product, None
    total = SUM_PARTS.record(
        {
            "slices": slices, "part": part, "groups": groups, "depth": depth, "dg": dg, "swap": swap,
            "accumulate": accumulate, "tasks": problem.d,
        }
    )  # fmt: skip
    return product, total


def _tile_cycles(rows: int, columns: int, depth: int, mr: int, nr: int, lanes: int) -> float:
    """Return the predicted cycles of a ``rows x depth`` by ``depth x columns`` product in register tiles."""
    tiles = math.ceil(rows / mr)

    def cycles(vectors: int) -> float:
        # Two multiply-adds a cycle, and none before the one before in the same register: four cycles.
        return depth * max(rows / tiles * vectors / 2, 4) / EFFICIENCY + TILE_CYCLES

    full, rest = divmod(columns, nr * lanes)
    return tiles * (full * cycles(nr) + (cycles(math.ceil(rest / lanes)) if rest else 0))


class Loop:
    """Loops over kernel positions and channels around the micro-kernel, without im2col."""

    name = "loop"
    summary = "loops over kernel positions and channels around a register-tile micro-kernel"

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Every problem."""
        return None

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Packed weights, and each thread's padded rows."""
        problem = replace(problem, dtype=problem.compute_dtype)
        if not problem.n:
            return 0
        if pass_ == "weight_grad":
            product, total = _weight_grad_steps(problem, False)
            elements = int(product["scratch"][0]) * machine.workers(problem.flops)
            elements += 0 if total is None else _parts(product)
            return elements * problem.dtype.itemsize
        steps = _forward_steps(problem, True) if pass_ == "forward" else _input_grad_steps(problem)
        elements = max(s.packed + s.scratch * machine.workers(problem.flops) for s in steps)
        return elements * problem.dtype.itemsize

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """The cycles of all register tiles, at the micro-kernel's speed."""
        problem = replace(problem, dtype=problem.compute_dtype)
        mr, nr, lanes = tile_shape(problem.dtype.itemsize)
        if pass_ == "weight_grad":
            g = _weight_grad_steps(problem, False)[0][0]
            run, runs = (g["Q"] * g["cg"], g["R"]) if g["merged"] else (g["cg"], g["R"] * g["Q"])
            rows, columns = (run, g["dg"]) if g["swap"] else (g["dg"], run)
            blocks = g["n"] * g["groups"] * g["p"] * g["q"] / (g["block_p"] * g["block_q"])
            return float(blocks * runs * _tile_cycles(rows, columns, g["block_p"] * g["block_q"], mr, nr, lanes))
        total = 0.0
        for step in _forward_steps(problem, False) if pass_ == "forward" else _input_grad_steps(problem):
            narrow = step.make is correlate_narrow
            for g in step.geometry:
                depth = g["R"] * g["Q"] * g["cg"]
                if narrow:
                    *_, cycles = _narrow_tile(problem.dtype.itemsize, g["dg"], g["q"], depth)
                    cycles += g["q"] * g["dg"]  # y turned
                else:
                    cycles = _tile_cycles(g["q"], g["dg"], depth, mr, nr, lanes)
                total += g["n"] * g["groups"] * g["p"] * cycles
            if narrow:
                total += g["n"] * g["groups"] * g["h"] * g["w"] * g["cg"]  # x turned
        return float(total)

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Correlate x with w."""
        self._correlate(problem, _forward_steps(problem, b is not None), x, w, b, y, pack_columns)

    def input_grad(self, problem: ConvProblem, dy: Array, w: Array, dx: Array) -> None:
        """Correlate dy with the flipped w, phase by phase."""
        self._correlate(problem, _input_grad_steps(problem), dy, w, None, dx, pack_rows)

    def _correlate(self, problem, steps, x, w, b, y, pack) -> None:  # type: ignore[no-untyped-def]
        mr, nr, lanes = tile_shape(problem.dtype.itemsize)
        workers = machine.workers(problem.flops)
        x, w, y = x.reshape(-1), w.reshape(-1), y.reshape(-1)
        packed = arrays.empty((max(s.packed for s in steps),), problem.dtype)
        scratch = arrays.empty((max(s.scratch for s in steps) * workers,), problem.dtype)
        for step in steps:
            for geometry in step.packs:
                if geometry["tasks"][0]:
                    pack(nr * lanes, lanes).run(w, packed, geometry=geometry, workers=workers)
            kernel = step.make(lanes) if step.make is correlate_narrow else step.make(mr, nr, lanes)
            kernel.run(x, packed, y if b is None else b, y, scratch, geometry=step.geometry, workers=workers)

    def weight_grad(
        self, problem: ConvProblem, x: Array, dy: Array, dw: Array, accumulate: bool, db: Array | None = None
    ) -> None:
        """Multiply dy and x over all pixels."""
        mr, nr, lanes = tile_shape(problem.dtype.itemsize)
        workers = machine.workers(problem.flops)
        product, total = _weight_grad_steps(problem, accumulate)
        x, dy, dw = x.reshape(-1), dy.reshape(-1), dw.reshape(-1)
        scratch = arrays.empty((int(product["scratch"][0]) * workers,), problem.dtype)
        parts = dw if total is None else arrays.empty((_parts(product),), problem.dtype)
        sums = bias.parts(int(product["slices"][0]), db, problem.dtype)
        weight_grad(mr, nr * lanes, LINE // problem.dtype.itemsize).run(
            x, dy, parts, sums.reshape(-1), scratch, geometry=product, workers=workers
        )
        if db is not None:
            bias.store(sums, db, accumulate)
        if total is not None:
            sum_parts().run(parts, dw, geometry=total, workers=workers)
