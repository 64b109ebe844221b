"""Where rows of x are read: as they lie, or copied with their padding."""

from __future__ import annotations

import pytest

from cases import Case, problem_of
from nhwconv.runtime import machine
from nhwconv.strategies.axes import forward_axes
from nhwconv.strategies.grouped.lanes import Spread
from nhwconv.strategies.grouped.padded import View

PAD1 = ((1, 1), (1, 1))


def view_of(case, pixels=1):
    problem = problem_of(case)
    spread = Spread(problem.groups, problem.cg, problem.dg, machine.lanes(problem.dtype.itemsize))
    return View(problem, spread, [forward_axes(problem)], False, problem.c, pixels)


@pytest.mark.parametrize(
    ("channels", "stride", "padding", "pixels", "copied"),
    [
        (1, 1, PAD1, 1, False),  # three loads of a number
        (4, 1, PAD1, 1, True),  # twelve
        (4, 1, ((0, 0), (0, 0)), 1, False),  # nothing to pad
        (8, 2, PAD1, 1, False),  # six
        (8, 2, PAD1, 40, True),  # six, half of them not from L1: 40 pixels at multiples of 1024 bytes are in 4 sets
        (8, 2, PAD1, 4, False),
    ],
)
def test_rows_are_copied_where_numbers_are_loaded_often(channels, stride, padding, pixels, copied):
    """Or fewer times, from further away; what is copied is paid for."""
    case = Case(n=1, h=16, w=16, c=256, d=256, padding=padding, stride=(stride, stride), groups=256 // channels)
    view = view_of(case, pixels)
    assert view.gather == copied
    assert (view.copies(2) > 0) == copied
    assert view.copies(4) >= view.copies(2)


def test_pixels_that_lie_apart_do_not_collide():
    """Of other numbers of channels, as many pixels find room in L1."""
    case = Case(n=1, h=16, w=16, c=264, d=264, padding=PAD1, stride=(2, 2), groups=33)
    assert not view_of(case, pixels=40).gather
