"""Axes: every tap of every output is the one that the definition of the pass says, for phases and grids too."""

import numpy as np
import pytest
from hypothesis import given

import nhwconv as nc
import oracle
from cases import Case, cases, draw_data
from nhwconv.strategies.axes import (
    correlation_fields,
    forward_axes,
    input_grad_axes,
    phases,
    tap_phases,
)


def problem_of(case, pass_="forward"):
    return nc.plan(pass_, case.x_shape, case.w_shape, **case.options, strategy="tensordot").problem


def correlate(x, w, pairs, shape, groups, backward):
    """Compute the sum over taps of all axes, as `Axis` describes it."""
    y = np.zeros(shape)
    _, h, width, _ = x.shape
    for rows, columns in pairs:
        for p in range(rows.out):
            for q in range(columns.out):
                target = y[:, rows.start + p * rows.step, columns.start + q * columns.step]
                for r in range(rows.taps):
                    i = p * rows.stride - rows.before + r * rows.dilation
                    for s in range(columns.taps):
                        j = q * columns.stride - columns.before + s * columns.dilation
                        if not (0 <= i < h and 0 <= j < width):
                            continue
                        tap = w[:, rows.first_tap + r * rows.tap_step, columns.first_tap + s * columns.tap_step]
                        dg, cg = len(w) // groups, w.shape[-1]
                        for g in range(groups):
                            weights = tap[g * dg : (g + 1) * dg]
                            if backward:
                                target[:, g * cg : (g + 1) * cg] += x[:, i, j, g * dg : (g + 1) * dg] @ weights
                            else:
                                target[:, g * dg : (g + 1) * dg] += x[:, i, j, g * cg : (g + 1) * cg] @ weights.T
    return y


CASES = [
    Case(),
    Case(h=9, w=8, kh=3, kw=2, stride=(2, 3), padding=((1, 0), (2, 1)), dilation=(2, 1), c=4, d=6, groups=2),
    Case(h=11, w=12, kh=4, kw=3, stride=(4, 2), dilation=(2, 4), padding=((3, 2), (0, 5))),
    Case(h=5, w=4, kh=1, kw=1, stride=(3, 2), padding=((2, 0), (0, 1))),
    Case(h=2, w=3, kh=2, kw=3, padding=((5, 4), (6, 3)), stride=(2, 1)),
    Case(h=7, w=7, kh=2, kw=2, stride=(5, 4)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_axes_of_the_forward_pass(case):
    """Directly, and as the sum of the phases of its taps."""
    data = draw_data(case, np.float64)
    expected = oracle.forward(data.x, data.w, **case.options)
    rows, columns = forward_axes(problem_of(case))
    got = correlate(data.x, data.w, [(rows, columns)], case.y_shape, case.groups, False)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    pairs = [(r, q) for r in tap_phases(rows) for q in tap_phases(columns)]
    got = correlate(data.x, data.w, pairs, case.y_shape, case.groups, False)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    for axis in (*tap_phases(rows), *tap_phases(columns)):
        assert axis.dilation % axis.stride == 0
        assert axis.grids >= 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_axes_of_the_input_gradient(case):
    """Phase by phase, of which each has a stride of one."""
    data = draw_data(case, np.float64)
    expected = oracle.input_grad(data.dy, data.w, size=(case.h, case.w), **case.options)
    pairs = input_grad_axes(problem_of(case))
    assert all(axis.stride == 1 for pair in pairs for axis in pair)
    got = correlate(data.dy, data.w, pairs, case.x_shape, case.groups, True)
    np.testing.assert_allclose(got, expected, atol=1e-12)


@given(case=cases())
def test_phases_write_every_pixel_once(case):
    """Together they cover x, whatever the stride; and every kernel position is some phase's, where it reaches x."""
    for size, out, kernel, axis in ((case.h, case.y_shape[1], case.kh, 0), (case.w, case.y_shape[2], case.kw, 1)):
        found = phases(size, out, kernel, case.stride[axis], case.dilation[axis], case.padding[axis][0])
        pixels = sorted(a.start + i * a.step for a in found for i in range(a.out))
        assert pixels == list(range(size))


@given(case=cases())
def test_padded_and_plain_say_what_lies_outside(case):
    """By trying every tap of every output."""
    for axis in forward_axes(problem_of(case)):
        read = [o * axis.stride - axis.before + t * axis.dilation for o in range(axis.out) for t in range(axis.taps)]
        assert axis.padded == (not all(0 <= i < axis.size for i in read))
        if axis.plain and axis.taps == 1:
            assert read == list(range(axis.size))


@pytest.mark.parametrize("backward", [False, True])
def test_fields_say_where_outputs_lie(backward):
    """An output's place in y, by its image, row and column, in elements."""
    case = CASES[1]
    problem = problem_of(case)
    shape = case.x_shape if backward else case.y_shape
    places = np.arange(np.prod(shape)).reshape(shape)
    for rows, columns in input_grad_axes(problem) if backward else [forward_axes(problem)]:
        f = correlation_fields(problem, rows, columns, backward)
        assert (f["h"], f["w"], f["c"]) == (case.y_shape if backward else case.x_shape)[1:]
        for n in range(case.n):
            for p in range(f["p"]):
                for q in range(f["q"]):
                    place = f["y_0"] + n * f["y_n"] + p * f["y_p"] + q * f["y_q"]
                    assert place == places[n, rows.start + p * rows.step, columns.start + q * columns.step, 0]
