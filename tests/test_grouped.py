"""Groups of few channels: every way in which they lie on vectors, and what the lanes of one read."""

from __future__ import annotations

import numpy as np
import pytest

import nhwconv as nc
from cases import DTYPES, PASSES, Case, data_of, exact_of, run
from nhwconv.runtime import machine
from nhwconv.strategies.grouped.lanes import Spread
from tolerance import assert_close

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
    value, absolute = exact_of(case, dtype, pass_)
    out = np.full(value.shape, np.nan, dtype)
    got = run(case, data_of(case, dtype), pass_, "depthwise", out=out)
    assert_close(got, value, absolute, case.length(pass_), "depthwise", case)


@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
@pytest.mark.parametrize(("cg", "dg"), CHANNELS)
def test_lanes_read_their_own_group(cg, dg, lanes):
    """Every lane takes the element of its own group from exactly one load; all vectors hold every channel once."""
    spread = Spread(7, cg, dg, lanes)
    whole, pieces = spread.whole, spread.pieces
    assert spread.vectors * lanes >= 7 * dg
    assert whole == 1 or (pieces == 1 and whole * dg <= lanes)
    loads = spread.pattern.loads(lanes)
    found = {}
    for load in loads:
        found |= {lane: load.offset + (e if load.width > 1 else 0) for lane, e in load.taken.items()}
    assert sum(len(load.taken) for load in loads) == len(found)
    if whole > 1:
        assert found == {lane: lane // dg * cg for lane in range(whole * dg)}
    assert all(element < load.width for load in loads for element in load.taken.values() if load.width > 1)


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
