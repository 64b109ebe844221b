"""Programs: where parts lie, what they take, their image in memory, and how programs become parts of others."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fresh
import nhwconv as nc
from cases import PASSES, cases, refusal
from nhwconv.program import ALIGNMENT, ARRAYS, Call, Part, Place, Program, Step, calls, places
from nhwconv.runtime.jit import Body
from nhwconv.runtime.records import Record
from nhwconv.runtime.tasks import COUNTERS_APART
from nhwconv.strategies import REGISTRY


class One(Record):
    """A number."""

    number: int


class Somewhere:
    """Stands for a compiled body."""

    def __init__(self, address=4096):
        self.address = address


def step(*operands, tasks=1, number=1, cycles=0.0, body=None):
    return Step(body or Somewhere(), (One(number=number),), tasks, places(*operands), cycles)


def taken(program):
    """Return each part with where it lies: (part, start, end)."""
    return [(part, start, start + part.nbytes) for part, start in zip(program.parts, program.offsets, strict=True)]


def used(program):
    """Return the first and the last step that use each part."""
    found = {}
    for i, each in enumerate(program.steps):
        for place in each.places:
            if isinstance(place.source, Part):
                found[place.source] = found.get(place.source, (i, i))[0], i
    return found


def assert_placed_well(program):
    """Parts that live together are apart, start at cache lines, and lie within the scratch."""
    lives, lying = used(program), taken(program)
    assert set(program.parts) == set(lives)
    for part, start, end in lying:
        assert start % ALIGNMENT == 0
        assert 0 <= start <= end <= program.workspace - program.extra
        for other, start_2, end_2 in lying:
            together = lives[part][0] <= lives[other][1] and lives[other][0] <= lives[part][1]
            assert part is other or not together or end <= start_2 or end_2 <= start, (part, other)
    assert program.header % ALIGNMENT == 0
    assert program.nbytes == program.header + program.workspace - program.extra


# ------------------------------------------------------------------------------------------------- scratch


def test_parts_that_live_at_different_times_share_memory():
    """A chain of steps takes what two neighbours take, and not the sum."""
    parts = [Part(1000, str(i)) for i in range(6)]
    program = Program(tuple(step(a, b) for a, b in zip(["x", *parts], [*parts, "y"], strict=True)))
    assert_placed_well(program)
    assert program.parts == tuple(parts)
    assert program.workspace == 1024 + 1000
    together = Program((step(*parts),))
    assert_placed_well(together)
    assert together.workspace == 5 * 1024 + 1000


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=8).flatmap(
        lambda sizes: st.tuples(
            st.just(sizes), st.lists(st.sets(st.integers(0, len(sizes) - 1), max_size=4), min_size=1, max_size=8)
        )
    ),
    st.integers(1, 5),
)
def test_any_parts_are_placed_well(drawn, workers):
    """Whatever their sizes and lives; and they take no more than all of them side by side."""
    sizes, steps = drawn
    parts = [Part(size) for size in sizes]
    program = Program(tuple(step("x", *(parts[i] for i in sorted(chosen))) for chosen in steps), workers)
    assert_placed_well(program)
    assert program.workspace <= sum(-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in program.parts)


@pytest.mark.parametrize("pass_", PASSES)
@given(case=cases(), workers=st.sampled_from([1, 2, 5, 40]), dtype=st.sampled_from(["float32", "float64", "float16"]))
def test_programs_of_strategies_are_placed_well(pass_, case, workers, dtype):
    """Every strategy's, for any number of workers; and its steps name arrays that the pass has."""
    have = {
        "forward": {"x", "w", "b", "y"}, "weight_grad": {"x", "dy", "dw", "db"}, "input_grad": {"dy", "w", "dx"},
    }[pass_]  # fmt: skip
    if case.n == 0:
        return
    with fresh.workers(workers):
        for name in REGISTRY:
            if refusal(case, pass_, name, dtype) is not None:
                continue
            plan = nc.plan(pass_, case.x_shape, case.w_shape, **case.options, dtype=dtype, strategy=name)
            for bias in (False, True) if pass_ != "input_grad" else (False,):
                program = plan.program(bias)
                assert_placed_well(program)
                named = {p.source for s in program.steps for p in s.places if isinstance(p.source, str)}
                assert named <= have
                assert {"forward": "y", "weight_grad": "dw", "input_grad": "dx"}[pass_] in named
                if bias:
                    assert have & {"b", "db"} <= named
                assert program.cycles > 0
                assert all(s.tasks >= 1 for s in program.steps if s.compiled), name


def test_the_header_holds_addresses_operands_and_the_queue():
    """Ahead of the first part: a word for each array and part, a step's operands, and a counter for each worker."""
    parts = [Part(10) for _ in range(3)]
    for workers in (1, 7):
        program = Program((step(*parts),), workers)
        words = len(ARRAYS) + 3 + 8 + workers * COUNTERS_APART
        assert words * 8 <= program.header < words * 8 + ALIGNMENT
        assert program.behind_header == tuple(program.header + offset for offset in program.offsets)


# --------------------------------------------------------------------------------------------------- image


def test_an_image_says_all_that_the_executor_reads():
    """Steps, parts, workers, offsets; then each step's body, geometry, tasks, workers and places."""
    part = Part(100)
    first = step("x", part, body=Somewhere(1000), tasks=9)
    second = step(Place(part, 16), Place("dw", 8), "x", body=Somewhere(2000), tasks=2)
    program = Program((first, second), 4)
    numbers = program.image((777,)).tolist()
    assert numbers[:4] == [2, 1, 4, 777]
    x, dw, slot = ARRAYS.index("x"), ARRAYS.index("dw"), len(ARRAYS)
    assert numbers[4:13] == [1000, first.geometry.ctypes.data, 9, 4, 2, x, 0, slot, 0]
    assert numbers[13:] == [2000, second.geometry.ctypes.data, 2, 2, 3, slot, 16, dw, 8, x, 0]
    only = program.image((777,), second).tolist()
    assert only[:4] == [1, 1, 4, 777]
    assert only[4:] == numbers[13:]


def test_an_image_is_made_once():
    """Its address is what the executor takes, so it must stay."""
    program = Program((step("x", Part(8)),), 2)
    assert program.image((64,)) is program.image((64,))
    assert program.image((64,)) is not program.image((128,))
    assert program.address == program.image(program.behind_header).ctypes.data == program.address


def test_geometry_lies_in_memory():
    """The records, one behind the other; packed once."""
    made = Step(Somewhere(), (One(number=3), One(number=-5)), 1, places("x"))
    assert made.geometry.view(np.int64).tolist() == [3, -5]
    assert made.geometry is made.geometry


def test_a_body_is_not_compiled_before_the_program_runs():
    """Planning asks what things take, and compiles nothing."""
    body = Body(lambda operands, geometry, worker, task, fresh: None)
    program = Program((step("x", Part(10), body=body),))
    assert program.workspace + program.nbytes + program.cycles > 0
    assert program.native
    assert body.stats == (0, 0)


# ----------------------------------------------------------------------------------------- parts of others


def test_moved():
    """Arrays get other places, parts stay; the offset of an operand is added to that of its new place."""
    part, target = Part(8), Part(1000)
    program = Program((step(Place("x", 16), part, "y", cycles=3.0), step("dw", "y")), 5, 7)
    moved = program.moved({"x": Place(target, 100), "y": Place("dy", 4), "b": Place("db")})
    assert [s.places for s in moved.steps] == [
        (Place(target, 116), Place(part), Place("dy", 4)), (Place("dw"), Place("dy", 4)),
    ]  # fmt: skip
    assert (moved.workers, moved.extra, moved.cycles) == (5, 7, 3.0)
    assert program.steps[0].places == (Place("x", 16), Place(part), Place("y"))
    assert set(moved.parts) == {part, target}


def test_moved_programs_have_images_of_their_own():
    """What was made for the old places is not found for the new ones."""
    program = Program((step("x", "y"),))
    before = program.image(()).tolist()
    after = program.moved({"x": Place("w")}).image(()).tolist()
    assert before != after
    assert program.image(()).tolist() == before


def test_joined():
    """The steps of all, one program after another; the most workers and the most extra memory."""
    part = Part(500)
    programs = [Program((step(part, cycles=1.0),), 2, 10), Program((step("x", cycles=2.0), step(part)), 4, 3)]
    joined = Program.joined(iter(programs))
    assert joined.steps == (*programs[0].steps, *programs[1].steps)
    assert (joined.workers, joined.extra, joined.cycles) == (4, 10, 3.0)
    assert joined.parts == (part,)
    assert joined.workspace == 510


def test_calls():
    """A pass as one call of Python code: its arrays with their shapes, a bias last."""
    problem = nc.plan("forward", (2, 5, 6, 3), (4, 3, 2, 3)).problem
    expected = {
        "forward": (("x", "w", "y"), (problem.x_shape, problem.w_shape, problem.y_shape), "b"),
        "weight_grad": (("x", "dy", "dw"), (problem.x_shape, problem.y_shape, problem.w_shape), "db"),
        "input_grad": (("dy", "w", "dx"), (problem.y_shape, problem.w_shape, problem.x_shape), None),
    }
    for pass_, (names, shapes, bias) in expected.items():
        for wanted in (False, True) if bias else (False,):
            program = calls(print, problem, pass_, wanted, 5.0, 99)
            (made,) = program.steps
            assert isinstance(made, Call)
            assert made.places == places(*names, *([bias] if wanted else []))
            assert made.shapes == (*shapes, *([(4,)] if wanted else []))
            assert (made.function, made.dtype, program.cycles, program.workspace) == (print, problem.dtype, 5.0, 99)
            assert not program.native


def test_places():
    """Names, parts and places are operands."""
    part = Part(8)
    assert places("x", part, Place(part, 4)) == (Place("x", 0), Place(part, 0), Place(part, 4))


def test_equal_parts_are_different_parts():
    """Two of the same size and name are two pieces of memory."""
    a, b = Part(64, "same"), Part(64, "same")
    assert a != b
    assert len(Program((step(a, b),)).parts) == 2
    assert replace(a) != a


def bodies(program):
    return [s.body for s in program.steps]


def test_backward_is_one_program():
    """All gradients in one: dw and db together, then dx; each alone has no more steps than it needs."""
    from nhwconv.planning import Backward

    w, x = (nc.plan(p, (2, 14, 14, 16), (16, 3, 3, 16), padding=1) for p in ("weight_grad", "input_grad"))
    whole = Backward(w, x, ("dx", "dw", "db")).program(False)
    assert whole.native
    assert len(whole.steps) == len(w.program(True).steps) + len(x.program().steps)
    assert_placed_well(whole)
    named = [{p.source for p in s.places} for s in whole.steps]
    assert {"dx", "dw", "db"} <= set().union(*named)
    assert bodies(Backward(w, x, ("dx",)).program(False)) == bodies(x.program())
    assert bodies(Backward(w, x, ("dw",)).program(False)) == bodies(w.program())
    alone = Backward(w, x, ("db",)).program(False)
    assert {"dw", "dx", "x", "w"}.isdisjoint(p.source for s in alone.steps for p in s.places)
