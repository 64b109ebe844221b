"""Packed weights: panels of whole vectors, one row a step of the sum, for every group, tap and phase."""

import numpy as np
import pytest

import nhwconv as nc
from cases import DTYPES, Case
from nhwconv import planning
from nhwconv.codegen.packing import pack_columns, pack_rows, packed_size
from nhwconv.codegen.tile import tile_shape
from nhwconv.program import Program, Step, places
from nhwconv.strategies.axes import forward_axes, input_grad_axes, packings

CASES = [
    Case(c=1, d=1, kh=1, kw=1),
    Case(c=3, d=17, kh=3, kw=2),
    Case(c=33, d=40, kh=2, kw=3),
    Case(c=12, d=70, groups=2),
    Case(c=66, d=6, groups=3, kh=1, kw=5),
    Case(h=9, w=9, c=5, d=19, kh=4, kw=3, stride=(2, 2)),
    Case(h=9, w=9, c=20, d=19, kh=3, kw=3, stride=(3, 2), dilation=(2, 2)),
]


def expected(case, w, phases, backward, width, lanes):
    """Return the packed weights, straight from their definition."""
    g, dg, cg = case.groups, case.d // case.groups, case.c // case.groups
    w = w.reshape(g, dg, case.kh, case.kw, cg)
    parts = []
    for rows, columns in phases:
        taps = [
            (rows.first_tap + r * rows.tap_step, columns.first_tap + q * columns.tap_step)
            for r in range(rows.taps)
            for q in range(columns.taps)
        ]
        for group in range(g):
            # (taps, steps, columns)
            side = [w[group, :, h, v, :] if backward else w[group, :, h, v, :].T for h, v in taps]
            size = cg if backward else dg
            for j in range(0, size, width):
                panel = -(-min(width, size - j) // lanes) * lanes
                for tap in side:
                    padded = np.zeros((tap.shape[0], panel), w.dtype)
                    padded[:, : min(width, size - j)] = tap[:, j : j + width]
                    parts.append(padded.ravel())
    return np.concatenate(parts)


@pytest.mark.parametrize("backward", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_are_packed_as_the_tile_reads_them(case, dtype, backward):
    """Every element is at its place, columns past the end are zero, and nothing else is written."""
    problem = nc.plan("forward", case.x_shape, case.w_shape, dtype=dtype, **case.options).problem
    _, nr, lanes = tile_shape(problem.dtype.itemsize)
    width = nr * lanes
    phases = input_grad_axes(problem) if backward else [forward_axes(problem)]
    records, tasks, ends = packings(problem, phases, backward, width, lanes)
    w = np.random.default_rng(0).standard_normal(case.w_shape).astype(dtype)
    packed = np.full(ends[-1] + 16, np.nan, dtype)
    body = (pack_rows if backward else pack_columns)(width, lanes, problem.dtype.itemsize)
    for workers in (1, 3):
        packed[:] = np.nan
        planning.execute(Program((Step(body, tuple(records), tasks, places("w", "y")),), workers), w=w, y=packed)
        np.testing.assert_array_equal(packed[: ends[-1]], expected(case, w, phases, backward, width, lanes))
        assert np.isnan(packed[ends[-1] :]).all()


def test_sizes_and_tasks():
    """A task is one tap of one panel; each phase begins where the one before ends."""
    problem = nc.plan("forward", (1, 9, 9, 20), (40, 3, 3, 20), stride=2).problem
    records, tasks, ends = packings(problem, input_grad_axes(problem), True, 32, 16)
    assert [r.first_task for r in records] == [0, 4, 6, 8]  # 2x2, 2x1, 1x2 and 1x1 taps of one panel
    assert tasks == 9
    assert ends == [0, *np.cumsum([4 * 40 * 32, 2 * 40 * 32, 2 * 40 * 32, 40 * 32])]
    assert [r.packed_0 for r in records] == ends[:-1]
    assert packed_size(3, 17, 10, 16) == 3 * 10 * 32
