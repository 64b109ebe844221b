"""What the lanes of a vector read: each the channels of its own group."""

from __future__ import annotations

import pytest

from nhwconv.runtime import machine
from nhwconv.strategies.grouped.lanes import Spread

#: Channels of x and of y in a group: one and several groups a vector, a part of one, as many in as out or not.
CHANNELS = ((1, 1), (1, 3), (3, 1), (2, 2), (4, 4), (5, 5), (8, 8), (3, 7), (16, 2), (16, 16), (24, 20), (32, 32))


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


@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
@pytest.mark.parametrize(("cg", "dg"), CHANNELS)
def test_a_permutation_reads_every_channel_of_its_groups_from_one_load(cg, dg, lanes):
    """Whoever asks for one gets it where the CPU can and a load holds all of them, and reads nothing behind them."""
    spread = Spread(7, cg, dg, lanes, permuted=True)
    pattern = spread.pattern
    assert pattern.permuted == (machine.permutes() and spread.whole > 1 and cg > 1 and spread.whole * cg <= lanes)
    if not pattern.permuted:
        assert pattern == Spread(7, cg, dg, lanes).pattern
        return
    (load,) = pattern.loads(lanes)
    assert (load.offset, load.width) == (0, lanes) == (0, spread.fields()["reach"])
    for k in range(cg):
        assert all(element + k < lanes for element in load.taken.values())
