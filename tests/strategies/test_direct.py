"""The direct strategy where its arrays have another form than most: patches, groups of one tap, many phases."""

from __future__ import annotations

import pytest

import checked
import nhwconv as nc
from cases import DTYPES, PASSES, Case
from nhwconv.program import Step

CASES = [
    # Patches: whole rows, a rest at the right or below, one output, rows and columns, an image of one column.
    Case(n=2, h=12, w=20, c=3, d=20, kh=3, kw=5, stride=(3, 5)),
    Case(n=2, h=14, w=22, c=5, d=17, kh=3, kw=5, stride=(3, 5)),
    Case(n=3, h=7, w=7, c=5, d=9, kh=7, kw=7, stride=(3, 2)),
    Case(n=2, h=12, w=4, c=6, d=40, kh=3, kw=4, stride=(3, 1)),
    Case(n=2, h=11, w=8, c=6, d=33, kh=3, kw=4, stride=(2, 4), padding=((1, 1), (0, 0))),
    Case(n=2, h=12, w=1, c=8, d=10, kh=4, kw=1, stride=(4, 1)),
    # Groups of one tap, as they lie.
    Case(n=2, h=5, w=7, c=24, d=60, kh=1, kw=1, groups=3),
    Case(n=2, h=9, w=8, c=24, d=60, kh=1, kw=1, stride=(2, 3), groups=3),
    # Phases of unequal sizes, without taps too.
    Case(n=2, h=11, w=14, c=40, d=24, kh=3, kw=2, stride=(4, 3), padding=((1, 1), (1, 0))),
]


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forms_of_arrays(case, dtype, pass_):
    """Each pass equals the oracle; nothing of an `out` full of NaN is left."""
    checked.overwritten(case, dtype, pass_, "loop")


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_phases_are_two_steps(stride):
    """However many phases an input gradient has, their weights are packed in one step and they run in another."""
    plan = nc.plan("input_grad", (2, 16, 16, 64), (64, 3, 3, 64), padding=1, stride=stride, strategy="loop")
    steps = plan.program().steps
    assert [len(step.records) for step in steps if isinstance(step, Step)] == [stride**2] * 2
