"""JAX's own cases for `lax.conv_general_dilated`: values, and gradients in both arguments."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nhwconv.jax

jax.config.update("jax_enable_x64", True)

from jax._src.internal_test_util.test_harnesses import all_harnesses  # noqa: E402 - its cases depend on the setting

HARNESSES = [
    harness
    for harness in all_harnesses
    if harness.group_name == "conv_general_dilated" and harness.params["enable_xla"]
]
#: How a case that asks for something else fails: an error, or a result of another type.
_REFUSALS = TypeError, ValueError, AssertionError, NotImplementedError


def why_not(harness: Any) -> str | None:
    """Return why a case asks for something else, or None."""
    params, dtype = harness.params, harness.dtype
    if len(params["lhs_shape"]) not in (3, 4):
        return "three dimensions"
    if dtype not in (np.float16, np.float32, np.float64, jnp.bfloat16):
        return "no floats"
    if params["batch_group_count"] != 1:
        return "groups of the batch, which lax has for gradients"
    wanted = params["preferred_element_type"]
    if wanted not in (None, dtype):
        return "a wider result"
    empty = any(name in harness.fullname for name in ("_rhs_oob_lhs", "_rhs_oob_after_dilation"))
    return "results without pixels, which conv2d refuses" if empty else None


def _cases() -> list[Any]:
    seen: Counter[str] = Counter()
    found = []
    for harness in HARNESSES:
        reason = why_not(harness)
        seen[harness.fullname] += 1
        name = f"{harness.fullname}-{seen[harness.fullname]}"
        marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=True, raises=_REFUSALS)]
        found.append(pytest.param(harness, id=name, marks=marks))
    return found


def ours(params: dict[str, Any], x: Any, w: Any) -> Any:
    """Do what lax does, with `nhwconv.jax.conv2d`."""
    count = x.ndim - 2
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, params["dimension_numbers"])
    x = x.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
    w = w.transpose(numbers.rhs_spec[0], *numbers.rhs_spec[2:], numbers.rhs_spec[1])
    strides, dilation = params["window_strides"], params["rhs_dilation"] or (1,) * count
    apart, padding = params["lhs_dilation"] or (1,) * count, params["padding"]
    if isinstance(padding, str):
        sizes = [(size - 1) * more + 1 for size, more in zip(x.shape[1:-1], apart, strict=True)]
        kernel = [(size - 1) * more + 1 for size, more in zip(w.shape[1:-1], dilation, strict=True)]
        padding = lax.padtype_to_pads(sizes, kernel, strides, padding)
    zero = jnp.zeros((), x.dtype)
    # Zeros between pixels, and negative padding, are lax's own.
    inner = [(min(a, 0), min(b, 0), more - 1) for (a, b), more in zip(padding, apart, strict=True)]
    x = lax.pad(x, zero, [(0, 0, 0), *inner, (0, 0, 0)])
    pads = [(max(a, 0), max(b, 0)) for a, b in padding]
    if count == 1:
        x, w, strides, dilation, pads = x[:, None], w[:, None], (1, *strides), (1, *dilation), [(0, 0), *pads]
    y = nhwconv.jax.conv2d(x, w, stride=tuple(strides), padding=tuple(pads), dilation=tuple(dilation),
                           groups=params["feature_group_count"])  # fmt: skip
    y = y[:, 0] if count == 1 else y
    places = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    return y.transpose(np.argsort(places))


@pytest.mark.parametrize("harness", _cases())
def test_harness(harness: Any) -> None:
    x, w = map(jnp.asarray, harness.dyn_args_maker(np.random.RandomState(0)))
    expected, pull = jax.vjp(harness.dyn_fun, x, w)
    got, our_pull = jax.vjp(lambda x, w: ours(harness.params, x, w), x, w)
    dy = jnp.asarray(np.linspace(-1, 1, expected.size).reshape(expected.shape), expected.dtype)
    terms = math.prod(w.shape) * math.prod(expected.shape[-2:])
    for one, other in zip((got, *our_pull(dy)), (expected, *pull(dy)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        limit = 8 * float(jnp.finfo(x.dtype).eps) * terms**0.5 * max(np.abs(other).max(initial=0), 1)
        np.testing.assert_allclose(one, other, rtol=0, atol=limit)
