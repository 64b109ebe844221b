"""Loops over kernel positions and channels around the register-tile micro-kernel; no im2col.

In NHWC, for one row of the kernel, the ``(kw, c)`` values that an output pixel reads lie side by side, in x and in
w. So each pass is a short sum of plain matrix products (`nhwconv.kernels.tile`) on the arrays as they are:

- forward: a correlation of x with w;
- input_grad: a correlation of dy with the flipped w, once for every phase of the stride;
- weight_grad: a product of dy and x whose long axis is the pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .. import arrays, machine
from ..kernels.correlate import CORRELATE, correlate
from ..kernels.packing import PACK, pack_columns, pack_rows, packed_size
from ..kernels.tile import register_tile
from ..kernels.weight_grad import SUM_PARTS, WEIGHT_GRAD, sum_parts, weight_grad
from ..problem import ConvProblem, Pass
from .base import Array

__all__ = ["Loop"]

#: Output pixels of one task: enough to use a panel of weights many times, few enough for its x to stay in L2.
TASK_PIXELS = 256
#: Tasks that a pass is cut into where it is large enough: fine enough for any number of threads to share.
TASKS = 64
#: Below this many FLOPs a parallel launch costs more than it saves.
SERIAL_FLOPS = 500_000
#: Elements of x that a task keeps in L2 while it walks over the output channels.
TASK_ELEMENTS = 96 * 1024
#: weight_grad: pixels of a block, whose x and dy stay in cache, and least pixels of a slice.
BLOCK_PIXELS = 512
SLICE_PIXELS = 1024
#: weight_grad: most slices, and most elements of all their parts.
MAX_SLICES = 16
PARTS_LIMIT = 2 * 2**20


@lru_cache(maxsize=1024)
def _tile(itemsize: int) -> tuple[int, int, int]:
    """Return (MR, NR, LANES)."""
    return *register_tile(itemsize), machine.lanes(itemsize)


@dataclass(frozen=True)
class _Step:
    """One correlation: how w is packed for it, and its geometry; `taps` of zero only fills y."""

    pack: Array
    geometry: Array
    packed: int
    scratch: int


def _even(size: int, parts: int, multiple: int = 1) -> int:
    """Return the block that cuts `size` into about `parts` equal blocks, a multiple of `multiple`."""
    block = math.ceil(size / max(parts, 1))
    return min(math.ceil(block / multiple) * multiple, math.ceil(size / multiple) * multiple)


def _blocking(p: int, q: int, rows_of: int, pixel: int, stride: int, mr: int) -> tuple[int, int]:
    """Return (block_p, block_q): the rows and columns of outputs that one task computes."""
    limit = max(mr, min(TASK_PIXELS, TASK_ELEMENTS // pixel // stride))
    block_q = q if q <= limit else _even(q, math.ceil(q / limit), mr)
    block_p = max(1, min(p, limit // block_q))
    while block_p > 1 and ((block_p - 1) * stride + rows_of) * block_q * stride * pixel > 2 * TASK_ELEMENTS:
        block_p -= 1
    return _even(p, math.ceil(p / block_p)), block_q


class _Axis:
    """One axis of a correlation that reads `size` pixels with `taps` taps, and where its outputs go."""

    def __init__(self, size: int, taps: int, stride: int, dilation: int, before: int, out: int) -> None:
        self.size, self.taps, self.stride, self.dilation = size, taps, stride, dilation
        self.before, self.out = before, out
        #: where outputs go: the first, and the step from one to the next
        self.start, self.step = 0, 1
        #: which kernel positions the taps are: the first, and the step
        self.first_tap, self.tap_step = 0, 1

    @property
    def padded(self) -> bool:
        """Whether a tap of an output lies outside."""
        last = (self.out - 1) * self.stride - self.before + (self.taps - 1) * self.dilation
        return self.taps > 0 and (self.before > 0 or last >= self.size)


def _forward_axes(problem: ConvProblem) -> tuple[_Axis, _Axis]:
    (top, _), (left, _) = problem.padding
    (sh, sw), (lh, lw) = problem.stride, problem.dilation
    return (
        _Axis(problem.h, problem.kh, sh, lh, top, problem.oh),
        _Axis(problem.w, problem.kw, sw, lw, left, problem.ow),
    )


def _phases(size: int, out: int, kernel: int, stride: int, dilation: int, before: int) -> list[_Axis]:
    """Return the phases of an input gradient along one axis: the pixels of x that the same kernel positions reach.

    Kernel position ``h`` reaches pixel ``i`` from output ``o`` where ``i + before = o*stride + h*dilation``. Pixels
    whose ``i + before`` agree modulo the stride share their positions, every ``stride / gcd``-th one; one position
    further, the output lies ``dilation / gcd`` back.
    """
    phases = []
    common = math.gcd(stride, dilation)
    for phase in range(min(stride, size)):
        start = phase
        pixels = -(-(size - start) // stride)
        positions = [h for h in range(kernel) if (start + before - h * dilation) % stride == 0]
        axis = _Axis(out, len(positions), 1, dilation // common, 0, pixels)
        axis.start, axis.step = start, stride
        if positions:
            # Flipped: the last position meets the first output.
            axis.first_tap, axis.tap_step = positions[-1], -(stride // common)
            axis.before = -((start + before - positions[-1] * dilation) // stride)
        phases.append(axis)
    return phases


def _step(problem: ConvProblem, rows: _Axis, columns: _Axis, backward: bool, bias: bool) -> _Step:
    """Describe one correlation: of x with w forward, of dy with w in one phase backward."""
    mr, nr, lanes = _tile(problem.dtype.itemsize)
    n, groups = problem.n, problem.groups
    (h, w, c, cg), (out_w, out_c, dg) = (
        ((problem.oh, problem.ow, problem.d, problem.dg), (problem.w, problem.c, problem.cg))
        if backward
        else ((problem.h, problem.w, problem.c, problem.cg), (problem.ow, problem.d, problem.dg))
    )
    y_n = (problem.h if backward else problem.oh) * out_w * out_c
    taps = rows.taps * columns.taps
    gather = taps > 0 and (rows.padded or columns.padded or groups > 1)
    p, q = rows.out, columns.out
    if rows.taps == columns.taps == 1 and not gather and rows.stride == columns.stride == 1 and rows.step == 1:
        if columns.step == 1 and (h, w) == (p, q) and rows.before == columns.before == 0:
            n, h, w, p, q = 1, 1, n * h * w, 1, n * p * q  # a plain matrix product over all pixels
    reach = (rows.taps - 1) * rows.dilation + 1
    block_p, block_q = _blocking(p, q, reach, cg, rows.stride, mr)
    tasks = n * groups * math.ceil(p / block_p) * math.ceil(q / block_q)
    block_d = _even(dg, math.ceil(TASKS / tasks), nr * lanes)
    scratch = 0
    if gather:
        scratch = ((block_p - 1) * rows.stride + reach) * cg
        scratch *= (block_q - 1) * columns.stride + (columns.taps - 1) * columns.dilation + 1
    geometry = CORRELATE.record(
        {
            "n": n, "groups": groups, "h": h, "w": w, "c": c, "cg": cg, "dg": dg,
            "R": rows.taps, "Q": columns.taps, "stride_h": rows.stride, "stride_w": columns.stride,
            "dilation_h": rows.dilation, "dilation_w": columns.dilation, "top": rows.before, "left": columns.before,
            "p": p, "q": q, "y_0": (rows.start * out_w + columns.start) * out_c, "y_n": y_n,
            "y_p": rows.step * out_w * out_c, "y_q": columns.step * out_c,
            "block_p": block_p, "block_q": block_q, "block_d": block_d, "gather": gather,
            "scratch": -(-scratch // 16) * 16, "tasks": tasks * math.ceil(dg / block_d), "add_bias": bias,
        }
    )  # fmt: skip
    row, tap = problem.kw * problem.cg, problem.cg
    w_g, w_d = problem.dg * problem.kh * row, problem.kh * row
    pack = PACK.record(
        {
            "groups": groups, "columns": dg, "steps": cg, "R": rows.taps, "Q": columns.taps,
            "w_0": rows.first_tap * row + columns.first_tap * tap, "w_g": w_g,
            "w_j": 1 if backward else w_d, "w_k": w_d if backward else 1,
            "w_r": rows.tap_step * row, "w_q": columns.tap_step * tap,
            "tasks": groups * taps * math.ceil(dg / (nr * lanes)),
        }
    )  # fmt: skip
    return _Step(pack, geometry, packed_size(groups, dg, taps * cg, lanes), int(geometry["scratch"][0]))


@lru_cache(maxsize=1024)
def _forward_steps(problem: ConvProblem, bias: bool) -> list[_Step]:
    return [_step(problem, *_forward_axes(problem), backward=False, bias=bias)]


@lru_cache(maxsize=1024)
def _input_grad_steps(problem: ConvProblem) -> list[_Step]:
    (top, _), (left, _) = problem.padding
    (sh, sw), (lh, lw) = problem.stride, problem.dilation
    return [
        _step(problem, rows, columns, backward=True, bias=False)
        for rows in _phases(problem.h, problem.oh, problem.kh, sh, lh, top)
        for columns in _phases(problem.w, problem.ow, problem.kw, sw, lw, left)
    ]


def _parts(product: Array) -> int:
    """Return the elements of all slices' parts."""
    return int(product["slices"][0] * product["part"][0])


@lru_cache(maxsize=1024)
def _weight_grad_steps(problem: ConvProblem, accumulate: bool) -> tuple[Array, Array | None]:
    """Describe the product and, where its parts are not dw itself, their sum."""
    mr, nr, lanes = _tile(problem.dtype.itemsize)
    rows, columns = _forward_axes(problem)
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
    merged = gather or groups == 1
    run = problem.kw * cg if columns.dilation == 1 and merged else cg
    swap = _lanes_used(run, nr * lanes, lanes) < _lanes_used(dg, nr * lanes, lanes) and run < nr * lanes
    block_q = q if q <= BLOCK_PIXELS else _even(q, math.ceil(q / BLOCK_PIXELS))
    block_p = max(1, BLOCK_PIXELS // block_q)
    lines = n * p
    slices = min(max(1, lines * q // SLICE_PIXELS), MAX_SLICES, max(1, PARTS_LIMIT // part), lines)
    block_r, block_d = problem.kh, dg
    if slices * groups < TASKS // 2:
        block_r = _even(problem.kh, math.ceil(TASKS / 2 / (slices * groups)))
        tasks = slices * groups * math.ceil(problem.kh / block_r)
        block_d = _even(dg, math.ceil(TASKS / 2 / tasks), nr * lanes if swap else mr)
    tasks = slices * groups * math.ceil(problem.kh / block_r) * math.ceil(dg / block_d)
    scratch = 0
    if gather:
        scratch = ((block_p - 1) * rows.stride + (block_r - 1) * rows.dilation + 1) * cg
        scratch *= (block_q - 1) * columns.stride + (problem.kw - 1) * columns.dilation + 1
    direct = slices == 1 and not swap
    product = WEIGHT_GRAD.record(
        {
            "n": n, "groups": groups, "h": h, "w": w, "c": problem.c, "cg": cg, "dg": dg, "p": p, "q": q,
            "R": problem.kh, "Q": problem.kw, "stride_h": rows.stride, "stride_w": columns.stride,
            "dilation_h": rows.dilation, "dilation_w": columns.dilation, "top": rows.before, "left": columns.before,
            "slices": slices, "block_p": block_p, "block_q": block_q, "block_r": block_r, "block_d": block_d,
            "gather": gather, "scratch": -(-scratch // 16) * 16, "swap": swap,
            "accumulate": accumulate and direct, "part": part, "tasks": tasks,
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


def _lanes_used(columns: int, width: int, lanes: int) -> float:
    """Return the part of the vectors' lanes that tiles over so many columns use."""
    vectors = columns // width * (width // lanes) + -(-(columns % width) // lanes)
    return columns / (vectors * lanes)


def _workers(problem: ConvProblem) -> int:
    return 1 if problem.flops < SERIAL_FLOPS else machine.threads()


def _queue() -> Array:
    """Return the counter from which workers take their tasks."""
    return np.zeros(1, np.int64)


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
            elements = int(product["scratch"][0]) * _workers(problem) + (0 if total is None else _parts(product))
            return elements * problem.dtype.itemsize
        steps = _forward_steps(problem, True) if pass_ == "forward" else _input_grad_steps(problem)
        elements = max(s.packed + s.scratch * _workers(problem) for s in steps)
        return elements * problem.dtype.itemsize

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Correlate x with w."""
        self._correlate(problem, _forward_steps(problem, b is not None), x, w, b, y, pack_columns)

    def input_grad(self, problem: ConvProblem, dy: Array, w: Array, dx: Array) -> None:
        """Correlate dy with the flipped w, phase by phase."""
        self._correlate(problem, _input_grad_steps(problem), dy, w, None, dx, pack_rows)

    def _correlate(self, problem, steps, x, w, b, y, pack) -> None:  # type: ignore[no-untyped-def]
        mr, nr, lanes = _tile(problem.dtype.itemsize)
        workers = _workers(problem)
        x, w, y = x.reshape(-1), w.reshape(-1), y.reshape(-1)
        packed = arrays.empty((max(s.packed for s in steps),), problem.dtype)
        scratch = arrays.empty((max(s.scratch for s in steps) * workers,), problem.dtype)
        for step in steps:
            if step.packed:
                pack(nr * lanes, lanes)(w, packed, _queue(), workers, step.pack, workers=workers)
            correlate(mr, nr, lanes)(
                x, packed, y if b is None else b, y, scratch, _queue(), workers, step.geometry, workers=workers
            )

    def weight_grad(self, problem: ConvProblem, x: Array, dy: Array, dw: Array, accumulate: bool) -> None:
        """Multiply dy and x over all pixels."""
        mr, nr, lanes = _tile(problem.dtype.itemsize)
        workers = _workers(problem)
        product, total = _weight_grad_steps(problem, accumulate)
        x, dy, dw = x.reshape(-1), dy.reshape(-1), dw.reshape(-1)
        scratch = arrays.empty((int(product["scratch"][0]) * workers,), problem.dtype)
        parts = dw if total is None else arrays.empty((_parts(product),), problem.dtype)
        weight_grad(mr, nr, lanes)(x, dy, parts, scratch, _queue(), workers, product, workers=workers)
        if total is not None:
            sum_parts()(parts, dw, _queue(), workers, total, workers=workers)
