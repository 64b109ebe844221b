"""Groups of few channels: every way in which they lie on vectors."""

from __future__ import annotations

import numpy as np
import pytest

import checked
import fresh
import nhwconv as nc
from cases import DTYPES, PASSES, Case
from nhwconv.runtime import machine

PAD1 = ((1, 1), (1, 1))
#: Channels of x and of y in a group: one and several groups a vector, a part of one, as many in as out or not.
CHANNELS = ((1, 1), (1, 3), (3, 1), (2, 2), (4, 4), (5, 5), (8, 8), (3, 7), (16, 2), (16, 16), (24, 20), (32, 32))
CASES = [
    *(Case(n=1, h=6, w=17, c=5 * cg, d=5 * dg, padding=PAD1, groups=5) for cg, dg in CHANNELS if cg in (1, dg)),
    *(Case(n=2, h=9, w=13, c=3 * cg, d=3 * dg, padding=PAD1, stride=(2, 2), groups=3) for cg, dg in ((4, 4), (8, 8))),
    Case(n=2, h=7, w=9, c=12, d=12, kh=1, kw=1, groups=3),
    Case(n=1, h=12, w=20, c=16, d=16, kh=5, kw=4, padding=((3, 2), (1, 4)), dilation=(2, 3), groups=4),
]


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_of_few_channels(case, dtype, pass_):
    """Each pass equals the oracle, however the groups lie on vectors; nothing of an `out` full of NaN is left."""
    checked.overwritten(case, dtype, pass_, "depthwise")


@pytest.mark.parametrize("pass_", ["forward", "input_grad"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_whose_vectors_are_not_aligned_are_stored_through_the_caches(dtype, pass_):
    """A pixel's channels are whole vectors, but every second group begins within one, where a streaming store traps."""
    channels = machine.lanes(np.dtype(dtype).itemsize) * 3 // 2
    case = Case(n=1, h=6, w=17, c=4 * channels, d=4 * channels, padding=PAD1, groups=4)
    with fresh.past_the_caches():
        checked.overwritten(case, dtype, pass_, "depthwise")


@pytest.mark.parametrize(("c", "d", "groups"), [(6, 6, 1), (66, 66, 2), (8, 80, 2)])
def test_many_channels_a_group_are_refused(c, d, groups):
    """One group, or groups of many channels, make better use of a register tile."""
    with pytest.raises(ValueError, match="it needs one channel of x a group, or several groups"):
        nc.plan("forward", (1, 8, 8, c), (d, 3, 3, c // groups), groups=groups, strategy="depthwise")


@pytest.mark.parametrize("pass_", PASSES)
def test_auto_takes_groups_of_four_channels(pass_, monkeypatch):
    """Of ResNeXt's first layers, every pass; a weight gradient where there are registers enough."""
    if pass_ == "weight_grad":
        monkeypatch.setattr(machine, "registers", lambda: 32)
    plan = nc.plan(pass_, (8, 28, 28, 128), (128, 3, 3, 4), padding=1, groups=32)
    assert plan.strategy == "depthwise"
