"""The public functions: what they compute together, what they accept, and what they leave alone."""

import doctest
import importlib
import inspect
import pickle
import pkgutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nhwconv as nc
import oracle
from cases import DTYPES, PASSES, TYPICAL, Case, cases, data_of, draw_data, exact, run, supporting, typical
from nhwconv import checks, ops
from nhwconv.strategies import REGISTRY
from tolerance import assert_close, error_norm, gamma

PAD1 = ((1, 1), (1, 1))
CASE = TYPICAL[0]
DENSE = Case(n=2, h=7, w=9, c=5, d=8)

each_strategy = pytest.mark.parametrize("strategy", REGISTRY)
each_pass = pytest.mark.parametrize("pass_", PASSES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


# ------------------------------------------------------------------------------------- what belongs together


@each_dtype
@settings(max_examples=settings.default.max_examples // 2)
@given(case=cases(), seed=st.integers(0, 99))
def test_adjoint_identity(dtype, case, seed):
    """<conv(x, w), dy> = <x, input_grad(dy, w)> = <w, weight_grad(x, dy)>, for every strategy."""
    data = draw_data(case, dtype, seed)
    _, absolute = exact(case, data, "forward")
    for strategy in supporting(case, *PASSES, dtype=dtype):
        y, dw, dx = (run(case, data, pass_, strategy).astype(np.float64) for pass_ in PASSES)
        x, w, _, dy = (a.astype(np.float64) for a in data)
        products = np.sum(y * dy), np.sum(x * dx), np.sum(w * dw)
        # Each product errs by its pass's error times the other factor, and by that of the sum itself.
        allowed = [
            error_norm(strategy, exact(case, data, pass_)[1], case.length(pass_), np.dtype(dtype))
            * np.linalg.norm(other)
            + gamma(other.size, np.dtype(float)) * np.sum(absolute * np.abs(dy))
            for pass_, other in zip(PASSES, (dy, w, x), strict=True)
        ]
        assert max(products) - min(products) <= 2 * max(allowed), strategy


@each_strategy
def test_finite_differences(strategy):
    """In float64 the gradients are what a small step in one direction changes the loss by."""
    case = typical(strategy, *PASSES, dtype=np.float64)
    data = draw_data(case, np.float64)
    rng, float64 = np.random.default_rng(1), np.dtype(np.float64)
    g = nc.conv2d_backward(data.x, data.w, data.dy, **case.options, strategy=strategy)

    def loss(x, w, b):
        return float(np.sum(nc.conv2d(x, w, b, **case.options, strategy=strategy) * data.dy))

    for name, pass_, gradient in (("x", "input_grad", g.dx), ("w", "weight_grad", g.dw), ("b", "weight_grad", g.db)):
        arguments = {"x": data.x, "w": data.w, "b": data.b}
        direction = rng.standard_normal(gradient.shape)
        # The loss is linear in each argument, so the difference is exact but for rounding, whatever the step.
        steps = [loss(**{**arguments, name: arguments[name] + s * direction}) for s in (1, -1)]
        largest = {n: np.abs(a) + (np.abs(direction) if n == name else 0) for n, a in arguments.items()}
        absolute = oracle.forward(**largest, **case.options)
        of_gradient = np.abs(data.dy).sum((0, 1, 2)) if name == "b" else exact(case, data, pass_)[1]
        allowed = (
            error_norm(strategy, absolute, case.length("forward") + 3, float64) * np.linalg.norm(data.dy)
            + error_norm(strategy, of_gradient, case.length(pass_), float64) * np.linalg.norm(direction)
            + 2 * gamma(data.dy.size + direction.size, float64) * np.sum(absolute * np.abs(data.dy))
        )
        assert abs((steps[0] - steps[1]) / 2 - np.sum(gradient * direction)) <= allowed, name
        assert allowed < 1e-3 * np.linalg.norm(gradient) * np.linalg.norm(direction)  # the bound says something


def check_bias_grad(db, dy, before=0.0):
    """Compare a bias gradient, which was added to `before`, with dy's exact sums."""
    wide = dy.astype(np.float64).reshape(-1, dy.shape[-1] if db.ndim else dy.size)
    wide = wide if db.ndim else wide.T
    value, absolute = wide.sum(0) + before, np.abs(wide).sum(0) + abs(before)
    assert_close(db.reshape(-1), value, absolute, wide.shape[0] + 1, "tensordot")


@each_strategy
@each_dtype
def test_backward_is_the_three_gradients(strategy, dtype):
    """conv2d_backward returns the bits of the single functions; db may be summed on the way, in another order."""
    case = typical(strategy, *PASSES, dtype=dtype)
    data = data_of(case, dtype)
    g = nc.conv2d_backward(data.x, data.w, data.dy, **case.options, strategy=strategy)
    assert isinstance(g, nc.Gradients)
    assert g._fields == ("dx", "dw", "db")
    np.testing.assert_array_equal(g.dx, run(case, data, "input_grad", strategy))
    np.testing.assert_array_equal(g.dw, run(case, data, "weight_grad", strategy))
    check_bias_grad(g.db, data.dy)


@pytest.mark.parametrize("needs", [(), ("dx",), ("dw", "db"), ["db"], "dx", {"dw"}, ("db", "dx", "dw"), iter(["dw"])])
def test_backward_computes_what_is_needed(needs):
    """What is not in `needs` is None; the rest does not depend on it."""
    data = data_of(CASE, np.float32)
    names = {needs} if isinstance(needs, str) else set(needs := list(needs))
    full = nc.conv2d_backward(data.x, data.w, data.dy, **CASE.options)
    g = nc.conv2d_backward(data.x, data.w, data.dy, **CASE.options, needs=needs)
    for name in nc.Gradients._fields:
        if name in names and name == "db":
            check_bias_grad(g.db, data.dy)
        elif name in names:
            np.testing.assert_array_equal(getattr(g, name), getattr(full, name))
        else:
            assert getattr(g, name) is None


def test_backward_writes_into_out_and_accumulates_dw_and_db_alone():
    """`out` is filled whatever it held; with accumulate dw and db are added to, dx is overwritten."""
    data = data_of(CASE, np.float32)
    full = nc.conv2d_backward(data.x, data.w, data.dy, **CASE.options)
    out = nc.Gradients(*(np.full_like(g, np.nan) for g in full))
    got = nc.conv2d_backward(data.x, data.w, data.dy, **CASE.options, out=out)
    for g, o, f in zip(got, out, full, strict=True):
        assert g is o
        np.testing.assert_array_equal(g, f)
    out = nc.Gradients(np.full_like(full.dx, np.nan), np.ones_like(full.dw), np.ones_like(full.db))
    nc.conv2d_backward(data.x, data.w, data.dy, **CASE.options, out=out, accumulate=True)
    np.testing.assert_array_equal(out.dx, full.dx)
    value, absolute = exact(CASE, data, "weight_grad")
    assert_close(out.dw, value + 1, absolute + 1, CASE.length("weight_grad") + 1, "loop")
    check_bias_grad(out.db, data.dy, before=1)


@each_strategy
def test_backward_takes_nan_and_inf_as_data(strategy):
    """They reach their own channel of db, without a warning."""
    case = typical(strategy, *PASSES)
    data = draw_data(case, np.float32)
    data.dy[0, 2, 2, 0], data.dy[0, 3, 3, 1] = np.nan, np.inf
    data.dy[0, 2, 4, 2], data.dy[1, 3, 2, 2] = np.inf, -np.inf
    db = nc.conv2d_backward(data.x, data.w, data.dy, **case.options, strategy=strategy).db
    np.testing.assert_array_equal(np.isnan(db), [i in (0, 2) for i in range(case.d)])
    np.testing.assert_array_equal(np.isinf(db), [i == 1 for i in range(case.d)])
    check_bias_grad(db[3:], data.dy[..., 3:])


def test_backward_takes_a_partial_out():
    """None in `out` allocates; a plain tuple of three is a Gradients."""
    data = data_of(CASE, np.float32)
    full = nc.conv2d_backward(data.x, data.w, data.dy, **CASE.options)
    dw = np.full_like(full.dw, np.nan)
    for out in (nc.Gradients(dw=dw), (None, dw, None)):
        got = nc.conv2d_backward(data.x, data.w, data.dy, **CASE.options, out=out)
        assert got.dw is dw
        for g, f in zip(got, full, strict=True):
            np.testing.assert_array_equal(g, f)


# --------------------------------------------------------------------------------------- out and accumulate


@each_pass
@each_dtype
@pytest.mark.parametrize("case", [*TYPICAL, DENSE, Case(h=9, w=9, stride=(4, 5), kh=2, kw=2, padding=PAD1)], ids=str)
def test_out_is_overwritten_whatever_it_held(case, dtype, pass_):
    """`out` full of NaN gives the same bits as no `out`: it is never read, and nothing of it remains."""
    data = data_of(case, dtype)
    for strategy in supporting(case, pass_, dtype=dtype):
        out = np.full(case.shape(pass_), np.nan, dtype)
        assert run(case, data, pass_, strategy, out=out) is out
        np.testing.assert_array_equal(out, run(case, data, pass_, strategy), strategy)


@each_dtype
def test_bias_gradient(dtype):
    """The bias gradient is dy's sum; `out` is overwritten, or added to."""
    dy = data_of(CASE, dtype).dy
    value, absolute = dy.astype(np.float64).sum((0, 1, 2)), np.abs(dy).astype(np.float64).sum((0, 1, 2))
    length = CASE.length("weight_grad")
    out = np.full(CASE.d, np.nan, dtype)
    assert nc.conv2d_bias_grad(dy, out=out) is out
    assert_close(out, value, absolute, length, "tensordot")
    nc.conv2d_bias_grad(dy, out=out, accumulate=True)
    assert_close(out, 2 * value, 2 * absolute, length + 1, "tensordot")


@pytest.mark.parametrize("d", [1, 3, 64])
def test_bias_gradient_is_summed_well(d):
    """A long float32 sum errs by less than 5e-6, where one running sum would err by 1e-2."""
    dy = np.full((4, 256, 256, d), 0.1, np.float32)
    running = np.cumsum(dy[..., 0].ravel())[-1]
    exact_sum = np.float64(np.float32(0.1)) * (dy.size // d)
    assert abs(running / exact_sum - 1) > 1e-3
    np.testing.assert_allclose(nc.conv2d_bias_grad(dy), np.full(d, exact_sum), rtol=5e-6)


def test_bias_gradient_takes_nan_and_inf_as_data():
    """They reach their own channel, without a warning."""
    dy = np.ones((1, 30, 30, 4), np.float32)
    dy[0, 3, 3, 0], dy[0, 5, 5, 1] = np.nan, np.inf
    dy[0, 4, 4, 2], dy[0, 25, 25, 2] = np.inf, -np.inf
    np.testing.assert_array_equal(nc.conv2d_bias_grad(dy), np.array([np.nan, np.inf, np.nan, 900], np.float32))


def test_accumulate_accepts_a_numpy_bool():
    """np.True_ is a bool, too."""
    dy, out = np.ones((1, 2, 2, 1)), np.ones(1)
    np.testing.assert_array_equal(nc.conv2d_bias_grad(dy, out=out, accumulate=np.True_), [5.0])


def test_python_float_bias_takes_the_arrays_dtype():
    """A Python number as 0-d bias promotes nothing, as in NumPy."""
    x, w = np.ones((4, 4), np.float32), np.ones((3, 3), np.float32)
    y = nc.conv2d(x, w, 0.5)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, np.full((2, 2), 9.5))
    np.testing.assert_array_equal(nc.conv2d(x, w, np.array(0.5, np.float32)), y)
    assert nc.conv2d(x, w, np.array(0.5)).dtype == np.float64


# ---------------------------------------------------------------------------------------- arrays of all kinds


def unaligned(a):
    raw = np.zeros(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype) if a.ndim == 0 else np.ndarray(a.shape, a.dtype, raw, 1)
    view[...] = a
    return view


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def every_second(a):
    wide = np.full((*a.shape[:-1], 2 * a.shape[-1]), np.nan, a.dtype)
    wide[..., ::2] = a
    return wide[..., ::2]


LAYOUTS = {
    "negative strides": lambda a: np.flip(np.flip(a).copy()),
    "negative rows": lambda a: a[::-1].copy()[::-1],
    "a slice": every_second,
    "Fortran order": np.asfortranarray,
    "a transpose": lambda a: a.transpose(*range(1, a.ndim), 0).copy().transpose(a.ndim - 1, *range(a.ndim - 1)),
    "NCHW": lambda a: np.moveaxis(np.moveaxis(a, -1, 0).copy(), 0, -1),
    "read-only": read_only,
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": unaligned,
    "an offset": lambda a: np.concatenate([a.ravel()[:1], a.ravel()])[1:].reshape(a.shape),
    "a subclass": lambda a: a.view(type("Sub", (np.ndarray,), {})),
    "nested lists": lambda a: a.tolist(),
}


@each_strategy
@each_pass
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout, pass_, strategy):
    """Views, orders, byte orders, alignments and lists: the result is that of a plain array, inputs are unchanged."""
    dtype = np.float64 if layout == "nested lists" else np.float32
    case = typical(strategy, pass_, dtype=dtype)
    data = data_of(case, dtype)
    changed = type(data)(*(LAYOUTS[layout](a) for a in data))
    result = run(case, changed, pass_, strategy)
    assert type(result) is np.ndarray
    assert result.dtype == np.dtype(dtype)
    assert result.dtype.isnative
    assert result.flags.c_contiguous
    assert result.flags.writeable
    np.testing.assert_array_equal(result, run(case, data, pass_, strategy))
    for array, original in zip(changed, data, strict=True):
        np.testing.assert_array_equal(array, original)
    if pass_ == "forward":
        with_bias = nc.conv2d(changed.x, changed.w, changed.b, **case.options, strategy=strategy)
        np.testing.assert_array_equal(with_bias, nc.conv2d(data.x, data.w, data.b, **case.options, strategy=strategy))
    if pass_ == "weight_grad":
        np.testing.assert_array_equal(nc.conv2d_bias_grad(changed.dy), nc.conv2d_bias_grad(data.dy))


# A call like one that was checked looks its plan up and checks nothing but the arrays: several times as fast.
QUICK = {
    "as they are": lambda a: a,
    "pickled": lambda a: pickle.loads(pickle.dumps(a)),  # their dtype is another object
    "read-only": read_only,
}


@pytest.mark.parametrize("first", ["a call", "a plan"])
@pytest.mark.parametrize("kind", QUICK)
def test_a_later_call_takes_the_short_way(kind, first, monkeypatch):
    """Whether it was a call or a plan that was first, and whatever the arrays came by."""
    case = Case(n=1, h=5, w=4, c=3, d=2)
    ops.forget_plans()
    x, w, b, dy = map(QUICK[kind], data_of(case, np.float32))
    plan = nc.plan("forward", x.shape, w.shape) if first == "a plan" else None
    y, gradients = nc.conv2d(x, w, b), nc.conv2d_backward(x, w, dy)
    monkeypatch.setattr(checks, "as_input", None)
    monkeypatch.setattr(checks, "as_planned", None)
    out = np.empty_like(y)
    np.testing.assert_array_equal(nc.conv2d(x, w, b), y)
    assert nc.conv2d(x, w, b, out=out) is out
    np.testing.assert_array_equal(out, y)
    for result, expected in zip(nc.conv2d_backward(x, w, dy), gradients, strict=True):
        np.testing.assert_array_equal(result, expected)
    if plan is not None:
        np.testing.assert_array_equal(plan(x, w, b), y)
        assert plan(x, w, b, out=out) is out


@each_pass
@given(case=cases())
def test_inputs_are_unchanged(pass_, case):
    """No pass of any strategy writes to x, w, b or dy."""
    data = draw_data(case, np.float32)
    before = [a.tobytes() for a in data]
    for strategy in supporting(case, pass_):
        run(case, data, pass_, strategy)
        if pass_ == "forward":
            nc.conv2d(data.x, data.w, data.b, **case.options, strategy=strategy)
    assert [a.tobytes() for a in data] == before


@each_pass
def test_read_only_arrays_stay_read_only(pass_):
    """That kernels see past the flag does not take it from the caller's array."""
    data = type(data_of(CASE, np.float32))(*map(read_only, data_of(CASE, np.float32)))
    run(CASE, data, pass_, "auto")
    assert not any(a.flags.writeable for a in data)


def test_mixed_dtypes_promote_as_numpy_does():
    """The result's dtype is NumPy's; the arithmetic is that of the wider one."""
    x, w, b, dy = draw_data(DENSE, np.float64)
    x32, half, brain = x.astype(np.float32), w.astype(np.float16), w.astype(ml_dtypes.bfloat16)
    assert nc.conv2d(x32, w).dtype == np.float64
    np.testing.assert_array_equal(nc.conv2d(x32, w), nc.conv2d(x32.astype(np.float64), w))
    assert nc.conv2d(x32, w.astype(np.float32), b).dtype == np.float64
    assert nc.conv2d(x32, half).dtype == np.float32
    np.testing.assert_array_equal(nc.conv2d(x32, half), nc.conv2d(x32, half.astype(np.float32)))
    assert nc.conv2d(x32, brain).dtype == np.float32
    assert nc.conv2d(x, brain).dtype == np.float64
    assert nc.conv2d_weight_grad(x32, dy).dtype == np.float64
    assert nc.conv2d_input_grad(dy.astype(np.float16), w.astype(np.float32)).dtype == np.float32
    g = nc.conv2d_backward(x32, w.astype(np.float32), dy)
    assert {a.dtype for a in g} == {np.dtype(np.float64)}


@each_pass
@pytest.mark.parametrize("dtype", [*DTYPES, np.float16, ml_dtypes.bfloat16])
def test_an_empty_batch_gives_empty_results_and_zero_gradients(pass_, dtype):
    """N = 0 works: empty y and dx, zero dw and db, and accumulating nothing changes nothing."""
    case = Case(n=0, c=4, d=6, groups=2, padding=PAD1)
    data = draw_data(case, dtype)
    got = run(case, data, pass_, "auto")
    assert got.shape == case.shape(pass_)
    assert got.dtype == dtype
    assert not got.any()
    if pass_ == "weight_grad":
        out = np.full(case.w_shape, np.nan, dtype)
        assert not run(case, data, pass_, "auto", out=out).any()
        out = np.ones(case.w_shape, dtype)
        assert (run(case, data, pass_, "auto", out=out, accumulate=True) == 1).all()
        g = nc.conv2d_backward(data.x, data.w, data.dy, **case.options)
        assert [a.shape for a in g] == [case.x_shape, case.w_shape, (case.d,)]
        assert not any(a.any() for a in g)
        out = np.full(case.d, np.nan, dtype)
        assert not nc.conv2d_bias_grad(data.dy, out=out).any()
        assert (nc.conv2d_bias_grad(data.dy, out=np.ones(case.d, dtype), accumulate=True) == 1).all()


def test_results_are_new_arrays():
    """No two results share memory, so a caller may write into them."""
    data = data_of(DENSE, np.float32)
    first, second = nc.conv2d(data.x, data.w), nc.conv2d(data.x, data.w)
    assert not np.shares_memory(first, second)
    first[...] = 0
    assert second.any()


def test_large_results_are_aligned():
    """What the package allocates starts at a cache line."""
    x, w = np.ones((1, 96, 96, 8), np.float32), np.ones((32, 3, 3, 8), np.float32)
    assert nc.conv2d(x, w).nbytes >= 2**20
    assert all(nc.conv2d(x, w).ctypes.data % 64 == 0 for _ in range(20))


# -------------------------------------------------------------------------------------- the article's forms

OPTIONS = [
    {},
    {"stride": (2, 1), "padding": ((1, 2), (0, 1)), "dilation": (1, 2)},
    {"padding": "same", "stride": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all", "same"])
@pytest.mark.parametrize(("x_rank", "w_rank"), [(3, 4), (3, 3), (2, 2)])
def test_smaller_forms_are_the_batched_case(x_rank, w_rank, options):
    """(H, W, C), one kernel, and (H, W) give the batched result, without the axes that they lack."""
    c, d = 1 if x_rank == 2 else 20, 1 if w_rank < 4 else 24
    case = Case(n=1, h=9, w=10, c=c, d=d)
    x4, w4, b4, _ = draw_data(case, np.float32)
    x = x4[0] if x_rank == 3 else x4[0, :, :, 0]
    w = {4: w4, 3: w4[0], 2: w4[0, :, :, 0]}[w_rank]
    b = b4 if w_rank == 4 else b4[0]

    def small(y):
        return y[0] if w_rank == 4 else y[0, :, :, 0]

    for strategy in strategies_for(x4, w4, options):
        both = {**options, "strategy": strategy}
        y4 = nc.conv2d(x4, w4, b4, **both)
        np.testing.assert_array_equal(nc.conv2d(x, w, b, **both), small(y4), strict=True)
        out = np.full_like(small(y4), np.nan, order="C")
        assert nc.conv2d(x, w, b, **both, out=out) is out
        np.testing.assert_array_equal(out, small(y4))

        dy4 = np.random.default_rng(2).standard_normal(y4.shape, np.float32)
        g4 = nc.conv2d_backward(x4, w4, dy4, **both)
        g = nc.conv2d_backward(x, w, small(dy4), **both)
        for got, batched, like in ((g.dx, g4.dx, x), (g.dw, g4.dw, w), (g.db, g4.db, b)):
            np.testing.assert_array_equal(got, batched.reshape(like.shape), strict=True)
        check_bias_grad(nc.conv2d_bias_grad(small(dy4)), small(dy4))
        check_bias_grad(g.db, small(dy4))
        np.testing.assert_array_equal(nc.conv2d_weight_grad(x, small(dy4), 3, **both), g.dw, strict=True)
        np.testing.assert_array_equal(nc.conv2d_input_grad(small(dy4), w, (9, 10), **both), g.dx, strict=True)


def strategies_for(x, w, options):
    """Return the strategies that can do all passes; at least those that take everything."""
    problem = nc.plan("forward", x.shape, w.shape, **options).problem
    names = [n for n, s in REGISTRY.items() if not any(s.supports(problem, p) for p in PASSES)]
    assert {"loop", "im2col", "tensordot"} <= set(names)
    return names


def test_zero_d_results_can_be_written_into():
    """A 0-d bias gradient is an array: `out` and accumulate work."""
    db = nc.conv2d_bias_grad(np.ones((3, 4)))
    assert isinstance(db, np.ndarray)
    assert db.shape == ()
    assert db == 12
    nc.conv2d_bias_grad(np.ones((3, 4)), out=db, accumulate=True)
    assert db == 24


# --------------------------------------------------------------------------------- sizes that are inferred


@given(case=cases())
def test_kernel_size_follows_from_the_shapes(case):
    """With stride and dilation 1 and padding in numbers, shapes determine the kernel; `out` always does."""
    case = Case(case.n, 12, 13, case.c, case.d, case.kh, case.kw, (1, 1), case.padding, (1, 1), case.groups)
    x, _, _, dy = draw_data(case, np.float32)
    got = nc.conv2d_weight_grad(x, dy, padding=case.padding, groups=case.groups)
    assert got.shape == case.w_shape


def test_kernel_size_follows_from_out():
    """`out` says what the shapes leave open, in every form."""
    x, dy = np.ones((2, 9, 9, 3), np.float32), np.ones((2, 4, 4, 5), np.float32)
    for kh in (3, 2):  # both give four rows
        out = np.full((5, kh, 2, 3), np.nan, np.float32)
        assert nc.conv2d_weight_grad(x, dy, stride=2, out=out) is out
        np.testing.assert_array_equal(out, nc.conv2d_weight_grad(x, dy, (kh, 2), stride=2))
    out = np.full((2, 2, 3), np.nan, np.float32)
    assert np.isfinite(nc.conv2d_weight_grad(x[0], dy[0, :, :, 0], stride=2, out=out)).all()
    out = np.full((2, 2), np.nan, np.float32)
    assert np.isfinite(nc.conv2d_weight_grad(x[0, :, :, 0], dy[0, :, :, 0], stride=2, out=out)).all()


@given(case=cases())
def test_input_size_is_the_smallest_that_gives_dy(case):
    """Without input_size, dx is as small as dy allows: one row or column less would give a smaller dy."""
    if min(case.y_shape) < 1:
        case = Case(**{**case.__dict__, "n": 1})
    _, w, _, dy = draw_data(case, np.float32)
    sizes = []
    for axis in (0, 1):
        args = (case.w_shape[1 + axis], case.stride[axis], case.padding[axis], case.dilation[axis])
        fitting = [s for s in range(1, 450) if oracle.output_size(s, *args) == case.y_shape[1 + axis]]
        sizes.append(fitting[0])
        smallest = (case.y_shape[1 + axis] - 1) * args[1] + (args[0] - 1) * args[3] + 1 - sum(args[2])
        if smallest < 1:  # the formula's answer would not be an image
            with pytest.raises(ValueError, match="implies an input of"):
                nc.conv2d_input_grad(dy, w, **case.options)
            return
    got = nc.conv2d_input_grad(dy, w, **case.options)
    assert got.shape == (case.n, *sizes, case.c)
    np.testing.assert_array_equal(got, nc.conv2d_input_grad(dy, w, tuple(sizes), **case.options))


def test_input_size_follows_from_out():
    """`out` says how large x was."""
    dy, w = np.ones((2, 4, 4, 5), np.float32), np.ones((5, 2, 2, 3), np.float32)
    for size in (8, 9):
        out = np.full((2, size, size, 3), np.nan, np.float32)
        assert nc.conv2d_input_grad(dy, w, stride=2, out=out) is out
        np.testing.assert_array_equal(out, nc.conv2d_input_grad(dy, w, size, stride=2))
    assert nc.conv2d_input_grad(dy[0], w, stride=2, out=np.zeros((9, 9, 3), np.float32)).shape == (9, 9, 3)
    small = nc.conv2d_input_grad(dy[0, :, :, 0], w[0], stride=2, out=np.zeros((9, 9, 3), np.float32))
    assert small.shape == (9, 9, 3)
    tiny = nc.conv2d_input_grad(dy[0, :, :, 0], w[0, :, :, 0], stride=2, out=np.zeros((9, 9), np.float32))
    assert tiny.shape == (9, 9)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_same_padding_is_tensorflows(stride, kernel, dilation):
    """ "same": ceil(size / stride) outputs, and the zeros that tf.nn.convolution documents.

    https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    """
    effective = (kernel - 1) * dilation + 1
    for size in range(1, 12):
        pad_along = max(effective - (stride if size % stride == 0 else size % stride), 0)
        before = pad_along // 2
        after = pad_along - before
        case = Case(
            n=1, h=size, w=12 - size, c=2, d=3, kh=kernel, kw=1, stride=(stride, 1),
            padding=((before, after), (0, 0)), dilation=(dilation, 1),
        )  # fmt: skip
        data = draw_data(case, np.float32)
        options = {"stride": (stride, 1), "dilation": (dilation, 1)}
        y = nc.conv2d(data.x, data.w, **options, padding="same")
        assert y.shape[1] == -(-size // stride)
        np.testing.assert_array_equal(y, nc.conv2d(data.x, data.w, **options, padding=case.padding))
        dy = data.dy
        same = nc.conv2d_backward(data.x, data.w, dy, **options, padding="same")
        numbers = nc.conv2d_backward(data.x, data.w, dy, **options, padding=case.padding)
        for a, b in zip(same, numbers, strict=True):
            np.testing.assert_array_equal(a, b)
        dw = nc.conv2d_weight_grad(data.x, dy, (kernel, 1), **options, padding="same")
        np.testing.assert_array_equal(dw, same.dw)
        dx = nc.conv2d_input_grad(dy, data.w, data.x.shape[1:3], **options, padding="same")
        np.testing.assert_array_equal(dx, same.dx)
        smallest = nc.conv2d_input_grad(dy, data.w, **options, padding="same")
        assert smallest.shape[1:3] == ((dy.shape[1] - 1) * stride + 1, 12 - size)


@pytest.mark.parametrize(
    ("padding", "numbers"),
    [
        ("valid", ((0, 0), (0, 0))),
        (2, ((2, 2), (2, 2))),
        ((1, 2), ((1, 1), (2, 2))),
        ([1, 2], ((1, 1), (2, 2))),
        (np.array([1, 2]), ((1, 1), (2, 2))),
        ([[1, 2], (3, 0)], ((1, 2), (3, 0))),
        (np.int64(1), ((1, 1), (1, 1))),
    ],
    ids=repr,
)
def test_forms_of_padding(padding, numbers):
    """An int, a pair, a pair of pairs, "valid": all are four numbers in the end."""
    data = data_of(DENSE, np.float32)
    np.testing.assert_array_equal(
        nc.conv2d(data.x, data.w, padding=padding), nc.conv2d(data.x, data.w, padding=numbers)
    )


def test_options_take_numpy_integers_and_lists():
    """np.int64 is an integer, a list of two is a pair."""
    data = data_of(DENSE, np.float32)
    plain = nc.conv2d(data.x, data.w, stride=(2, 1), dilation=(1, 2))
    got = nc.conv2d(data.x, data.w, stride=[np.int64(2), 1], dilation=np.array([1, 2]), groups=np.int32(1))
    np.testing.assert_array_equal(got, plain)


# ------------------------------------------------------------------------------------------- the package


def test_all_names_exactly_what_is_public():
    """`__all__` is the documented list; every name exists, and nothing else that is public is in the namespace."""
    expected = {
        "conv2d", "conv2d_weight_grad", "conv2d_bias_grad", "conv2d_input_grad", "conv2d_backward", "plan", "Conv2D",
        "Gradients", "Plan", "strategies", "tune", "warmup", "__version__",
    }  # fmt: skip
    assert expected <= set(nc.__all__)
    assert len(nc.__all__) == len(set(nc.__all__))
    assert list(nc.__all__) == sorted(nc.__all__)
    public = {n for n, v in vars(nc).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public == set(nc.__all__) - {"__version__"}


def test_docstrings_say_all_that_people_need():
    """Every public function and class documents its parameters, errors, and one example."""
    for name in nc.__all__:
        thing = getattr(nc, name)
        if inspect.isfunction(thing) or thing is nc.Conv2D:
            doc = inspect.getdoc(thing)
            assert ">>> " in doc, name
            for parameter in inspect.signature(thing).parameters:
                section = doc[doc.index("Parameters") :]
                assert parameter in section, (name, parameter)


MODULES = [
    m.name
    for m in pkgutil.walk_packages(nc.__path__, "nhwconv.")
    if not m.name.startswith(("nhwconv.cli", "nhwconv.torch", "nhwconv.jax", "nhwconv.dask"))
]


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module):
    """Every example does what it shows."""
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def test_there_are_examples():
    """The test above has something to check."""
    assert {"nhwconv.ops", "nhwconv.layer"} <= set(MODULES)
    assert doctest.testmod(importlib.import_module("nhwconv.ops")).attempted > 20


def test_warmup_leaves_nothing_to_compile():
    """After warmup of all passes and dtypes, strategies and names are refused by text, and calls work."""
    nc.warmup(PASSES, [np.float32, np.float64])
    nc.warmup(["weight_grad"], [np.float16], strategy="tensordot")
    with pytest.raises(ValueError, match="warmup: passes has 'backward'"):
        nc.warmup(["backward"])


@pytest.mark.parametrize("name", ["conv2d", "conv1d", "conv_transpose2d", "conv_transpose1d"])
def test_a_call_like_one_before_is_not_checked_again(name, monkeypatch):
    """It finds its plan by shapes and options; whatever differs in them is looked at anew."""
    kernel, size = ((3, 2), (7, 8)) if name.endswith("2d") else ((3,), (9,))
    x, w = np.ones((2, *size, 4), np.float32), np.ones((4, *kernel, 4), np.float32)
    b = np.ones(4, np.float32)
    function, gradients = getattr(nc, name), getattr(nc, f"{name}_backward")
    options = {"stride": 2, "padding": 1}
    y = function(x, w, b, **options)
    expected = gradients(x, w, y, **options)

    class LookedAtError(Exception):
        pass

    def looked_at(*_, **__):
        raise LookedAtError

    for check in ("of", "as_layout"):
        monkeypatch.setattr(nc.ops.checks if check == "as_layout" else nc.ops.Options, check, looked_at)
    np.testing.assert_array_equal(function(x, w, b, **options), y)
    for got, before in zip(gradients(x, w, y, **options), expected, strict=True):
        np.testing.assert_array_equal(got, before)
    changes = [{"stride": True}, {"padding": (1, 1)}, {"layout": "NCHW"}, {"out": y[::-1]}, {"groups": 2}]
    for change in [*changes, {"output_padding": 1}] if "transpose" in name else changes:
        with pytest.raises(LookedAtError):
            function(x, w, b, **{**options, **change})
    for arrays in ((x[:1], w, b), (x, w[..., :2], b), (x.astype(np.float64), w, b), (x[:, ::-1], w, b), (x, w, b[:3])):
        with pytest.raises(LookedAtError):
            function(*arrays, **options)
