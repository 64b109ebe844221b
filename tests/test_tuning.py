"""Tuning: the fastest strategy is found, remembered and obeyed, and nothing else changes a choice."""

import pickle
import time

import numpy as np
import pytest

import nhwconv as nc
from cases import PASSES
from nhwconv import choices, tuning
from nhwconv.strategies import AUTO, REGISTRY
from rigged import FAST, SLOW, W, X, ran, replaced, rig

MEASURED = "it was measured to be the fastest here by nhwconv.tune"


@pytest.fixture(autouse=True)
def _untuned(tmp_path, monkeypatch):
    """An empty folder for choices (compiled kernels stay where they are), nothing remembered, before and after."""
    monkeypatch.setattr(choices, "folder", lambda: tmp_path / "tuning")
    monkeypatch.setenv("NHWCONV_TUNING", "write")
    choices.forget()
    nc.ops.forget_plans()
    yield
    choices.forget()
    nc.ops.forget_plans()


@pytest.mark.parametrize("winner", ["loop", "winograd"])
def test_the_fastest_is_obeyed(winner, monkeypatch):
    """By the call after tune, whatever had been planned before, and after a look at the disk."""
    rig(monkeypatch.setattr, **{name: FAST if name == winner else SLOW for name in ("loop", "winograd")})
    ran()
    plan = nc.tune("forward", X, W, padding=1, seconds=0.02)
    assert (plan.strategy, plan.reason) == (winner, MEASURED)
    assert plan == nc.plan("forward", X, W, padding=1)
    assert ran() == winner
    choices.forget()  # as in another process
    nc.ops.forget_plans()
    assert ran() == winner


def test_a_choice_is_for_one_problem_pass_and_dtype(monkeypatch):
    slower = "loop" if nc.plan("forward", X, W, padding=1).strategy == "winograd" else "winograd"
    rig(monkeypatch.setattr, **{name: FAST if name == slower else SLOW for name in ("loop", "winograd")})
    nc.tune("forward", X, W, padding=1, seconds=0.01)
    assert nc.plan("forward", X, W, padding=1).reason == MEASURED
    for pass_, x, options in (
        ("weight_grad", X, {"padding": 1}),
        ("forward", X, {}),
        ("forward", X, {"padding": 1, "dtype": "float64"}),
        ("forward", X, {"padding": 1, "dtype": "float16"}),
        ("forward", (3, *X[1:]), {"padding": 1}),
    ):
        assert nc.plan(pass_, x, W, **options).reason != MEASURED


def test_what_is_allowed_comes_first(monkeypatch):
    """A name is obeyed; a tuple takes the winner where it has it, and otherwise the least predicted cost."""
    rig(monkeypatch.setattr, loop=SLOW, winograd=FAST)
    nc.tune("forward", X, W, padding=1, seconds=0.01)

    def planned(strategy):
        plan = nc.plan("forward", X, W, padding=1, strategy=strategy)
        return plan.strategy, plan.reason

    assert planned("loop") == ("loop", "it was asked for")
    assert planned(("depthwise", "loop")) == ("loop", "no other strategy that may be chosen can do it")
    assert planned(("loop", "winograd")) == ("winograd", MEASURED)
    assert planned(("loop", "tensordot"))[1].startswith("its predicted cost is ")


def test_a_winner_that_cannot_do_the_problem_any_more_is_not_taken(monkeypatch):
    rig(monkeypatch.setattr, loop=SLOW, winograd=FAST)
    nc.tune("forward", X, W, padding=1, seconds=0.01)
    monkeypatch.setattr(type(REGISTRY["winograd"]), "supports", lambda *_: "it is Sunday")
    nc.ops.forget_plans()
    assert nc.plan("forward", X, W, padding=1).strategy == "loop"


def test_the_candidates_can_be_named(monkeypatch):
    """Of the named ones the fastest is remembered; one alone has nobody to race against."""
    x, w = (1, 12, 12, 32), (32, 3, 3, 1)
    calls = rig(monkeypatch.setattr, loop=FAST, depthwise=SLOW, winograd=SLOW)
    plan = nc.tune("forward", x, w, groups=32, strategies=("depthwise", "loop"), seconds=0.01)
    assert (plan.strategy, plan.reason) == ("loop", MEASURED)
    assert nc.plan("forward", x, w, groups=32).strategy == "loop"
    calls["loop"] = 0
    plan = nc.tune("forward", x, w, groups=32, strategies="depthwise")
    assert (plan.strategy, plan.reason) == ("depthwise", "it was asked for")
    assert calls["loop"] == 0
    assert nc.plan("forward", x, w, groups=32).strategy == "loop"


def test_nothing_is_measured_where_there_is_no_choice():
    """One candidate, or an empty batch."""
    plan = nc.tune("forward", (2, 9, 9, 3), (5, 2, 2, 3), stride=2)
    assert (plan.strategy, plan.reason) == ("loop", "no other strategy that may be chosen can do it")
    assert nc.tune("forward", (0, *X[1:]), W).reason != MEASURED
    assert choices.count() == 0


@pytest.mark.parametrize("pass_", PASSES)
def test_every_pass_runs(pass_):
    """The strategies themselves, in one of the article's smaller forms, with options; results stay right."""
    options = {"padding": ((1, 0), (0, 1)), "dilation": 2}
    plan = nc.tune(pass_, (20, 18, 32), (32, 3, 3, 32), **options, dtype=np.float64, seconds=0.01)
    assert plan.strategy in AUTO
    assert plan.reason == MEASURED
    assert nc.plan(pass_, (20, 18, 32), (32, 3, 3, 32), **options, dtype=np.float64) == plan
    batched = nc.plan(pass_, (1, 20, 18, 32), (32, 3, 3, 32), **options, dtype=np.float64)
    assert (batched.strategy, batched.reason, batched.problem) == (plan.strategy, MEASURED, plan.problem)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_half_types():
    assert nc.tune("forward", X, W, dtype="float16", seconds=0.01).reason == MEASURED


# ---------------------------------------------------------------------------------------- measuring


def contest():
    return tuning.Contest(nc.plan("forward", X, W, padding=1))


def test_rounds_alternate_and_a_hopeless_candidate_is_dropped(monkeypatch):
    """After the first round, and the rest of the race is given up where one is left."""
    rig(monkeypatch.setattr, loop=FAST, winograd=SLOW)
    race = contest()
    assert list(race.steps(0.02)) == ["loop", "winograd"] * 2
    assert race.winner == "loop"
    assert race.seconds["winograd"] > tuning.HOPELESS * race.seconds["loop"]

    rig(monkeypatch.setattr, loop=SLOW, winograd=SLOW)
    race = contest()
    assert list(race.steps(0.02)) == ["loop", "winograd"] * (1 + tuning.ROUNDS)
    assert race.step_count == 2 * (1 + tuning.ROUNDS)


def test_nothing_compiled_is_timed(monkeypatch):
    """A strategy that is slow in its first two calls, as a compiled one may be, wins all the same."""
    calls = rig(monkeypatch.setattr, loop=FAST, winograd=SLOW)

    def compiled(*arrays):
        calls["loop"] += 1
        time.sleep(0.2 if calls["loop"] <= 2 else FAST)

    monkeypatch.setattr(REGISTRY["loop"], "program", replaced("loop", compiled))
    assert nc.tune("forward", X, W, padding=1, seconds=0.01).strategy == "loop"


def test_a_race_that_was_stopped_is_not_kept(monkeypatch):
    rig(monkeypatch.setattr, loop=FAST, winograd=SLOW)
    race = contest()
    steps = race.steps(0.01)
    for _ in range(3):
        next(steps)
    race.keep()
    assert race.seconds == {}
    assert race.winner == race.predicted
    assert choices.count() == 0
    assert nc.plan("forward", X, W, padding=1).reason != MEASURED


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pass_": "backward"}, ValueError, "tune: pass_ is 'backward'"),
        ({"seconds": 0}, ValueError, "tune: seconds is 0, expected more than 0"),
        ({"seconds": float("inf")}, ValueError, "tune: seconds is inf"),
        ({"seconds": "1"}, TypeError, "tune: seconds is '1', expected a number"),
        ({"seconds": True}, TypeError, "tune: seconds is True"),
        ({"strategies": "im2col"}, ValueError, 'tune: strategies has "im2col", expected any of depthwise, loop'),
        ({"strategies": ("loop", "lop")}, ValueError, 'tune: there is no strategy "lop"'),
        ({"strategies": "depthwise"}, ValueError, "tune: no allowed strategy can do the forward"),
        ({"dtype": "int8"}, TypeError, "tune: dtype is int8"),
        ({"w_shape": (64, 3, 3, 5)}, ValueError, "tune: w has 5 input channels"),
        ({"stride": 0}, ValueError, "tune: stride is 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    """Refused before anything runs, as by the other functions."""
    given = {"pass_": "forward", "x_shape": X, "w_shape": W, **arguments}
    with pytest.raises(error, match=message):
        nc.tune(given.pop("pass_"), given.pop("x_shape"), given.pop("w_shape"), **given)
