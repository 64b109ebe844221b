"""Problems: what follows from sizes and options, and the strips into which a pass is cut."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import PASSES, Case, cases
from nhwconv.problem import ConvProblem

PAD1 = ((1, 1), (1, 1))
each_pass = pytest.mark.parametrize("pass_", PASSES)


def problem_of(case):
    return ConvProblem(
        case.n, case.h, case.w, case.c, case.d, case.kh, case.kw, case.stride, case.padding, case.dilation, case.groups
    )


@each_pass
@given(case=cases(), limit=st.integers(1, 5000))
def test_strips_are_problems_that_cover_the_pass_once(pass_, case, limit):
    """Each strip is a valid problem of the shapes that its slices cut out; written rows are disjoint and complete."""
    problem = problem_of(case)
    written = np.zeros((case.x_shape if pass_ == "input_grad" else case.y_shape)[:2], int)
    x, y = np.empty(case.x_shape), np.empty(case.y_shape)
    for strip in problem.strips(pass_, limit):
        p = strip.problem
        assert min(p.n, p.h, p.oh) >= 1
        assert p.padding[0][0] >= 0  # behind it may be less: rows that y does not read
        assert x[strip.x].shape == p.x_shape
        assert y[strip.y].shape == p.y_shape
        written[strip.x if pass_ == "input_grad" else strip.y] += 1
    assert (written == 1).all()


@each_pass
def test_strips_are_as_small_as_asked(pass_):
    """A large image is cut into strips of about the limit, a batch of small ones into images."""
    problem = ConvProblem(2, 100, 100, 8, 8, 3, 3, padding=PAD1)
    sizes = [np.prod(s.problem.x_shape) + np.prod(s.problem.y_shape) for s in problem.strips(pass_, 20_000)]
    # A strip also reads the rows that its neighbours write: kh - 1 of them, of x or of y.
    assert max(sizes) <= 20_000 + 2 * 100 * 8
    assert len(sizes) >= 2 * problem.h * 100 * 16 / 20_000
    small = ConvProblem(50, 10, 10, 8, 8, 3, 3, padding=PAD1)
    assert [s.problem.n for s in small.strips(pass_, 16_000)] == [10] * 5
    assert len(list(problem.strips(pass_, 10**9))) == 1


@given(case=cases())
def test_sizes_follow(case):
    """Shapes, work and bytes are the definition's."""
    p = problem_of(case)
    assert (p.x_shape, p.w_shape, p.y_shape) == (case.x_shape, case.w_shape, case.y_shape)
    assert p.flops == 2 * np.prod(case.y_shape) * case.length("forward")
    assert p.bytes == 4 * sum(int(np.prod(s)) for s in (case.x_shape, case.w_shape, case.y_shape))
    assert (p.cg * p.groups, p.dg * p.groups) == (case.c, case.d)


def test_equal_problems_are_one_key():
    """Looked up at every call: equal sizes, equal hash; other options, another problem."""
    a, b = problem_of(Case(padding=PAD1)), problem_of(Case(padding=PAD1))
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b, problem_of(Case()), problem_of(Case(n=3))}) == 3


@pytest.mark.parametrize(
    ("case", "x", "w", "stride"),
    [
        (Case(n=2, h=12, w=20, c=3, d=4, kh=3, kw=5, stride=(3, 5)), (2, 12, 4, 15), (4, 3, 1, 15), (3, 1)),
        (Case(n=2, h=12, w=5, c=3, d=4, kh=3, kw=5, stride=(3, 1)), (2, 4, 1, 45), (4, 1, 1, 45), (1, 1)),
        (Case(n=2, h=7, w=6, c=3, d=4, kh=7, kw=6, stride=(2, 2)), (2, 1, 1, 126), (4, 1, 1, 126), (1, 1)),
        (Case(n=2, h=9, w=1, c=3, d=4, kh=3, kw=1, stride=(3, 2)), (2, 3, 1, 9), (4, 1, 1, 9), (1, 1)),
    ],
    ids=str,
)
def test_pixels_of_one_output_are_folded(case, x, w, stride):
    """Pixels that one output reads alone are channels of one: the arrays hold the same numbers in the same order."""
    folded = problem_of(case).folded
    assert (folded.x_shape, folded.w_shape, folded.stride) == (x, w, stride)
    assert (folded.y_shape, folded.flops) == (problem_of(case).y_shape, problem_of(case).flops)


@pytest.mark.parametrize(
    "changes",
    [
        {"w": 21},
        {"stride": (3, 4)},
        {"padding": ((0, 0), (5, 0))},
        {"w": 45, "dilation": (1, 2)},
        {"c": 6, "groups": 3},
        {"kw": 1, "stride": (3, 1)},
    ],
    ids=str,
)
def test_shared_pixels_are_not_folded(changes):
    """A rest of a row, pixels between, padding, dilation, groups, and a single tap: the problem stays as it is."""
    problem = problem_of(replace(Case(n=2, h=12, w=20, c=3, d=6, kh=3, kw=5, stride=(3, 5)), **changes))
    assert problem.folded is problem
