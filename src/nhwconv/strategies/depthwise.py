"""Depthwise convolution, one input channel a group: channels on the lanes, taps in registers, no packing of x.

- forward: a correlation of x with w, channel by channel;
- input_grad: a correlation of dy with the flipped w, once for every phase of the stride;
- weight_grad: for every tap, a sum over the pixels of products of dy and x.

With a channel multiplier m, output channel j reads input channel ``j // m``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from .. import arrays, bias, machine
from ..kernels.depthwise import CORRELATE, WEIGHT_GRAD, correlate, weight_grad
from ..problem import ConvProblem, Pass
from .axes import Axis, forward_axes, input_grad_axes
from .base import Array

__all__ = ["Depthwise"]

#: Kernel sizes whose rows of taps are unrolled whole, or in the two phases of stride 2; others are chunks of 2 and 1.
UNROLLED = (3, 5, 7)
#: Tasks that a pass is cut into where it is large enough: fine enough for any number of threads to share.
TASKS = 32
#: The part of the peak at which the multiply-adds run.
EFFICIENCY = 0.5
#: How much longer it takes where a channel multiplier makes every vector a gather.
GATHERING = 8
#: weight_grad: pixels whose products are summed in registers.
SUM_PIXELS = 128
#: weight_grad: least rows of a slice, most slices, and most numbers of all their parts.
SLICE_LINES = 3
MAX_SLICES = 16
PARTS_LIMIT = 2**20


#: A kernel's parameters: Q1, Q2, STRIDE, DILATION, GATHER, LANES.
_Literal = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class _Steps:
    """What one pass needs: its kernel's parameters, its phases' geometry, and the table of channel offsets."""

    literal: _Literal
    geometry: Array
    table: Array


def _chunks(lengths: set[int]) -> tuple[int, int]:
    """Return (Q1, Q2): rows of each of these lengths are some chunks of Q1 taps and some of Q2."""
    longest, shortest = max(lengths), min(lengths)
    if longest == shortest and longest in UNROLLED:
        return longest, 0
    if longest == shortest + 1 and 2 * longest - 1 in UNROLLED:
        return longest, shortest  # the two phases of stride 2
    return 2, 1


def _split(length: int, chunks: tuple[int, int]) -> tuple[int, int]:
    """Return how many of each chunk make this length."""
    (first, rest), q2 = divmod(length, chunks[0]), chunks[1]
    return first, rest // q2 if q2 else 0


def _literal(lengths: set[int], stride: int, dilation: int, gather: bool, lanes: int) -> _Literal:
    """Return a kernel's parameters. Columns are shared among taps where stride and dilation are emitted as numbers."""
    stride, dilation = (stride, dilation) if stride <= 2 and dilation == 1 else (0, 0)
    return (*_chunks(lengths), stride, dilation, int(gather), lanes)


def _padded(channels: int, lanes: int) -> int:
    return -(-channels // lanes) * lanes


def _table(values: Array, lanes: int) -> Array:
    """Return channel offsets for whole vectors; those of lanes past the end are never used."""
    table = np.zeros(_padded(len(values), lanes), np.int64)
    table[: len(values)] = values
    return table


def _correlation(problem: ConvProblem, phases: list[tuple[Axis, Axis]], backward: bool) -> _Steps:
    """Describe the correlation of x with w forward, or of dy with w backward in all phases."""
    lanes = machine.lanes(problem.dtype.itemsize)
    gather, m = problem.dg > 1, problem.dg
    (h, w, c), (out_h, out_w, d) = (problem.h, problem.w, problem.c), (problem.oh, problem.ow, problem.d)
    if backward:
        (h, w, c), (out_h, out_w, d) = (out_h, out_w, d), (h, w, c)
    columns = phases[0][1]
    lengths = {q.taps for _, q in phases if q.taps} or {1}
    literal = _literal(lengths, columns.stride, columns.dilation, gather, lanes)
    padded = _padded(d, lanes)
    # A block of rows of a task, the same part of every phase.
    p = max(r.out for r, _ in phases)
    block_p = math.ceil(p / math.ceil(TASKS / problem.n))
    blocks = math.ceil(p / block_p)
    records = []
    for r, q in phases:
        chunks = _split(q.taps, literal[:2])
        records.append(
            CORRELATE.record(
                {
                    "h": h, "w": w, "c": c, "d": d, "padded": padded,
                    "R": r.taps if q.taps else 0, "chunks_1": chunks[0], "chunks_2": chunks[1], "Q": q.taps,
                    "M": m if backward else 1,
                    "stride_h": r.stride, "stride_w": q.stride, "dilation_h": r.dilation, "dilation_w": q.dilation,
                    "top": r.before, "left": q.before, "x_r": r.dilation * w * c,
                    "w_0": (r.first_tap * problem.kw + q.first_tap) * padded,
                    "w_r": r.tap_step * problem.kw * padded, "w_q": q.tap_step * padded,
                    "w_m": problem.kh * problem.kw * padded,
                    "p": r.out, "q": q.out, "y_0": (r.start * out_w + q.start) * d, "y_n": out_h * out_w * d,
                    "y_p": r.step * out_w * d, "y_q": q.step * d,
                    "block_p": block_p, "blocks": blocks, "tasks": problem.n * blocks,
                }
            )
        )  # fmt: skip
    table = _table(np.arange(d) * m if backward else np.arange(d) // m, lanes) if gather else np.zeros(1, np.int64)
    return _Steps(literal, np.concatenate(records), table)


@lru_cache(maxsize=1024)
def _forward_steps(problem: ConvProblem) -> _Steps:
    return _correlation(problem, [forward_axes(problem)], backward=False)


@lru_cache(maxsize=1024)
def _input_grad_steps(problem: ConvProblem) -> _Steps:
    return _correlation(problem, input_grad_axes(problem), backward=True)


@lru_cache(maxsize=1024)
def _weight_grad_steps(problem: ConvProblem) -> _Steps:
    lanes = machine.lanes(problem.dtype.itemsize)
    rows, columns = forward_axes(problem)
    gather = problem.dg > 1
    literal = _literal({columns.taps}, columns.stride, columns.dilation, gather, lanes)
    chunks = _split(columns.taps, literal[:2])
    padded = _padded(problem.d, lanes)
    part = problem.kh * problem.kw * padded
    total = problem.n * problem.oh
    slices = max(1, min(MAX_SLICES, PARTS_LIMIT // part, total // SLICE_LINES))
    blocks = math.ceil(MAX_SLICES / slices)
    block_d = _padded(math.ceil(problem.d / blocks), lanes)
    geometry = WEIGHT_GRAD.record(
        {
            "n": problem.n, "h": problem.h, "w": problem.w, "c": problem.c, "d": problem.d, "padded": padded,
            "p": problem.oh, "q": problem.ow,
            "R": rows.taps, "chunks_1": chunks[0], "chunks_2": chunks[1], "Q": columns.taps,
            "stride_h": rows.stride, "stride_w": columns.stride,
            "dilation_h": rows.dilation, "dilation_w": columns.dilation, "top": rows.before, "left": columns.before,
            "x_r": rows.dilation * problem.w * problem.c, "x_p": rows.stride * problem.w * problem.c,
            "y_p": problem.ow * problem.d,
            "slices": slices, "lines": max(1, SUM_PIXELS // problem.ow), "block_d": block_d, "part": part,
            "part_r": problem.kw * padded, "tasks": slices * math.ceil(problem.d / block_d),
        }
    )  # fmt: skip
    table = _table(np.arange(problem.d) // problem.dg, lanes) if gather else np.zeros(1, np.int64)
    return _Steps(literal, geometry, table)


class Depthwise:
    """One input channel a group: channels on the lanes, taps in registers."""

    name = "depthwise"
    summary = "one input channel a group: channels on the lanes, taps in registers"

    def supports(self, problem: ConvProblem, pass_: Pass) -> str | None:
        """Problems with one input channel a group."""
        if problem.cg == 1:
            return None
        return f"it needs groups equal to the channels of x, which are {problem.c}, but groups is {problem.groups}"

    def workspace(self, problem: ConvProblem, pass_: Pass) -> int:
        """Packed weights, or the sums of all slices."""
        problem = replace(problem, dtype=problem.compute_dtype)
        if not problem.n:
            return 0
        lanes = machine.lanes(problem.dtype.itemsize)
        if pass_ == "weight_grad":
            elements = _parts(_weight_grad_steps(problem).geometry, lanes)
        else:
            elements = _packed_size(problem, pass_ == "input_grad", lanes)
        return elements * problem.dtype.itemsize

    def cost(self, problem: ConvProblem, pass_: Pass) -> float:
        """The multiply-adds of whole vectors at a part of the peak, or the bytes, whichever takes longer."""
        itemsize = problem.compute_dtype.itemsize
        used = problem.d / _padded(problem.d, machine.lanes(itemsize))
        products = problem.flops / (machine.flops_a_cycle(itemsize) * used * EFFICIENCY)
        return max(products, problem.bytes / machine.BYTES_A_CYCLE) * (1 if problem.dg == 1 else GATHERING)

    def forward(self, problem: ConvProblem, x: Array, w: Array, b: Array | None, y: Array) -> None:
        """Correlate x with w."""
        taps = w.reshape(1, problem.d, -1).transpose(0, 2, 1)
        self._correlate(problem, _forward_steps(problem), x, taps, b, y)

    def input_grad(self, problem: ConvProblem, dy: Array, w: Array, dx: Array) -> None:
        """Correlate dy with the flipped w, phase by phase."""
        taps = w.reshape(problem.c, problem.dg, -1).transpose(1, 2, 0)
        self._correlate(problem, _input_grad_steps(problem), dy, taps, None, dx)

    def _correlate(self, problem: ConvProblem, steps: _Steps, x: Array, taps: Array, b: Array | None, y: Array) -> None:
        """Correlate x with ``taps (m, kh*kw, d)``."""
        lanes = steps.literal[-1]
        depth, d = taps.shape[0] * taps.shape[1], taps.shape[2]
        # The taps of each position, then the bias that sums start from, then zeros for columns outside.
        packed = arrays.empty((depth + 2, _padded(d, lanes)), problem.dtype)
        packed[:depth, :d] = taps.reshape(depth, d)
        packed[:, d:] = 0
        packed[depth, :d] = 0 if b is None else b
        packed[depth + 1] = 0
        vector = lanes * problem.dtype.itemsize
        whole = d % lanes == 0 and y.ctypes.data % vector == 0
        stream = int(whole and y.nbytes >= machine.STREAM_BYTES)
        workers = machine.workers(problem.flops)
        correlate(*steps.literal).run(
            x.reshape(-1),
            packed.reshape(-1),
            y.reshape(-1),
            steps.table,
            stream,
            geometry=steps.geometry,
            workers=workers,
        )

    @arrays.values_are_data
    def weight_grad(
        self, problem: ConvProblem, x: Array, dy: Array, dw: Array, accumulate: bool, db: Array | None = None
    ) -> None:
        """Sum the products of dy and x, slice by slice."""
        steps = _weight_grad_steps(problem)
        geometry, lanes, workers = steps.geometry, steps.literal[-1], machine.workers(problem.flops)
        parts = arrays.empty((_parts(geometry, lanes),), problem.dtype)
        parts[-lanes:] = 0
        sums = bias.parts(int(geometry["slices"][0]), db, problem.dtype)
        weight_grad(*steps.literal).run(
            x.reshape(-1), dy.reshape(-1), parts, sums.reshape(-1), steps.table, geometry=geometry, workers=workers
        )
        if db is not None:
            bias.store(sums, db, accumulate)
        taps = problem.kh * problem.kw
        total = parts[:-lanes].reshape(-1, taps, int(geometry["padded"][0])).sum(0)[:, : problem.d].T
        if accumulate:
            dw.reshape(problem.d, taps)[...] += total
        else:
            dw.reshape(problem.d, taps)[...] = total


def _parts(geometry: Array, lanes: int) -> int:
    """Return the numbers of all slices' sums, and of the vector of zeros behind them."""
    return int(geometry["slices"][0] * geometry["part"][0]) + lanes


def _packed_size(problem: ConvProblem, backward: bool, lanes: int) -> int:
    """Return the numbers of packed weights."""
    d, m = (problem.c, problem.dg) if backward else (problem.d, 1)
    return (m * problem.kh * problem.kw + 2) * _padded(d, lanes)
