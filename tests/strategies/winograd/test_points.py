"""The matrices of F(m, r): exact in fractions, for every form that is used and more."""

from fractions import Fraction
from itertools import product

import pytest

from nhwconv.strategies.winograd.points import POINTS, matrices

FORMS = [(m, r) for m, r in product(range(1, 9), range(1, 9)) if m + r - 1 <= len(POINTS) + 1]


def times(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


@pytest.mark.parametrize(("m", "r"), FORMS)
def test_a_tile_is_the_correlation(m, r):
    """``A^T ((G w) * (B^T x))`` of unit vectors is 1 where the definition has it: every product, exactly."""
    inputs, weights, output = matrices(m, r)
    alpha = m + r - 1 if r > 1 else m
    assert len(inputs) == len(weights) == len(output[0]) == alpha
    for i, k in product(range(alpha), range(r)):
        x, w = ([Fraction(j == place) for j in range(size)] for place, size in ((i, alpha), (k, r)))
        products = [a * b for a, b in zip(times(weights, w), times(inputs, x), strict=True)]
        assert times(output, products) == [Fraction(o + k == i) for o in range(m)]


@pytest.mark.parametrize(("m", "r"), [(m, r) for m, r in FORMS if r > 1])
def test_the_transposed_form_shares_the_input_transform(m, r):
    """F(m, r) and F(r, m) have the same points: a weight gradient transforms x as the forward pass does."""
    if m > 1:
        assert matrices(m, r).input == matrices(r, m).input


def test_too_many_points_are_refused():
    """By name."""
    with pytest.raises(ValueError, match=r"^F\(9, 9\) needs 16 points, but only 9 are listed$"):
        matrices(9, 9)


def test_points_are_small_and_in_pairs():
    """Opposite points share half of their work."""
    assert POINTS[0] == 0
    assert all(a == -b for a, b in zip(POINTS[1::2], POINTS[2::2], strict=True))
    assert len(set(POINTS)) == len(POINTS)
