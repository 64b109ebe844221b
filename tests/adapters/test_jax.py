"""The JAX adapter: against JAX's own convolution, under its transformations, and never waiting for itself."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numba
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

import child
import nhwconv as nc
import nhwconv.jax
from cases import Case, Data, draw_data
from nhwconv import xla
from nhwconv.jax import conv1d, conv2d, conv_transpose1d, conv_transpose2d

ROOT = Path(__file__).parents[2]
CASES = [
    Case(n=2, h=5, w=6, c=4, d=6, kh=3, kw=2, stride=(1, 2), padding=((1, 0), (2, 1)), groups=2),
    Case(n=2, h=6, w=5, c=3, d=2, dilation=(2, 1), padding=((1, 1), (0, 0))),
    Case(n=1, h=5, w=5, c=4, d=8, groups=4, stride=(2, 1)),
]


def random_case(seed: int) -> Case:
    """Draw a small problem with every option."""
    draw = np.random.default_rng(seed)

    def two(least: int, most: int) -> tuple[int, int]:
        first, second = draw.integers(least, most + 1, 2)
        return int(first), int(second)

    (groups, multiplier), (n, cg), (kh, kw), (h, w) = two(1, 3), two(1, 3), two(1, 3), two(7, 9)
    return Case(
        n=n, h=h, w=w, c=groups * cg, d=groups * multiplier, kh=kh, kw=kw, groups=groups,
        stride=two(1, 3), dilation=two(1, 2), padding=(two(0, 2), two(0, 2)),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def arrays(case: Case, dtype: Any = np.float64) -> Data:
    return Data(*map(jnp.asarray, draw_data(case, dtype)))  # type: ignore[arg-type]


def own(x: jax.Array, w: jax.Array, b: jax.Array, case: Case) -> jax.Array:
    """JAX's own convolution."""
    return b + jax.lax.conv_general_dilated(
        x, w, case.stride, case.padding, rhs_dilation=case.dilation, feature_group_count=case.groups,
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
    )  # fmt: skip


def close(got: Any, expected: Any) -> None:
    """Both are float64 sums of some dozens of products around 1."""
    for a, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        np.testing.assert_allclose(a, e, rtol=1e-11, atol=1e-11)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, int]]:
    """Return a list that grows by each call on samples: its name, its first array's shape, its threads."""
    calls: list[tuple[str, Any, int]] = []

    def watched(name: str) -> Any:
        function = getattr(nc.ops, name)

        def call(first: Any, *more: Any, **options: Any) -> Any:
            if len(first):
                calls.append((name, first.shape, numba.get_num_threads()))
            return function(first, *more, **options)

        return call

    for name in ("conv2d", "conv2d_input_grad", "conv2d_weight_grad"):
        monkeypatch.setattr(nc.ops, name, watched(name))
    return calls


# ----------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("case", [*CASES, *map(random_case, range(5))], ids=str)
def test_results_and_derivatives_are_jaxs(case: Case, jit: bool) -> None:
    x, w, b, dy = arrays(case)

    def all_of(function: Any) -> Any:
        def both(x: jax.Array, w: jax.Array, b: jax.Array) -> Any:
            pushed = jax.jvp(function, (x, w, b), (jnp.cos(x), jnp.cos(w), jnp.cos(b)))
            loss = jax.value_and_grad(lambda *arrays: (jnp.sin(function(*arrays)) * dy).sum(), argnums=(0, 1, 2))
            return pushed, loss(x, w, b)

        return (jax.jit(both) if jit else both)(x, w, b)

    close(all_of(lambda x, w, b: conv2d(x, w, b, **case.options)), all_of(lambda x, w, b: own(x, w, b, case)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_check_grads_to_second_order(case: Case) -> None:
    x, w, b, _ = arrays(case)
    check_grads(lambda x, w, b: jnp.sin(conv2d(x, w, b, **case.options)), (x, w, b), order=2, modes=["fwd", "rev"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_linearize_and_linear_transpose(case: Case) -> None:
    x, w, _, dy = arrays(case)
    functions = (lambda x: conv2d(x, w, **case.options)), (lambda w: conv2d(x, w, **case.options))
    for function, at in zip(functions, (x, w), strict=True):
        y, pull = jax.vjp(function, at)
        value, push = jax.linearize(function, at)
        close((value, push(3 * at)), (y, 3 * y))
        close(jax.linear_transpose(function, at)(dy), pull(dy))


def test_only_what_is_needed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch(monkeypatch)
    x, w, _, _ = arrays(CASES[0])
    for argnums, expected in ((0, "conv2d_input_grad"), (1, "conv2d_weight_grad")):
        jax.grad(lambda x, w: conv2d(x, w, **CASES[0].options).sum(), argnums)(x, w).block_until_ready()
        assert {name for name, *_ in calls} - {"conv2d"} == {expected}
        calls.clear()


# ----------------------------------------------------------------------------------------- mapped axes


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0), (1, 3)], ids=str)
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_vmap(case: Case, mapped: tuple[int | None, int | None], jit: bool) -> None:
    x, w, b, _ = arrays(case)
    x = x if mapped[0] is None else jnp.stack([x, 2 * x, -x], mapped[0])
    w = w if mapped[1] is None else jnp.stack([w, -w, 3 * w], mapped[1])

    def results(function: Any) -> Any:
        def both(x: jax.Array, w: jax.Array) -> Any:
            y, pull = jax.vjp(lambda x, w: function(x, w), x, w)
            return y, pull(jnp.cos(y))

        found = jax.vmap(both, in_axes=mapped)
        return (jax.jit(found) if jit else found)(x, w)

    close(results(lambda x, w: conv2d(x, w, b, **case.options)), results(lambda x, w: own(x, w, b, case)))


def test_derivatives_of_mapped_derivatives() -> None:
    case = CASES[0]
    x, w, b, _ = arrays(case)

    def hessian(function: Any) -> jax.Array:
        mapped = jax.vmap(lambda x, w: function(x[None], w), (0, None))
        return jax.jit(jax.hessian(lambda w: jnp.sin(mapped(x, w)).sum()))(w)

    close(hessian(lambda x, w: conv2d(x, w, b, **case.options)), hessian(lambda x, w: own(x, w, b, case)))


@pytest.mark.parametrize(
    ("in_axes", "shapes"),
    [
        ((0, None), [(24, 6, 6, 4), (24, 4, 4, 6), (2, 6, 6, 4 * 12)]),  # samples; channels of x
        ((None, 0), [(2, 6, 6, 4), (2, 4, 4, 6), (2, 6, 6, 4)]),  # channels of w or dy
        ((0, 0), [(2, 6, 6, 4 * 12), (2, 4, 4, 6 * 12), (2, 6, 6, 4 * 12)]),  # groups
    ],
    ids=str,
)
def test_whatever_is_mapped_is_one_call(
    in_axes: tuple[int | None, int | None], shapes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, dy = jnp.ones((3, 4, 2, 6, 6, 4)), jnp.ones((3, 4, 6, 3, 3, 2)), jnp.ones((3, 4, 2, 4, 4, 6))

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        return conv2d(x, w, groups=2)

    def input_grad(dy: jax.Array, w: jax.Array) -> jax.Array:
        (dx,) = jax.linear_transpose(lambda x: forward(x, w), x[0, 0])(dy)
        return dx

    def weight_grad(x: jax.Array, dy: jax.Array) -> jax.Array:
        (dw,) = jax.linear_transpose(lambda w: forward(x, w), w[0, 0])(dy)
        return dw

    calls = watch(monkeypatch)
    for function, *two in ((forward, x, w), (input_grad, dy, w), (weight_grad, x, dy)):
        first, second = (a if axis == 0 else a[0, 0] for a, axis in zip(two, in_axes, strict=True))
        jax.vmap(jax.vmap(function, in_axes), in_axes)(first, second).block_until_ready()
    assert [name for name, *_ in calls] == ["conv2d", "conv2d_input_grad", "conv2d_weight_grad"]
    assert [shape for _, shape, _ in calls] == shapes


# -------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(dtype: str) -> None:
    x, w, b, _ = (a.astype(dtype) for a in arrays(CASES[1]))
    y = conv2d(x, w, b, **CASES[1].options)
    exact = own(*(a.astype("float64") for a in (x, w, b)), CASES[1])
    size = own(*(abs(a.astype("float64")) for a in (x, w, b)), CASES[1])
    assert y.dtype == dtype
    assert (abs(y - exact) <= 28 * float(jnp.finfo(dtype).eps) * size).all()  # 27 products and the bias


def test_errors_come_while_tracing() -> None:
    x, w = jnp.ones((1, 5, 5, 3)), jnp.ones((4, 3, 3, 2))
    with pytest.raises(ValueError, match=r"^conv2d: w has 2 input channels per group, but x has 3 channels in 1 group"):
        jax.jit(conv2d)(x, w)
    with pytest.raises(ValueError, match=r"^conv2d: x has shape"):
        conv2d(x[0], w)
    with pytest.raises(TypeError, match=r"^conv2d: x has dtype int64"):
        conv2d(x.astype(int), w)
    with pytest.raises(ValueError, match=r"^conv2d: b has shape"):
        conv2d(x[..., :2], w, jnp.ones(3))
    with pytest.raises(ValueError, match=r"^conv2d: w_layout is 'OIHW', expected 'OHWI' or 'HWIO'"):
        conv2d(x, w, w_layout="OIHW")
    with pytest.raises(ValueError, match=r"^conv2d: padding is 'SAME_LOWER', expected"):
        conv2d(x[..., :2], w, padding="SAME_LOWER")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_jaxs_names_of_paddings(padding: str, stride: int) -> None:
    x, w, _, _ = arrays(CASES[1])
    expected = jax.lax.conv_general_dilated(x, w, (stride,) * 2, padding, dimension_numbers=("NHWC", "OHWI", "NHWC"))
    close(conv2d(x, w, padding=padding, stride=stride), expected)
    close(conv2d(x, w, padding=padding.lower(), stride=stride), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_as_flax_has_them(case: Case) -> None:
    x, w, b, dy = arrays(case)
    y, pull = jax.vjp(lambda w: conv2d(x, w, b, **case.options), w)
    flax, pull_flax = jax.vjp(lambda w: conv2d(x, w, b, **case.options, w_layout="HWIO"), w.transpose(1, 2, 3, 0))
    close(flax, y)
    close(pull_flax(dy)[0], pull(dy)[0].transpose(1, 2, 3, 0))


def test_no_samples() -> None:
    x, w = jnp.ones((0, 5, 5, 3), jnp.float32), jnp.ones((4, 3, 3, 3), jnp.float32)
    y, dw = jax.jit(jax.value_and_grad(lambda w: conv2d(x, w).sum()))(w)
    assert conv2d(x, w).shape == (0, 3, 3, 4)
    assert y == 0
    assert dw.shape == w.shape
    assert (dw == 0).all()


# ------------------------------------------------------------------------------------------ other names


def own_transposed(x: jax.Array, w: jax.Array, b: jax.Array, case: Case, size: tuple[int, int]) -> jax.Array:
    """JAX's own gradient of its own convolution."""
    like = jnp.zeros((len(x), *size, case.c), x.dtype)
    return b + jax.vjp(lambda like: own(like, w, jnp.zeros(case.d), case), like)[1](x)[0]


def derivatives(function: Any, *arrays: jax.Array) -> Any:
    """Return derivatives in both modes, second ones, and of mapped axes."""

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sin(function(*arrays)).sum()

    x, w, b = arrays
    return (
        jax.jit(function)(*arrays),
        jax.grad(loss, (0, 1, 2))(*arrays),
        jax.jvp(function, arrays, tuple(map(jnp.cos, arrays))),
        jax.linearize(function, *arrays)[1](*arrays),
        jax.grad(lambda w: (jax.grad(loss)(x, w, b) ** 2).sum())(w),
        jax.vmap(function, (0, None, None))(jnp.stack([x, 2 * x]), w, b),
        jax.vmap(function, (None, 1, None), 1)(x, jnp.stack([w, 2 * w], 1), b),
        jax.vmap(jax.grad(loss, (0, 1, 2)), (0, 0, None))(jnp.stack([x, 2 * x]), jnp.stack([w, 2 * w]), b),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed_convolutions_are_input_gradients(case: Case) -> None:
    dy, w, _, x = arrays(case)  # of the convolution: x is its output here
    x, b = own(dy, w, jnp.zeros(case.d), case), jnp.linspace(-1, 1, case.c)
    reach = [(k - 1) * d + 1 for k, d in zip((case.kh, case.kw), case.dilation, strict=True)]
    least = [
        (n - 1) * s + r - sum(p) for n, s, r, p in zip(x.shape[1:3], case.stride, reach, case.padding, strict=True)
    ]
    more = case.h - least[0], case.w - least[1]

    def ours(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return conv_transpose2d(x, w, b, **case.options, output_padding=more)

    close(derivatives(ours, x, w, b), derivatives(lambda *a: own_transposed(*a, case, (case.h, case.w)), x, w, b))
    close(ours(x, w, b), jnp.asarray(nc.conv_transpose2d(x, w, b, **case.options, output_padding=more)))
    flax = conv_transpose2d(x, jnp.moveaxis(w, 0, -1), b, **case.options, output_padding=more, w_layout="HWIO")
    close(flax, ours(x, w, b))


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_transposed_convolutions_are_jaxs(stride: int, padding: str) -> None:
    x, w = jax.random.normal(jax.random.key(0), (2, 5, 4, 3)), jax.random.normal(jax.random.key(1), (3, 2, 4, 3))
    expected = jax.lax.conv_transpose(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
    )
    close(conv_transpose2d(x, w, stride=stride, padding=padding, w_layout="HWIO"), expected)
    along = jax.lax.conv_transpose(
        x[:, 0], w[0], (stride,), padding, dimension_numbers=("NHC", "HIO", "NHC"), transpose_kernel=True
    )
    close(conv_transpose1d(x[:, 0], w[0], stride=stride, padding=padding, w_layout="HWIO"), along)


def test_outputs_that_no_kernel_reaches() -> None:
    """As many as the dilation has, which the convolution whose transpose it is does not read."""
    x, w, b = jnp.ones((2, 3, 4, 2)), jnp.ones((2, 1, 1, 3)), jnp.ones(3)
    options = {"stride": (3, 1), "dilation": (1, 3), "output_padding": 2}
    y, pull = jax.vjp(lambda x: conv_transpose2d(x, w, b, **options), x)
    close(y, jnp.asarray(nc.conv_transpose2d(x, w, b, **options)))
    close(pull(y)[0], jnp.asarray(nc.conv_transpose2d_backward(x, w, y, **options).dx))


@pytest.mark.parametrize("function", [conv1d, conv_transpose1d])
def test_one_dimension_is_one_row(function: Any) -> None:
    two = {conv1d: conv2d, conv_transpose1d: conv_transpose2d}[function]
    x, b = jax.random.normal(jax.random.key(0), (2, 9, 4)), jnp.ones(6)
    w = jax.random.normal(jax.random.key(1), (6, 3, 2) if function is conv1d else (4, 3, 3))

    def of_rows(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        y = two(x[:, None], w[:, None], b, stride=(1, 2), padding=((0, 0), (2, 1)), dilation=(1, 2), groups=2)
        return y[:, 0]

    def ours(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return function(x, w, b, stride=2, padding=(2, 1), dilation=2, groups=2)

    close(derivatives(ours, x, w, b), derivatives(of_rows, x, w, b))
    flax = function(x, jnp.moveaxis(w, 0, -1), b, stride=2, padding=(2, 1), dilation=2, groups=2, w_layout="HWIO")
    close(flax, ours(x, w, b))
    same = function(x, w, padding="SAME", groups=2)
    assert same.shape == (2, 9, 6)


def test_errors_are_in_the_words_of_each_function() -> None:
    x, w = jnp.ones((1, 5, 3)), jnp.ones((4, 3, 2))
    for function, message in (
        (lambda: jax.jit(conv1d)(x, w), r"conv1d: w has 2 input channels per group, but x has 3 channels in 1 group"),
        (lambda: conv1d(x[0], w), r"conv1d: x has shape \(5, 3\) and w \(4, 3, 2\), expected \(N, L, C\) and \(D, K, "),
        (lambda: conv_transpose1d(x, w), r"conv_transpose1d: w has 4 input channels, but x has 3"),
        (lambda: conv_transpose2d(x, w, w_layout="HWIO"),
         r"conv_transpose2d: x has shape .* expected \(N, H, W, C\) and \(KH, KW, D/groups, C\)"),
        (lambda: conv_transpose2d(x[None], w[None]), r"conv_transpose2d: w has 1 input channels, but x has 3"),
        (lambda: conv_transpose1d(x, w[:3], output_padding=1), r"conv_transpose1d: output_padding is 1, expected less"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}"):
            function()


# --------------------------------------------------------------------------------------------- programs


def compilations(caplog: pytest.LogCaptureFixture, function: Any) -> int:
    """Return how many programs JAX compiles while a function runs."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "jax"), jax.log_compiles():
        jax.block_until_ready(function())
    return sum(record.getMessage().startswith("Compiling") for record in caplog.records)


def test_eager_calls_compile_once(caplog: pytest.LogCaptureFixture) -> None:
    x, w = jnp.ones((2, 7, 9, 3)), jnp.ones((4, 3, 2, 3))

    class Two:
        def __index__(self) -> int:
            return 2

    def calls() -> Any:
        return [conv2d(x, w, stride=stride, padding=np.array([1, 0])) for stride in (2, np.int64(2), Two())]

    assert compilations(caplog, calls) == 1
    assert compilations(caplog, calls) == 0
    gradient = jax.grad(lambda w: conv2d(x, w).sum())
    gradient(w)
    assert compilations(caplog, lambda: gradient(w)) == 0


def test_without_jit() -> None:
    x, w, b, _ = arrays(CASES[0])
    with jax.disable_jit():
        close(conv2d(x, w, b, **CASES[0].options), own(x, w, b, CASES[0]))


def test_the_number_of_threads_is_that_of_the_thread_that_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch(monkeypatch)
    x, w = jnp.ones((2, 11, 9, 3)), jnp.ones((4, 3, 3, 3))
    most = numba.config.NUMBA_NUM_THREADS
    unlimited = jax.jit(lambda x, w: conv2d(x, w)).lower(x, w).compile()
    numba.set_num_threads(1)
    try:
        limited = jax.jit(lambda x, w: conv2d(x, w)).lower(x, w).compile()
        conv2d(x, w).block_until_ready()
    finally:
        numba.set_num_threads(most)
    conv2d(x, w).block_until_ready()
    # Numba's setting is a thread's own. This one's is the default, as that of XLA's threads is.
    thread = threading.Thread(target=lambda: [program(x, w).block_until_ready() for program in (limited, unlimited)])
    thread.start()
    thread.join()
    assert [threads for *_, threads in calls] == [1, most, 1, most]


ALLOWED = [export.DisabledSafetyCheck.custom_call("nhwconv")]


def test_a_symbolic_number_of_samples() -> None:
    case = CASES[0]
    x, w, b, _ = arrays(case)
    (n,) = export.symbolic_shape("n")

    def step(x: jax.Array, w: jax.Array) -> Any:
        return jax.value_and_grad(lambda x, w: jnp.sin(conv2d(x, w, b, **case.options)).sum(), (0, 1))(x, w)

    shapes = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype)
    exported = export.export(jax.jit(step), disabled_checks=ALLOWED)(*shapes)
    for samples in (x, x[:1], jnp.concatenate([x, -x])):
        close(exported.call(samples, w), step(samples, w))
    with pytest.raises(ValueError, match="@nhwconv"):  # JAX's word that it cannot promise to load it later
        export.export(jax.jit(step))(*shapes)
    with pytest.raises(ValueError, match=r"^conv2d: x has shape \(2, n, 6, 4\) .* only the number of samples may"):
        export.export(jax.jit(step))(jax.ShapeDtypeStruct((2, n, 6, 4), x.dtype), shapes[1])


def test_another_process_runs_what_was_exported(tmp_path: Path) -> None:
    x = jnp.arange(50, dtype=jnp.float32).reshape(1, 5, 5, 2)
    w = jnp.arange(36, dtype=jnp.float32).reshape(2, 3, 3, 2)
    exported = export.export(jax.jit(conv2d), disabled_checks=ALLOWED)(x, w)
    (tmp_path / "program").write_bytes(exported.serialize())
    code = """
import sys, numpy as np, nhwconv.jax
from jax import export
with open(sys.argv[1], "rb") as file:
    program = export.deserialize(file.read())
shapes = [a.shape for a in program.in_avals]
print(float(program.call(*(np.arange(np.prod(s), dtype=np.float32).reshape(s) for s in shapes)).sum()))
"""
    assert float(child.run(code, tmp_path / "program")) == float(conv2d(x, w).sum())


def test_jaxs_store_of_programs_serves_other_processes(tmp_path: Path) -> None:
    code = """
import sys, jax, jax.numpy as jnp
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from nhwconv.jax import conv1d, conv2d, conv_transpose1d, conv_transpose2d
x, w = jnp.ones((2, 5, 5, 3)), jnp.ones((4, 3, 3, 3))
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
print(float(jax.jit(lambda x, w: conv2d(x, w).sum())(x, w)), bool(hits))
"""
    assert [child.run(code, tmp_path) for _ in range(2)] == ["1944.0 False\n", "1944.0 True\n"]


# ------------------------------------------------------------------------------------------ XLA's calls


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arrays of a call are XLA's own buffers."""
    seen = []
    forward = nc.ops.conv2d

    def watched(x: np.ndarray, *more: Any, **options: Any) -> np.ndarray:
        seen.append((x.ctypes.data, options["out"].ctypes.data if "out" in options else None))
        return forward(x, *more, **options)

    x, w = jnp.ones((2, 5, 5, 3), jnp.float32), jnp.ones((4, 3, 3, 3), jnp.float32)
    monkeypatch.setattr(nc.ops, "conv2d", watched)
    y = conv2d(x, w).block_until_ready()
    assert seen[-1] == (x.unsafe_buffer_pointer(), y.unsafe_buffer_pointer())


@pytest.mark.parametrize("error", [MemoryError("none left"), KeyboardInterrupt("stopped")], ids=str)
def test_what_fails_within_a_call_is_an_error_of_jax(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = jnp.ones((2, 5, 5, 3), jnp.float32), jnp.ones((4, 3, 3, 3), jnp.float32)
    step = jax.jit(conv2d)
    expected = step(x, w)

    def broken(*arrays: Any, **options: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(nc.ops, "conv2d", broken)
        # JAX raises the one where a program starts, the other where its result is waited for.
        with pytest.raises((ValueError, RuntimeError), match=f"{type(error).__name__}: {error}"):
            jax.block_until_ready(step(x, w))
    assert (step(x, w) == expected).all()


def test_structures_are_those_of_the_header() -> None:
    """XLA's header, which jaxlib ships, has the members that `nhwconv.xla` writes down, in this order."""
    header = (Path(jax.ffi.include_dir()) / xla._HEADER).read_text()
    header = re.sub(r"//.*", "", header)
    assert xla._version(header)[0] == xla._MAJOR

    def members(name: str) -> list[str]:
        body = re.search(rf"struct {name} \{{(.*?)\}};", header, re.DOTALL)
        assert body is not None, name
        return re.findall(r"(\w+)\)?;", body[1])

    base = ["struct_size", "extension_start"]
    for structure, name, expected in (
        (xla._Extension, "XLA_FFI_Extension_Base", ["struct_size", "type", "next"]),
        (xla._Version, "XLA_FFI_Api_Version", [*base, "major_version", "minor_version"]),
        (xla._Metadata, "XLA_FFI_Metadata", ["struct_size", "api_version", "traits"]),
        (xla._Buffer, "XLA_FFI_Buffer", [*base, "dtype", "data", "rank", "dims"]),
        (xla._Buffers, "XLA_FFI_Args", [*base, "size", "types", "args"]),
        (xla._Buffers, "XLA_FFI_Rets", [*base, "size", "types", "rets"]),
        (xla._Text, "XLA_FFI_ByteSpan", ["ptr", "len"]),
        (xla._Attributes, "XLA_FFI_Attrs", [*base, "size", "types", "names", "attrs"]),
        (xla._Error, "XLA_FFI_Error_Create_Args", [*base, "message", "errc"]),
        (xla._Api, "XLA_FFI_Api", [*base, "api_version", "internal_api", "XLA_FFI_Error_Create"]),
        (xla._Frame, "XLA_FFI_CallFrame", [*base, "api", "ctx", "stage", "args", "rets", "attrs"]),
    ):
        assert members(name)[: len(expected)] == expected
        ours = [field for kind in reversed(structure.__mro__) for field in vars(kind).get("_fields_", ())]
        assert len(ours) == len(expected) + (structure is xla._Extension)  # which has `metadata` behind it
    assert members("XLA_FFI_Metadata_Extension") == ["extension_base", "metadata"]
    for number, constant in ((xla._METADATA, "Extension_Metadata"), (xla._EXECUTE, "ExecutionStage_EXECUTE"),
                             (xla._STRING, "AttrType_STRING"), (xla._INTERNAL, "Error_Code_INTERNAL")):  # fmt: skip
        assert re.search(rf"XLA_FFI_{constant} = {number}\b", header)
    for number, dtype in xla._DTYPES.items():
        short = {"float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16"}[dtype.name]
        assert re.search(rf"XLA_FFI_DataType_{short} = {number}\b", header)


def test_another_version_of_the_interface_is_refused(tmp_path: Path) -> None:
    """And not called, which might crash."""
    header = tmp_path / xla._HEADER
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 1\n#define XLA_FFI_API_MINOR 0\n")
    with pytest.raises(ImportError, match=r"version 0 .* not 1$"):
        xla.handler(lambda *call: None, str(tmp_path))


# --------------------------------------------------------------------------------------- nothing hangs


def ends(code: str, devices: int = 1, timeout: float = 120) -> str:
    """Run a child on as many devices, that must end well and in time; return what it printed."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    status, out, err = child.finish(child.start(code, XLA_FLAGS=flags), timeout)
    assert status == 0, f"{status}\n{out}\n{err}"
    return out


def test_a_program_that_runs_when_python_ends() -> None:
    code = """
import jax, jax.numpy as jnp
from nhwconv.jax import conv1d, conv2d, conv_transpose1d, conv_transpose2d
x, w = jnp.ones((16, 128, 128, 16)), jnp.ones((16, 3, 3, 16)) / 144
@jax.jit
def step(w):
    loss = lambda w: sum(conv2d(jnp.sin(conv2d(x * i, w, padding=1)), w).sum() for i in range(10))
    return jax.grad(loss)(w)
compiled = step.lower(w).compile()
running = compiled(w)
print("end")
"""
    assert ends(code) == "end\n"


def test_a_call_under_way_when_python_ends_is_waited_for() -> None:
    code = """
import threading, time
import jax, jax.numpy as jnp, nhwconv as nc, nhwconv.jax
entered = threading.Event()
forward = nc.ops.conv2d
def slow(x, *more, **options):
    if len(x):
        entered.set()
        time.sleep(0.5)
    forward(x, *more, **options)
    if len(x):
        print("called", flush=True)
step = jax.jit(nhwconv.jax.conv2d).lower(x := jnp.ones((1, 5, 5, 3)), w := jnp.ones((4, 3, 3, 3))).compile()
nc.ops.conv2d = slow
threading.Thread(target=step, args=(x, w), daemon=True).start()
entered.wait()
print("end", flush=True)
"""
    assert ends(code) == "end\ncalled\n"


def test_calls_after_the_end_of_python_are_errors() -> None:
    code = """
import atexit, jax, jax.numpy as jnp
def late():
    try:
        nhwconv.jax.conv2d(x, w).block_until_ready()
    except (ValueError, RuntimeError) as error:
        print("Python has ended" in str(error))
atexit.register(late)
import nhwconv.jax
x, w = jnp.ones((1, 5, 5, 3)), jnp.ones((4, 3, 3, 3))
nhwconv.jax.conv2d(x, w).block_until_ready()
"""
    assert ends(code) == "True\n"


def test_a_forked_child_ends_though_its_parent_was_in_a_call() -> None:
    code = """
import atexit, os, signal, threading, warnings
import jax, jax.numpy as jnp, nhwconv as nc, nhwconv.jax
entered, leave = threading.Event(), threading.Event()
forward = nc.ops.conv2d
def slow(x, *more, **options):
    if len(x):
        entered.set()
        leave.wait()
    return forward(x, *more, **options)
nc.ops.conv2d = slow
x, w = jnp.ones((1, 5, 5, 3)), jnp.ones((4, 3, 3, 3))
thread = threading.Thread(target=lambda: nhwconv.jax.conv2d(x, w).block_until_ready())
thread.start()
entered.wait()
warnings.simplefilter("ignore")  # of fork beside threads
child = os.fork()
if child:
    print(os.waitpid(child, 0)[1])
    leave.set()
    thread.join()
else:
    signal.alarm(60)
    atexit._run_exitfuncs()
    os._exit(0)
"""
    assert ends(code) == "0\n"


def test_two_threads_loop() -> None:
    code = """
import threading, jax, jax.numpy as jnp
from nhwconv.jax import conv1d, conv2d, conv_transpose1d, conv_transpose2d
x, w = jnp.ones((4, 128, 128, 16)), jnp.ones((16, 3, 3, 16)) / 144
step = jax.jit(conv2d)
ended = []
def loop():
    for _ in range(30):
        assert abs(float(step(x, w)[3, -1, -1, -1]) - 1) < 1e-5
    ended.append(True)
threads = [threading.Thread(target=loop) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(ended)
"""
    assert ends(code) == "[True, True]\n"


def test_two_devices() -> None:
    code = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from nhwconv.jax import conv1d, conv2d, conv_transpose1d, conv_transpose2d
x, w = jnp.ones((16, 64, 64, 16)), jnp.ones((16, 3, 3, 16)) / 144
mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
conv = jax.shard_map(conv2d, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"))
step = jax.jit(jax.grad(lambda w: jnp.sin(conv(jnp.sin(conv(x, w)), w)).sum()))
for _ in range(20):
    dw = step(w)
mapped = jax.pmap(conv2d, in_axes=(0, None))
for _ in range(20):
    y = mapped(x.reshape(2, 8, 64, 64, 16), w)
print(bool(jnp.isfinite(dw).all()), abs(float(y.mean()) - 1) < 1e-5)
"""
    assert ends(code, 2) == "True True\n"


def test_large_arrays_on_one_core_do_not_wait_for_themselves() -> None:
    code = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import jax, jax.numpy as jnp
from nhwconv.jax import conv1d, conv2d, conv_transpose1d, conv_transpose2d
x, w = jnp.ones((16, 128, 128, 16)), jnp.ones((16, 3, 3, 16)) / 144  # 16 MiB
@jax.jit
def step(w):
    loss = lambda w: conv2d(jnp.sin(conv2d(x, w, padding=1)), w, padding=1).mean()
    return w - jax.grad(loss)(w)
for _ in range(10):
    w = step(w)
print(bool(jnp.isfinite(w).all()))
"""
    assert ends(code) == "True\n"


# ----------------------------------------------------------------------------------------- many devices

SETTING = """
import itertools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from nhwconv.jax import conv1d, conv2d, conv_transpose1d, conv_transpose2d

def own(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "OHWI", "NHWC"))

def put(array, mesh, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))
"""


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_shard_map_knows_what_varies(kind: str) -> None:
    """Each device has one sample, 1 and 2, and the weight is 5. The weight's gradient is the samples' sum."""
    code = f"""{SETTING}
mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.{kind},))
x, w = put(jnp.array([1.0, 2.0]).reshape(2, 1, 1, 1), mesh, "i"), put(jnp.full((1, 1, 1, 1), 5.0), mesh)
specs = P("i"), P()

def results(conv, wrap):
    loss = lambda x, w: conv(x, w).sum()
    whole = jax.shard_map(conv, in_specs=specs, out_specs=P("i"))
    yield wrap(whole)(x, w)
    yield wrap(jax.grad(lambda w: whole(x, w).sum()))(w)
    yield wrap(jax.grad(lambda x: whole(x, w).sum()))(x)
    yield wrap(jax.shard_map(jax.grad(loss, 1), in_specs=specs, out_specs=P()))(x, w)
    yield wrap(jax.shard_map(jax.grad(loss, 0), in_specs=specs, out_specs=P("i")))(x, w)
    tangent = lambda x, w: jax.jvp(conv, (x, w), (x, w))[1]
    yield wrap(jax.shard_map(tangent, in_specs=specs, out_specs=P("i")))(x, w)

with jax.set_mesh(mesh):
    for conv, wrap in itertools.product((own, conv2d), (jax.jit, lambda function: function)):
        print("; ".join(" ".join(map(str, np.ravel(found))) for found in results(conv, wrap)), end="; ")
        try:
            wrap(jax.shard_map(conv, in_specs=specs, out_specs=P()))(x, w)
        except ValueError as error:
            print("can't be statically inferred" in str(error))
"""
    assert ends(code, 2) == 4 * "5.0 10.0; 3.0; 5.0 5.0; 3.0; 5.0 5.0; 10.0 20.0; True\n"


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_samples_stay_where_they_are(kind: str) -> None:
    code = f"""{SETTING}
mesh = jax.make_mesh((2, 2), ("i", "j"), axis_types=(AxisType.{kind},) * 2)
draw = np.random.default_rng(0)
x, w = draw.standard_normal((8, 7, 6, 3)), draw.standard_normal((4, 3, 3, 3))

def step(conv, x, w):
    return conv(x, w), jax.grad(lambda x, w: jnp.sin(conv(x, w)).sum(), (0, 1))(x, w)

with jax.enable_x64(True), jax.set_mesh(mesh):
    for spec in ("i", ("i", "j")):
        sharded = put(x, mesh, spec), put(w, mesh)
        compiled = jax.jit(lambda x, w: step(conv2d, x, w)).lower(*sharded).compile()
        y, (dx, dw) = compiled(*sharded)
        for a, b in zip(jax.tree.leaves((y, dx, dw)), jax.tree.leaves(step(own, x, w))):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
        assert y.sharding.spec[0] == dx.sharding.spec[0] == spec
        assert dw.sharding.is_fully_replicated
        print("all-gather" in compiled.as_text(), "all-reduce" in compiled.as_text())
"""
    assert ends(code, 4) == 2 * "False True\n"


def test_what_else_is_sharded_is_gathered() -> None:
    """Rows, channels, weights, and samples that the devices do not divide."""
    code = f"""{SETTING}
mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
draw = np.random.default_rng(0)
x, w = draw.standard_normal((8, 6, 6, 4)), draw.standard_normal((4, 3, 3, 4))
with jax.enable_x64(True):
    for take, xs, ws in ((8, (None, "i"), ()), (8, (None, None, None, "i"), ("i",)), (7, ("i",), ("i",))):
        found, expected = (
            jax.jit(jax.value_and_grad(lambda x, w: jnp.sin(conv(x[:take], w)).sum(), (0, 1)))(*arrays)
            for conv, arrays in ((conv2d, (put(x, mesh, *xs), put(w, mesh, *ws))), (own, (x, w)))
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
print("end")
"""
    assert ends(code, 2) == "end\n"


def test_what_is_not_possible_on_many_devices_is_said() -> None:
    code = f"""{SETTING}
x, w = jnp.ones((4, 6, 6, 4)), jnp.ones((4, 3, 3, 4))
mesh = jax.make_mesh((2, 2), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
partly = jax.shard_map(conv2d, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"), axis_names={{"i"}})
try:
    jax.jit(partly)(x, w)
except NotImplementedError as error:
    print(error)
mesh = jax.make_mesh((2, 2), ("i", "j"), axis_types=(AxisType.Explicit,) * 2)
try:
    conv2d(put(x, mesh, None, "i"), put(w, mesh))
except ValueError as error:
    print(error)
"""
    partly, rows = ends(code, 4).splitlines()
    assert partly.startswith("conv2d within shard_map needs all axes of the mesh to be manual")
    assert rows.startswith("conv2d: an array is sharded as P(None, 'i'")


def test_the_page_of_jax_runs() -> None:
    page = (ROOT / "docs" / "jax.md").read_text("utf-8")
    blocks = re.findall(r"^```python jax\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 3
    child.run("\n".join(blocks))
