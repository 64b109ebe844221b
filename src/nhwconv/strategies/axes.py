"""The two axes of a correlation, and how a pass becomes one: forward directly, input_grad phase by phase.

Both are the same sum over taps; `Axis` says which pixels a tap reads, which kernel position it is and where an output
goes. Strategies turn it into the geometry of their kernels, and into packed weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..codegen.packing import Packing, packed_size
from ..problem import ConvProblem
from ..runtime.records import Record

__all__ = [
    "Axis",
    "Correlation",
    "correlation_fields",
    "forward_axes",
    "input_grad_axes",
    "packings",
    "phases",
    "tap_phases",
    "weight_strides",
]


class Correlation(Record):
    """What every correlation's geometry has: what is read and written, x and y forward, dy and dx backward."""

    n: int  #: images
    groups: int
    h: int  #: rows, columns and channels of x, and its channels in a group
    w: int
    c: int
    cg: int
    dg: int  #: channels of y in a group
    dilation_h: int
    dilation_w: int
    top: int  #: zeros before the first row and column; may be negative
    left: int
    p: int  #: rows and columns of outputs
    q: int
    y_0: int  #: where the first output is in y, and from one image, row and column of them to the next, in elements
    y_n: int
    y_p: int
    y_q: int


@dataclass(frozen=True)
class Axis:
    """One axis of a correlation that reads `size` pixels with `taps` taps, and where its outputs go."""

    size: int
    taps: int
    stride: int
    dilation: int
    before: int
    out: int
    #: where outputs go: the first, and the step from one to the next
    start: int = 0
    step: int = 1
    #: which kernel positions the taps are: the first, and the step
    first_tap: int = 0
    tap_step: int = 1

    @property
    def grids(self) -> int:
        """How many interleaved grids of outputs there are, each without dilation; for a `tap_phases` axis."""
        return self.dilation // self.stride

    @property
    def outputs(self) -> int:
        """The outputs of the largest of these grids."""
        return math.ceil(self.out / self.grids)

    @property
    def plain(self) -> bool:
        """Whether outputs and pixels are the same positions, read as they are."""
        return (self.out, self.stride, self.step, self.before) == (self.size, 1, 1, 0)

    @property
    def padded(self) -> bool:
        """Whether a tap of an output lies outside."""
        last = (self.out - 1) * self.stride - self.before + (self.taps - 1) * self.dilation
        return self.taps > 0 and (self.before > 0 or last >= self.size)


def forward_axes(problem: ConvProblem) -> tuple[Axis, Axis]:
    """Return the axes of the forward pass: what y's pixels read from x."""
    (top, _), (left, _) = problem.padding
    (sh, sw), (lh, lw) = problem.stride, problem.dilation
    return (
        Axis(problem.h, problem.kh, sh, lh, top, problem.oh),
        Axis(problem.w, problem.kw, sw, lw, left, problem.ow),
    )


def phases(size: int, out: int, kernel: int, stride: int, dilation: int, before: int) -> list[Axis]:
    """Return the phases of an input gradient along one axis: the pixels of x that the same kernel positions reach.

    Kernel position ``h`` reaches pixel ``i`` from output ``o`` where ``i + before = o*stride + h*dilation``. Pixels
    whose ``i + before`` agree modulo the stride share their positions, every ``stride / gcd``-th one; one position
    further, the output lies ``dilation / gcd`` back.
    """
    found = []
    common = math.gcd(stride, dilation)
    for phase in range(min(stride, size)):
        start = phase
        pixels = -(-(size - start) // stride)
        positions = [h for h in range(kernel) if (start + before - h * dilation) % stride == 0]
        axis = Axis(out, len(positions), 1, dilation // common, 0, pixels, start, stride)
        if positions:
            # Flipped: the last position meets the first output.
            first = -((start + before - positions[-1] * dilation) // stride)
            axis = replace(axis, before=first, first_tap=positions[-1], tap_step=-(stride // common))
        found.append(axis)
    return found


def tap_phases(axis: Axis) -> list[Axis]:
    """Return the correlations that make up a strided one: each has the taps that meet the same every stride-th pixels.

    Output ``o`` reads pixel ``o*stride + h*dilation - before`` for kernel position ``h``. Positions that lie
    ``stride / gcd`` apart read pixels whose distance the stride divides: among these alone, the stride is one.
    """
    apart = axis.stride // math.gcd(axis.stride, axis.dilation)
    found = []
    for first in range(min(apart, axis.taps)):
        before, taps = axis.before - first * axis.dilation, len(range(first, axis.taps, apart))
        grid = axis.dilation * apart
        found.append(replace(axis, taps=taps, dilation=grid, before=before, first_tap=first, tap_step=apart))
    return found


def input_grad_axes(problem: ConvProblem) -> list[tuple[Axis, Axis]]:
    """Return the axes of every phase of the input gradient: what dx's pixels read from dy."""
    (top, _), (left, _) = problem.padding
    (sh, sw), (lh, lw) = problem.stride, problem.dilation
    return [
        (rows, columns)
        for rows in phases(problem.h, problem.oh, problem.kh, sh, lh, top)
        for columns in phases(problem.w, problem.ow, problem.kw, sw, lw, left)
    ]


def correlation_fields(problem: ConvProblem, rows: Axis, columns: Axis, backward: bool) -> dict[str, int]:
    """Return the fields of `Correlation`."""
    h, w, c, cg = problem.h, problem.w, problem.c, problem.cg
    out_h, out_w, out_c, dg = problem.oh, problem.ow, problem.d, problem.dg
    if backward:
        (h, w, c, cg), (out_h, out_w, out_c, dg) = (out_h, out_w, out_c, dg), (h, w, c, cg)
    return dict(
        n=problem.n, groups=problem.groups, h=h, w=w, c=c, cg=cg, dg=dg,
        dilation_h=rows.dilation, dilation_w=columns.dilation, top=rows.before, left=columns.before,
        p=rows.out, q=columns.out, y_0=(rows.start * out_w + columns.start) * out_c,
        y_n=out_h * out_w * out_c, y_p=rows.step * out_w * out_c, y_q=columns.step * out_c,
    )  # fmt: skip


def weight_strides(problem: ConvProblem, weights: str) -> tuple[int, int, int, int]:
    """Return how far it is in w, in elements, from one kernel, row, column and channel of it to the next."""
    if weights == "HWIO":
        return 1, problem.kw * problem.cg * problem.d, problem.cg * problem.d, problem.d
    return problem.kh * problem.kw * problem.cg, problem.kw * problem.cg, problem.cg, 1


def packings(
    problem: ConvProblem, phases: list[tuple[Axis, Axis]], backward: bool, width: int, lanes: int, weights: str = "OHWI"
) -> tuple[list[Packing], int, list[int]]:
    """Return how the weights of each phase are packed, one behind the other, in panels of `width` columns.

    Also the tasks of all of them, and where the packed weights of each begin, and the last end.
    """
    d, row, tap, c = weight_strides(problem, weights)
    cg, dg = (problem.dg, problem.cg) if backward else (problem.cg, problem.dg)
    records, tasks, ends = [], 0, [0]
    for rows, columns in phases:
        records.append(
            Packing(
                records=len(phases), first_task=tasks, groups=problem.groups, columns=dg, steps=cg,
                R=rows.taps, Q=columns.taps, w_0=rows.first_tap * row + columns.first_tap * tap, w_g=problem.dg * d,
                w_j=c if backward else d, w_k=d if backward else c,
                w_r=rows.tap_step * row, w_q=columns.tap_step * tap, packed_0=ends[-1],
            )
        )  # fmt: skip
        tasks += problem.groups * rows.taps * columns.taps * math.ceil(dg / width)
        ends.append(ends[-1] + packed_size(problem.groups, dg, rows.taps * columns.taps * cg, lanes))
    return records, tasks, ends
