"""The JAX adapter: against JAX's own convolution, under jit, grad and vmap, and never waiting for itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import child
import nhwconv as nc
import nhwconv.jax
from cases import Case, Data, draw_data
from nhwconv.jax import conv2d

CASES = [
    Case(n=2, h=5, w=6, c=4, d=6, kh=3, kw=2, stride=(1, 2), padding=((1, 0), (2, 1)), groups=2),
    Case(n=2, h=6, w=5, c=3, d=2, dilation=(2, 1), padding=((1, 1), (0, 0))),
    Case(n=1, h=5, w=5, c=4, d=8, groups=4, stride=(2, 1)),
]


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


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients_are_jaxs(case: Case, jit: bool) -> None:
    x, w, b, dy = arrays(case)

    def ours(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return (jnp.sin(conv2d(x, w, b, **case.options)) * dy).sum()

    def theirs(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return (jnp.sin(own(x, w, b, case)) * dy).sum()

    wrap = jax.jit if jit else lambda f: f
    close(wrap(lambda x, w, b: conv2d(x, w, b, **case.options))(x, w, b), own(x, w, b, case))
    found, expected = (wrap(jax.value_and_grad(f, argnums=(0, 1, 2)))(x, w, b) for f in (ours, theirs))
    close(found, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_check_grads_to_second_order(case: Case) -> None:
    x, w, b, _ = arrays(case)
    check_grads(lambda x, w, b: jnp.sin(conv2d(x, w, b, **case.options)), (x, w, b), order=2, modes=["rev"])


@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0), (1, 3)], ids=str)
@pytest.mark.parametrize("jit", [False, True])
def test_vmap(mapped: tuple[int | None, int | None], jit: bool) -> None:
    case = CASES[0]
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


def test_one_set_of_weights_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = nc.ops.conv2d

    def watched(x: np.ndarray, *more: Any, **options: Any) -> np.ndarray:
        calls.append(x.shape[0])
        return forward(x, *more, **options)

    monkeypatch.setattr(nc.ops, "conv2d", watched)
    x, w = jnp.ones((3, 4, 2, 5, 5, 1)), jnp.ones((1, 3, 3, 1))
    y = jax.vmap(jax.vmap(lambda x: conv2d(x, w)))(x)
    assert y.shape == (3, 4, 2, 3, 3, 1)
    assert [n for n in calls if n] == [24]


def test_only_what_is_needed_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("conv2d_input_grad", "conv2d_weight_grad"):
        function = getattr(nc.ops, name)
        monkeypatch.setattr(
            nc.ops, name, lambda *a, _name=name, _f=function, **k: (calls.append(_name), _f(*a, **k))[1]
        )
    x, w, _, _ = arrays(CASES[0])
    for argnums, expected in ((0, ["conv2d_input_grad"]), (1, ["conv2d_weight_grad"])):
        jax.grad(lambda x, w: conv2d(x, w, **CASES[0].options).sum(), argnums)(x, w).block_until_ready()
        assert calls == expected
        calls.clear()


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


def test_large_arrays_on_one_core_do_not_wait_for_themselves() -> None:
    code = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import jax, jax.numpy as jnp
from nhwconv.jax import conv2d
x, w = jnp.ones((16, 128, 128, 16)), jnp.ones((16, 3, 3, 16)) / 144  # 16 MiB
@jax.jit
def step(w):
    loss = lambda w: conv2d(jnp.sin(conv2d(x, w, padding=1)), w, padding=1).mean()
    return w - jax.grad(loss)(w)
for _ in range(10):
    w = step(w)
print(bool(jnp.isfinite(w).all()))
"""
    assert child.run(code) == "True\n"
