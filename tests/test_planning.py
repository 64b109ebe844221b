"""Plans: which strategy runs, why, and what it needs."""

import dataclasses
import re

import numpy as np
import pytest

import fresh
import nhwconv as nc
from cases import PASSES, typical
from nhwconv import planning
from nhwconv.program import calls
from nhwconv.runtime import machine
from nhwconv.strategies import AUTO, REGISTRY
from nhwconv.strategies.base import Strategy

X, W = (8, 56, 56, 64), (64, 3, 3, 64)


def test_strategies_lists_the_registry_in_order():
    """strategies() is what may be named; the reference comes last."""
    names = nc.strategies()
    assert names == tuple(REGISTRY)
    assert names[-1] == "tensordot"
    assert all(REGISTRY[name].name == name and REGISTRY[name].summary for name in names)


@pytest.mark.parametrize("pass_", PASSES)
def test_auto_chooses_among_those_with_promises(pass_):
    """ "auto" takes only strategies whose bits depend on the problem alone, and the same one each time."""
    assert set(AUTO) <= {"loop", "depthwise", "winograd"}
    for x, w, groups in ((X, W, 1), ((1, 5, 5, 6), (6, 3, 3, 1), 6), ((0, 5, 5, 6), (4, 3, 3, 6), 1)):
        plan = nc.plan(pass_, x, w, groups=groups)
        assert plan.strategy in AUTO
        assert plan == nc.plan(pass_, x, w, groups=groups)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("strategy", REGISTRY)
def test_a_name_is_obeyed(pass_, strategy):
    """A strategy named alone runs, and the plan says that it was asked for."""
    case = typical(strategy, pass_)
    plan = nc.plan(pass_, case.x_shape, case.w_shape, **case.options, strategy=strategy)
    assert plan.strategy == strategy
    assert plan.reason == "it was asked for"
    assert plan.workspace >= 0


def test_a_tuple_is_a_choice():
    """Of several names the one with the least predicted cost is taken, whatever their order; the plan has all costs."""
    for names in (("tensordot", "im2col"), ("im2col", "tensordot")):
        plan = nc.plan("forward", X, W, strategy=names)
        costs = dict(plan.costs)
        assert set(costs) == set(names)
        assert plan.strategy == min(costs, key=costs.get)
        assert plan.reason.startswith("its predicted cost is ")
    assert nc.plan("forward", X, W, strategy=("tensordot",)).strategy == "tensordot"


def test_of_equal_costs_the_first_in_the_registry_is_taken(monkeypatch):
    """Not the first in the tuple."""
    monkeypatch.setattr(planning, "_cost", lambda *a: 1.0)
    monkeypatch.setattr(nc.ops, "_plans", {})
    assert nc.plan("forward", X, W, strategy=("tensordot", "loop")).strategy == "loop"


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("strategy", REGISTRY)
def test_costs_grow_with_the_work(pass_, strategy, monkeypatch):
    """Predicted cycles are positive, do not depend on the number of threads, and eight times the images cost more."""
    case = typical(strategy, pass_)
    options = {**case.options, "strategy": strategy}
    few = dict(nc.plan(pass_, case.x_shape, case.w_shape, **options).costs)[strategy]
    many = dict(nc.plan(pass_, (8 * case.n, *case.x_shape[1:]), case.w_shape, **options).costs)[strategy]
    assert 0 < few < many
    monkeypatch.setattr(nc.ops, "_plans", {})
    monkeypatch.setattr(machine, "threads", lambda: 64)
    assert dict(nc.plan(pass_, case.x_shape, case.w_shape, **options).costs)[strategy] == few


class Picky:
    """A strategy that refuses."""

    name, summary, compiled = "picky", "refuses", False

    def supports(self, problem, pass_):
        return "the moon is full" if pass_ == "forward" else None

    def program(self, problem, pass_, wanted):
        def fill(x, dy, dw, db=None):
            dw[...] = 42

        return calls(fill, problem, pass_, wanted.bias, 1.0, 3 * 2**20)


@pytest.fixture
def picky(monkeypatch):
    """Put Picky first in the registry, for a while."""
    before = dict(REGISTRY)
    REGISTRY.clear()
    REGISTRY.update({"picky": Picky(), **before})
    fresh.forget()
    yield
    REGISTRY.clear()
    REGISTRY.update(before)
    fresh.forget()


def test_a_strategy_that_cannot_is_an_error_when_named_alone(picky):
    """With its reason; in a tuple the next one is taken."""
    text = (
        "plan: no allowed strategy can do the forward of x 8x56x56x64, w 64x3x3x64, float32 (picky: the moon is full)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        nc.plan("forward", X, W, strategy="picky")
    assert nc.plan("forward", X, W, strategy=("picky", "tensordot")).strategy == "tensordot"
    out = np.full((1, 3, 3, 4), 7.0)
    with pytest.raises(ValueError, match=r"conv2d: no allowed strategy .*the moon is full"):
        nc.conv2d(np.ones((1, 5, 5, 3)), np.ones((4, 3, 3, 3)), strategy="picky", out=out)
    assert (out == 7).all()


def test_the_planned_strategy_runs(picky):
    """One new entry of the registry is all that a new strategy takes."""
    assert nc.strategies()[0] == "picky"
    x, dy = np.ones((1, 5, 5, 3)), np.ones((1, 3, 3, 4))
    assert (nc.conv2d_weight_grad(x, dy, strategy="picky") == 42).all()
    # Both plans of backward are made before anything is written: dx is fine, dw as well, forward isn't asked.
    assert "picky" not in AUTO
    assert nc.plan("weight_grad", X, W).strategy in AUTO


def test_print():
    """A plan reads well: the pass, the problem, the strategy, why, the work and the memory."""
    plan = nc.plan(
        "weight_grad", X, W, dtype=np.float64, stride=(2, 1), padding=((1, 0), (2, 1)), dilation=(1, 2),
        strategy="tensordot",
    )  # fmt: skip
    lines = str(plan).splitlines()
    assert lines[0] == (
        "weight_grad of x 8x56x56x64, w 64x3x3x64, stride 2x1, padding ((1, 0), (2, 1)), dilation 1x2, float64"
    )
    oh, ow = 28, 55  # (57 - 3) // 2 + 1, 59 - 5 + 1
    gflop = 2 * 8 * oh * ow * 64 * 64 * 9 / 1e9
    megabytes = (8 * 56 * 56 * 64 + 64 * 9 * 64 + 8 * oh * ow * 64) * 8 / 1e6
    assert lines[1] == "  strategy   tensordot: it was asked for"
    assert lines[2] == f"  work       {gflop:.3g} GFLOP over {megabytes:.3g} MB of x, w and y"
    assert re.fullmatch(r"  workspace  [\d.e+]+ MiB", lines[3])
    assert re.fullmatch(r"  candidate  tensordot: [\d.e+]+ million cycles predicted", lines[4])
    assert len(lines) == 5


def test_print_names_what_was_refused(picky):
    """And why, after the candidates."""
    lines = str(nc.plan("forward", X, W, strategy=("picky", "loop", "tensordot"))).splitlines()
    assert [line.split(":")[0].split() for line in lines[4:]] == [
        ["candidate", "loop"], ["candidate", "tensordot"], ["refused", "picky"]
    ]  # fmt: skip
    assert lines[-1] == "  refused    picky: the moon is full"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "x 8x56x56x64, w 64x3x3x64, float32"),
        ({"padding": 1, "stride": 2}, "x 8x56x56x64, w 64x3x3x64, stride 2, padding 1, float32"),
        ({"padding": "same", "stride": 2}, "x 8x56x56x64, w 64x3x3x64, stride 2, padding ((0, 1), (0, 1)), float32"),
        ({"dtype": "float16"}, "x 8x56x56x64, w 64x3x3x64, float16"),
        ({"groups": 4}, "x 8x56x56x64, w 64x3x3x16, groups 4, float32"),
    ],
)
def test_problems_read_well(options, text):
    """A problem's text names what differs from the default."""
    w = (64, 3, 3, 64 // options.get("groups", 1))
    assert str(nc.plan("forward", X, w, **options).problem) == text


def test_plans_of_the_smaller_forms_and_other_byte_orders():
    """They are the batched problem's, in native byte order; what differs is the form of the arrays."""
    swapped = np.dtype(np.float32).newbyteorder()
    for small, batched in (
        (nc.plan("forward", X[1:], W), nc.plan("forward", (1, *X[1:]), W)),
        (nc.plan("forward", (9, 8), (3, 3)), nc.plan("forward", [1, 9, 8, 1], [1, 3, 3, 1])),
    ):
        assert small.problem == batched.problem
        assert (small.strategy, small.costs) == (batched.strategy, batched.costs)
        assert small != batched
    assert nc.plan("forward", (9, 8), (3, 3)).form == ((9, 8), (3, 3), (7, 6))
    assert nc.plan("forward", X, W, dtype=swapped) == nc.plan("forward", X, W)
    assert nc.plan("forward", X, W, dtype=np.float64) != nc.plan("forward", X, W)


def test_plans_are_frozen_and_remembered(monkeypatch):
    """A plan cannot be changed, and the second call for the same arguments makes none."""
    plan = nc.plan("forward", X, W)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.strategy = "tensordot"
    assert hash(plan) == hash(nc.plan("forward", X, W))

    def make(*arguments):
        raise AssertionError("planned again")

    monkeypatch.setattr(planning, "make_plan", make)
    assert nc.plan("forward", X, W) is plan
    with pytest.raises(AssertionError, match="planned again"):
        nc.plan("forward", X, W, stride=7)


def test_memory_of_plans_is_bounded():
    """The table of plans does not grow for ever."""
    for h in range(3, 5000):
        nc.plan("forward", (1, h, 3, 1), (1, 3, 3, 1), strategy="tensordot")
    assert len(nc.ops._plans) <= 4097


def test_the_problem_computes_in_float32_for_half_types():
    """compute_dtype is the dtype of the arithmetic; flops and bytes are the definition's."""
    problem = nc.plan("forward", X, W, dtype="float16").problem
    assert problem.compute_dtype == np.float32
    assert nc.plan("forward", X, W, dtype="float64").problem.compute_dtype == np.float64
    assert problem.flops == 2 * 8 * 54 * 54 * 64 * 64 * 9
    assert problem.bytes == 2 * (8 * 56 * 56 * 64 + 64 * 9 * 64 + 8 * 54 * 54 * 64)


def test_strategies_satisfy_the_protocol():
    """Every entry has what the protocol asks for."""
    members = {n for n in (*Strategy.__annotations__, *vars(Strategy)) if not n.startswith("_")}
    assert {"name", "summary", "compiled", "supports", "program"} <= members
    assert all(hasattr(strategy, name) for strategy in REGISTRY.values() for name in members)
