"""Plans: which strategy runs, why, and what it needs."""

import dataclasses
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import fresh
import nhwconv as nc
from cases import PASSES, Case, Data, data_of, draw_data, run, typical
from nhwconv import planning
from nhwconv.problem import ConvProblem
from nhwconv.program import calls
from nhwconv.runtime import executor, machine
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
    assert nc.plan("forward", (9, 8), (3, 3)).form[:3] == ((9, 8), (3, 3), (7, 6))
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


# -------------------------------------------------------------------------------------------- called plans

OPTIONS = {"stride": (2, 1), "padding": ((1, 0), (1, 1)), "groups": 2}
CALLED = Case(n=3, h=9, w=8, c=6, d=10, **OPTIONS)


def made(pass_, case=CALLED, dtype=np.float32, **options):
    return nc.plan(pass_, case.x_shape, case.w_shape, dtype=dtype, **case.options, **options)


def operands(pass_, data):
    return {"forward": (data.x, data.w), "weight_grad": (data.x, data.dy), "input_grad": (data.dy, data.w)}[pass_]


@pytest.mark.parametrize("strategy", ["auto", *REGISTRY])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("pass_", PASSES)
def test_a_called_plan_gives_the_bits_of_the_function(pass_, dtype, strategy):
    """A new result each time, and `out` where it is given, which may hold anything."""
    case = CALLED if strategy == "auto" else typical(strategy, pass_, dtype=dtype)
    data, plan = draw_data(case, dtype), made(pass_, case, dtype, strategy=strategy)
    expected = run(case, data, pass_, strategy)
    first, second = plan(*operands(pass_, data)), plan(*operands(pass_, data))
    assert first is not second
    assert first.dtype == expected.dtype
    assert first.tobytes() == second.tobytes() == expected.tobytes()
    out = np.full(expected.shape, np.nan, dtype)
    assert plan(*operands(pass_, data), out=out) is out
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, "float64", np.dtype("float16").newbyteorder(), ml_dtypes.bfloat16])
@pytest.mark.parametrize("pass_", PASSES)
def test_a_called_plan_asks_nothing_further_of_arrays_that_fit(pass_, dtype, monkeypatch):
    """However its dtype was named: they are looked at once, and that is quick."""
    data, plan = data_of(CALLED, nc.checks.as_dtype(dtype)), made(pass_, dtype=dtype)
    monkeypatch.setattr(planning.Plan, "check", None)
    plan(*operands(pass_, data))
    with pytest.raises(TypeError, match="not callable"):
        plan(*(a.astype("float16" if a.itemsize > 2 else "float32") for a in operands(pass_, data)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_called_plan_adds_a_bias(dtype):
    """By place or by name."""
    data, plan = data_of(CALLED, dtype), made("forward", dtype=dtype)
    expected = nc.conv2d(data.x, data.w, data.b, **CALLED.options).tobytes()
    assert plan(data.x, data.w, data.b).tobytes() == expected
    assert plan(data.x, data.w, b=data.b[::-1][::-1]).tobytes() == expected
    assert plan(data.x, data.w).tobytes() == nc.conv2d(data.x, data.w, **CALLED.options).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_called_plan_accumulates(dtype):
    """A weight gradient is added to `out`, once."""
    data, plan = data_of(CALLED, dtype), made("weight_grad", dtype=dtype)
    out, expected = (np.ones(CALLED.w_shape, dtype) for _ in range(2))
    run(CALLED, data, "weight_grad", "auto", out=expected, accumulate=True)
    assert plan(data.x, data.dy, out=out, accumulate=True) is out
    assert out.tobytes() == expected.tobytes()
    assert out.tobytes() != plan(data.x, data.dy).tobytes()


SMALLER = [((9, 8, 3), (4, 3, 2, 3)), ((9, 8, 3), (3, 2, 3)), ((9, 8), (3, 2))]


@pytest.mark.parametrize(("x", "w"), SMALLER)
@pytest.mark.parametrize("pass_", PASSES)
def test_called_plans_of_the_smaller_forms(pass_, x, w):
    """Operands and results have the form that the shapes say."""
    rng = np.random.default_rng(0)
    plan = nc.plan(pass_, x, w)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in zip("xwy", plan.form[:3], strict=True)}
    data = Data(arrays["x"], arrays["w"], None, arrays["y"])
    function = {
        "forward": nc.conv2d,
        "weight_grad": lambda x, dy: nc.conv2d_weight_grad(x, dy, (3, 2)),
        "input_grad": lambda dy, w: nc.conv2d_input_grad(dy, w, (9, 8)),
    }[pass_]
    expected = function(*operands(pass_, data))
    got = plan(*operands(pass_, data))
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("pass_", PASSES)
def test_a_called_plan_takes_what_is_array_like(pass_):
    """Other strides, byte orders and lists are copied; inputs stay as they are."""
    data, plan = data_of(CALLED, np.float64), made(pass_, dtype=np.float64)
    first, second = operands(pass_, data)
    expected = plan(first, second).tobytes()
    assert plan(np.asfortranarray(first), second[::-1][::-1]).tobytes() == expected
    assert plan(first.astype(">f8"), np.repeat(second, 2, 0)[::2]).tobytes() == expected
    assert plan(first.tolist(), second.tolist()).tobytes() == expected
    unaligned = np.frombuffer(b"\0" + first.tobytes(), np.uint8)[1:].view(np.float64).reshape(first.shape)
    assert not unaligned.flags.aligned
    assert plan(unaligned, second).tobytes() == expected


@pytest.mark.parametrize("pass_", PASSES)
def test_a_called_plan_of_no_images(pass_):
    """Results are empty, or zero; what is added to stays."""
    case = replace(CALLED, n=0)
    data, plan = data_of(case, np.float32), made(pass_, case)
    got = plan(*operands(pass_, data))
    assert got.shape == case.shape(pass_)
    assert not got.any()
    assert plan.workspace == 0
    if pass_ == "weight_grad":
        out = np.ones(case.w_shape, np.float32)
        assert (plan(*operands(pass_, data), out=out, accumulate=True) == 1).all()


def refused(*arguments, pass_="forward", **options):
    return lambda plans, d: plans[pass_](*(a(d) for a in arguments), **{k: v(d) for k, v in options.items()})


X_, W_, DY_, B_ = (lambda d: d.x), (lambda d: d.w), (lambda d: d.dy), (lambda d: d.b)
REFUSED = [
    (refused(lambda d: d.x[:2], W_), ValueError, "plan: x has shape (2, 9, 8, 6), expected (3, 9, 8, 6)"),
    (refused(X_, lambda d: d.w[0]), ValueError, "plan: w has shape (3, 3, 3), expected (10, 3, 3, 3)"),
    (refused(X_, W_, lambda d: d.b[1:]), ValueError, "plan: b has shape (9,), expected (10,)"),
    (refused(lambda d: d.x.astype(np.float64), W_), TypeError, "plan: x has dtype float64, expected float32"),
    (refused(X_, lambda d: d.w.astype(np.float16)), TypeError, "plan: w has dtype float16, expected float32"),
    (refused(X_, W_, lambda d: d.b.astype(np.float64)), TypeError, "plan: b has dtype float64, expected float32"),
    (refused(lambda d: np.ma.array(d.x), W_), TypeError,
     "plan: x is a masked array, whose mask would be lost; pass x.filled(value) or x.data"),
    (refused(lambda d: d.x.astype(int), W_), TypeError,
     "plan: x has dtype int64, expected float32, float64, float16 or bfloat16; cast it first, for example "
     "np.asarray(x, np.float32)"),
    (refused(X_, W_, out=lambda d: np.zeros((1, 2), np.float32)), ValueError,
     "plan: out has shape (1, 2), expected (3, 4, 8, 10)"),
    (refused(X_, W_, out=lambda d: np.zeros((3, 4, 8, 10))), TypeError,
     "plan: out has dtype float64, expected float32"),
    (refused(X_, W_, out=lambda d: [1]), TypeError, "plan: out is a list, expected a numpy.ndarray"),
    (refused(X_, W_, accumulate=lambda d: True), ValueError, "plan: accumulate=True needs out to add to"),
    (refused(X_, W_, accumulate=lambda d: 1, out=lambda d: d.dy.copy()), TypeError,
     "plan: accumulate is 1, expected True or False"),
    (refused(X_, W_, accumulate=lambda d: True, out=lambda d: d.dy.copy()), ValueError,
     "plan: accumulate is True, but only a weight_grad is added to what is there, not a forward"),
    (refused(X_, DY_, B_, pass_="weight_grad"), ValueError, "plan: b is given, but a weight_grad has no bias"),
    (refused(DY_, W_, B_, pass_="input_grad"), ValueError, "plan: b is given, but an input_grad has no bias"),
    (refused(W_, X_, pass_="weight_grad"), ValueError, "plan: x has shape (10, 3, 3, 3), expected (3, 9, 8, 6)"),
    (refused(X_, X_, pass_="weight_grad"), ValueError, "plan: dy has shape (3, 9, 8, 6), expected (3, 4, 8, 10)"),
    (refused(X_, W_, pass_="input_grad"), ValueError, "plan: dy has shape (3, 9, 8, 6), expected (3, 4, 8, 10)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_a_called_plan_refuses_in_words(call, error, message):
    """What does not fit the plan, before anything is computed."""
    plans = {pass_: made(pass_) for pass_ in PASSES}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(plans, draw_data(CALLED, np.float32))


def test_a_called_plan_refuses_what_overlaps_or_cannot_be_written():
    """`out` is checked as by the functions, and holds what it held."""
    data, plan = draw_data(CALLED, np.float32), made("forward")
    memory = np.zeros(10_000, np.float32)
    x = memory[: data.x.size].reshape(data.x.shape)
    out = memory[100 : 100 + data.dy.size].reshape(data.dy.shape)
    with pytest.raises(ValueError, match=r"^plan: out shares memory with x$"):
        plan(x, data.w, out=out)
    read_only = np.zeros(CALLED.y_shape, np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match=r"^plan: out is read-only$"):
        plan(data.x, data.w, out=read_only)
    with pytest.raises(ValueError, match="C-contiguous"):
        plan(data.x, data.w, out=np.zeros((*CALLED.y_shape[:3], 20), np.float32)[..., ::2])
    assert not memory.any()


@pytest.mark.parametrize("strategy", ["auto", "im2col"])
@pytest.mark.parametrize("pass_", PASSES)
def test_a_plan_pickles(pass_, strategy):
    """Used or not; it plans anew where it is unpickled, and gives the same bits."""
    data, plan = data_of(CALLED, np.float32), made(pass_, strategy=strategy)
    expected = plan(*operands(pass_, data)).tobytes()
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert hash(again) == hash(plan)
    assert str(again) == str(plan)
    assert again(*operands(pass_, data)).tobytes() == expected
    assert len(pickle.dumps(plan)) < 3000  # programs are a process's own


def test_many_threads_call_one_plan():
    """At once, the first calls too: every result has the bits of a lone call."""
    case = Case(n=2, h=30, w=30, c=24, d=32)
    data = data_of(case, np.float32)
    expected = made("forward", case)(data.x, data.w).tobytes()
    for _ in range(3):
        fresh.forget()
        plan, together = made("forward", case), threading.Barrier(8)

        def calls(_, plan=plan, together=together):
            together.wait(60)
            return {plan(data.x, data.w).tobytes() for _ in range(20)}

        with ThreadPoolExecutor(8) as pool:
            assert set().union(*pool.map(calls, range(8))) == {expected}


def test_a_plan_follows_the_number_of_threads(monkeypatch):
    """A plan that was made for some threads uses as many as there are when it is called."""
    case = Case(n=2, h=30, w=30, c=24, d=32)
    data, plan, seen = data_of(case, np.float32), made("forward", case), []
    machine.threads()  # which starts them: what stands in for it does not
    execute = executor.run
    monkeypatch.setattr(executor, "run", lambda program, *a: seen.append(program.workers) or execute(program, *a))
    for count in (1, 2, 5, 1):
        monkeypatch.setattr(machine, "threads", lambda count=count: count)
        plan(data.x, data.w)
    assert seen == [1, 2, 5, 1]


def test_small_work_is_one_threads(monkeypatch):
    """A launch would cost more than it saves: all passes of a program count together."""
    monkeypatch.setattr(machine, "threads", lambda: 7)
    problem = ConvProblem(1, 8, 8, 4, 8, 3, 3)
    passes = [planning.make_plan(problem, pass_, "loop") for pass_ in ("weight_grad", "input_grad")]
    both = sum(plan.cost for plan in passes)
    for limit, alone, together in ((2 * both, 1, 1), (both, 1, 7), (0, 7, 7)):
        monkeypatch.setattr(machine, "SERIAL_CYCLES", limit)
        copies = [replace(plan) for plan in passes]
        assert {plan.program().workers for plan in copies} == {alone}
        assert planning.Backward(*copies, ("dx", "dw", "db")).program(False).workers == together
