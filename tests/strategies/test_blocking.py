"""How sizes are cut: blocks cover them once, and bodies cut as the plan does."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nhwconv import planning
from nhwconv.codegen.simd import integers
from nhwconv.program import Program, Step, places
from nhwconv.runtime.jit import Body
from nhwconv.runtime.records import Record, record
from nhwconv.strategies.blocking import (
    channel_block,
    channel_blocks,
    equal_blocks,
    inside,
    largest_block,
    point_pitch,
)

sizes = st.integers(1, 3000)


@given(size=sizes, parts=st.integers(0, 100), multiple=st.sampled_from([1, 4, 14, 32]))
def test_equal_blocks(size, parts, multiple):
    """No more than about so many, none longer than needed, whole multiples."""
    block = equal_blocks(size, parts, multiple)
    assert block % multiple == 0
    assert 0 < block <= math.ceil(size / multiple) * multiple
    assert math.ceil(size / block) <= max(parts, 1)
    assert block - multiple < math.ceil(size / max(parts, 1))


@given(size=sizes, limit=st.integers(1, 500), multiple=st.sampled_from([1, 4, 32]))
def test_largest_block(size, limit, multiple):
    """At most the limit, but for the multiple; and no block is much shorter than another."""
    block = largest_block(size, limit, multiple)
    assert block % multiple == 0
    assert 0 < block < limit + multiple
    assert math.ceil(size / block) <= math.ceil(size / limit)


@given(first=st.integers(-200, 200), size=st.integers(0, 100), step=st.integers(1, 20), count=st.integers(0, 40))
def test_inside(first, size, step, count):
    """Exactly the places that are inside, by trying each."""
    low, high = inside(first, size, step, count)
    found = [i for i in range(count) if 0 <= first + i * step < size]
    assert list(range(low, high)) == found
    assert low <= high


@given(size=st.integers(1, 700), block=st.integers(1, 20), lanes=st.sampled_from([2, 4, 8, 16]))
def test_blocks_of_channels_cover_them_once(size, block, lanes):
    """The last takes a rest of fewer than a vector with it: every block has a whole vector, where there is one."""
    block = min(block * lanes, size)
    found = []
    for number in range(channel_blocks(size, block, lanes)):
        first, channels = channel_block(number, size, block, lanes)
        assert min(lanes, size) <= channels < block + lanes
        found += range(first, first + channels)
    assert found == list(range(size)) or size < lanes


@given(size=sizes, lanes=st.sampled_from([2, 4, 8, 16]))
def test_points_lie_an_odd_number_of_vectors_apart(size, lanes):
    """Room for all, and little more."""
    pitch = point_pitch(size, lanes)
    assert size <= pitch < size + 2 * lanes
    assert pitch % (2 * lanes) == lanes


class Cut(Record):
    """What the functions take."""

    first: int
    size: int
    step: int
    count: int


def test_bodies_cut_as_the_plan_does():
    """The same functions, compiled: negative numbers are divided alike."""

    def cut(operands, geometry, worker, task, fresh):
        g = record(geometry, task, Cut)
        target = integers(integers(operands)[0])
        target[4 * task], target[4 * task + 1] = inside(g.first, g.size, g.step, g.count)
        target[4 * task + 2] = channel_blocks(g.size + 1, g.step, 4)
        target[4 * task + 3] = point_pitch(g.size, 8)

    rng = np.random.default_rng(0)
    records = tuple(
        Cut(first=rng.integers(-50, 50), size=rng.integers(0, 40), step=rng.integers(1, 9), count=rng.integers(0, 20))
        for _ in range(500)
    )
    y = np.zeros((500, 4), np.int64)
    planning.execute(Program((Step(Body(cut), records, 500, places("y")),)), y=y)
    for g, row in zip(records, y.tolist(), strict=True):
        numbers = [int(getattr(g, name)) for name in ("first", "size", "step", "count")]
        low, high = inside(*numbers)
        assert row == [low, high, channel_blocks(numbers[1] + 1, numbers[2], 4), point_pitch(numbers[1], 8)]
