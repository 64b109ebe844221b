"""Every strategy of the registry computes every pass of every convolution, as the oracle has it."""

import math
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fresh
import nhwconv as nc
from cases import (
    DTYPES,
    PASSES,
    Case,
    Data,
    cases,
    data_of,
    draw_data,
    exact,
    exact_of,
    refusal,
    run,
    supporting,
    typical,
)
from grid import GRID, PAD1, is_tried
from nhwconv.runtime import arrays
from nhwconv.strategies import AUTO, REGISTRY
from tolerance import DIRECT, assert_close

supported = pytest.mark.parametrize("strategy", REGISTRY)


def check(case, dtype, data, expected, pass_, strategy, **options):
    """Run a pass and compare it with the oracle; a strategy that refuses the problem must say so."""
    why = refusal(case, pass_, strategy, dtype)
    if why is not None:
        with pytest.raises(ValueError, match=re.escape(why)):
            run(case, data, pass_, strategy, **options)
        return None
    got = run(case, data, pass_, strategy, **options)
    assert got.dtype == dtype
    assert_close(got, *expected, case.length(pass_), strategy, case)
    return got


@supported
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case, dtype, pass_, strategy):
    """Each strategy and pass equals the oracle on the sizes at which kernels go wrong."""
    check(case, dtype, data_of(case, dtype), exact_of(case, dtype, pass_), pass_, strategy)


@supported
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in GRID if c.d > 12 or c.groups > 1 or c.n == 0], ids=str)
def test_bias_is_added(case, dtype, strategy):
    """A bias is added once to every output, whatever tile, panel or group computes it."""
    if refusal(case, "forward", strategy, dtype):
        return
    data = data_of(case, dtype)
    value, absolute = exact_of(case, dtype, "forward")
    got = nc.conv2d(data.x, data.w, data.b, **case.options, strategy=strategy)
    b = data.b.astype(np.float64)
    assert_close(got, value + b, absolute + np.abs(b), case.length("forward") + 1, strategy, case)


@supported
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRID[::3], ids=str)
def test_weight_gradients_accumulate(case, dtype, strategy):
    """With accumulate=True the gradient is added to what `out` held, once."""
    if refusal(case, "weight_grad", strategy, dtype):
        return
    value, absolute = exact_of(case, dtype, "weight_grad")
    before = np.random.default_rng(1).standard_normal(case.w_shape).astype(dtype)
    out = before.copy()
    run(case, data_of(case, dtype), "weight_grad", strategy, out=out, accumulate=True)
    value, absolute = value + before, absolute + np.abs(before.astype(np.float64))
    assert_close(out, value, absolute, case.length("weight_grad") + 1, strategy, case)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases(), seed=st.integers(0, 99))
def test_any_convolution(dtype, pass_, case, seed):
    """Each strategy equals the oracle on whatever Hypothesis finds, and overwrites an `out` full of NaN."""
    data = draw_data(case, dtype, seed)
    expected = exact(case, data, pass_)
    for strategy in REGISTRY:
        if refusal(case, pass_, strategy, dtype) is None and not is_tried(case, pass_, strategy, dtype):
            continue
        out = np.full(case.shape(pass_), np.nan, dtype)
        got = check(case, dtype, data, expected, pass_, strategy, out=out)
        assert got is None or got is out


INTEGERS = (
    Case(n=2, h=9, w=11, c=64, d=64, padding=PAD1),
    Case(n=2, h=9, w=11, c=16, d=16, groups=16, padding=PAD1),
    Case(n=4, h=30, w=31, c=3, d=5, kh=5, kw=5, stride=(2, 1)),
)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("case", INTEGERS, ids=str)
def test_floats_that_hold_integers_are_summed_exactly(case, pass_):
    """Up to 2^24, as far as float32 has all integers, by what the documents name for it."""
    most = math.isqrt(2**24 // case.length(pass_))
    rng = np.random.default_rng(0)
    shapes = [array.shape for array in data_of(case, np.float32)]
    for least in (0, -most, most):  # the last ones give sums of almost 2^24
        data = Data(*(rng.integers(least, most, shape, endpoint=True).astype(np.float32) for shape in shapes))
        got = run(case, data, pass_, ("depthwise", "loop"))
        np.testing.assert_array_equal(got, exact(case, data, pass_)[0])
    assert 2**23 < got.max() <= 2**24


@pytest.mark.parametrize("strategy", [name for name in REGISTRY if name in DIRECT])
@pytest.mark.parametrize("pass_", PASSES)
def test_nan_and_inf_flow_through(pass_, strategy):
    """NaN and Inf are data: they reach exactly the results whose sums they are part of, and no warning is given."""
    case = Case(n=1, h=6, w=20, c=5, d=18, padding=PAD1)
    if strategy == "depthwise":
        case = Case(n=1, h=6, w=20, c=18, d=18, groups=18, padding=PAD1)
    data = draw_data(case, np.float32)
    name = "x" if pass_ != "input_grad" else "dy"
    array = getattr(data, name)
    array[0, 2, 3, 1] = np.nan
    array[0, 4, 15, 4], array[0, 4, 15, 3] = np.inf, -np.inf
    clean = data._replace(**{name: np.where(np.isfinite(array), array, 0)})
    # Where a marker of 1 in place of a NaN or Inf, and 0 elsewhere, gives something else than 0, that value is read.
    ones = data._replace(**{n: np.ones_like(a) for n, a in data._asdict().items()})
    reached = exact(case, ones._replace(**{name: (~np.isfinite(array)).astype(np.float32)}), pass_)[0] != 0
    got = run(case, data, pass_, strategy)
    assert not np.isfinite(got[reached]).any()
    value, absolute = exact(case, clean, pass_)
    assert np.isnan(got).any()
    assert_close(got[~reached], value[~reached], absolute[~reached], case.length(pass_), strategy)


@pytest.mark.parametrize("strategy", AUTO)
@pytest.mark.parametrize("pass_", PASSES)
def test_same_call_gives_same_bits(pass_, strategy):
    """A call repeated gives the same bits: nothing depends on which thread comes first, or on old scratch."""
    case = replace(typical(strategy, pass_), n=6, h=15, w=17)
    assert refusal(case, pass_, strategy) is None
    data = data_of(case, np.float32)
    first = run(case, data, pass_, strategy).tobytes()
    assert all(run(case, data, pass_, strategy).tobytes() == first for _ in range(20))


STREAMED = [
    Case(n=1, h=9, w=17, c=3, d=32),
    Case(n=2, h=5, w=20, c=16, d=64, kh=1, kw=1),
    Case(n=1, h=8, w=9, c=32, d=48, stride=(2, 2), padding=PAD1),
    Case(n=1, h=6, w=11, c=8, d=64, groups=2, padding=PAD1),
    Case(n=1, h=9, w=13, c=32, d=32, groups=32, padding=PAD1),
    Case(n=1, h=9, w=13, c=16, d=48, groups=16, stride=(2, 1)),
    Case(n=1, h=7, w=9, c=64, d=33),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_stores_past_the_caches_write_the_same(case, dtype):
    """What large results get, non-temporal stores, on small ones: the same bits wherever `out` lies in a cache line."""
    data = data_of(case, dtype)
    passes = "forward", "input_grad"
    jobs = [(pass_, name) for pass_ in passes for name in supporting(case, pass_, dtype=dtype) if name in AUTO]
    expected = {job: run(case, data, *job).tobytes() for job in jobs}
    for (pass_, name), offset in product(jobs, (0, 1, 2, 4, 8)):
        size = int(np.prod(case.shape(pass_)))
        memory = arrays.empty((size + 4096,), np.dtype(dtype))
        memory.fill(7)
        start = -(memory.ctypes.data // memory.itemsize) % 64 + 64 + offset
        out = memory[start : start + size].reshape(case.shape(pass_))
        with fresh.past_the_caches():
            run(case, data, pass_, name, out=out)
        assert out.tobytes() == expected[pass_, name], (pass_, name, offset)
        assert (memory[:start] == 7).all()
        assert (memory[start + size :] == 7).all()


def test_workspace_is_bounded():
    """The memory that each strategy reports stays under max(64 MiB, 10% of the arrays), packed weights aside."""
    for case in (
        Case(n=64, h=224, w=224, c=64, d=64, padding=PAD1),
        Case(n=64, h=56, w=56, c=256, d=64, kh=1, kw=1),
        Case(n=64, h=112, w=112, c=96, d=96, groups=96, padding=PAD1),
        Case(n=2, h=7, w=7, c=512, d=512, padding=PAD1),
        Case(n=64, h=224, w=224, c=3, d=64, kh=7, kw=7, stride=(2, 2), padding=((3, 3), (3, 3))),
    ):
        for name in REGISTRY:
            if name == "tensordot":  # exempt
                continue
            for pass_ in PASSES:
                if refusal(case, pass_, name) is not None:
                    continue
                plan = nc.plan(pass_, case.x_shape, case.w_shape, **case.options, strategy=name)
                weights = 4 * np.prod(case.w_shape)
                assert plan.workspace <= max(64 * 2**20, plan.problem.bytes // 10) + 2 * weights, (name, pass_, case)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("strategy", ["loop", "winograd"])
@pytest.mark.parametrize(
    "case",
    [
        Case(n=1, h=28, w=28, c=128, d=128, padding=PAD1),
        Case(n=8, h=14, w=14, c=64, d=64, padding=PAD1),
        Case(n=8, h=28, w=28, c=64, d=64, kh=5, kw=5, stride=(2, 2), padding=((2, 2), (2, 2))),
    ],
    ids=str,
)
def test_layers_of_few_tiles_have_tasks_for_several_threads(case, strategy, pass_):
    """One image, or small ones: no step but the packing is a single task."""
    plan = nc.plan(pass_, case.x_shape, case.w_shape, **case.options, strategy=strategy)
    tasks = [step.tasks for step in plan.program().steps if "packed weights" not in written(step)]
    assert tasks
    assert min(tasks) >= 4


def written(step):
    """Return the name of what a step writes: the last operand of those that pack."""
    source = step.places[-1].source if len(step.places) == 2 else ""
    return getattr(source, "name", source)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_channels_change_no_bit(dtype):
    """Winograd's weight gradient cuts channels finer for more threads; slices, whose sums are added, stay the same."""
    case = Case(n=3, h=26, w=22, c=150, d=130, padding=PAD1)
    results, tasks = [], []
    for workers in (1, 40):
        with fresh.workers(workers):
            plan = nc.plan("weight_grad", case.x_shape, case.w_shape, **case.options, dtype=dtype, strategy="winograd")
            tasks.append(plan.program().steps[0].tasks)
            results.append(run(case, data_of(case, dtype), "weight_grad", "winograd").tobytes())
    assert tasks[0] < tasks[1]
    assert results[0] == results[1]
