"""JAX: `conv2d` as in `nhwconv`, NHWC and OHWI, under `jit`, `grad` and `vmap`, on the CPU.

JAX calls back into Python (`jax.pure_callback`) with arrays on the host. Within a callback no operation of JAX may run:
it could wait for threads that wait for the callback. So the callbacks see NumPy arrays and return such.

XLA's foreign function interface would copy nothing and be twice as fast, and with `ctypes` it needs no compiler. But
JAX does not wait for its calls when Python ends: one that is under way then waits for the interpreter, which waits for
it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.custom_derivatives import SymbolicZero

from . import ops
from .checks import no_samples, stand_in
from .ops import Padding, Size, StrategyName

__all__ = ["conv2d"]

Array = npt.NDArray[Any]


class _Options(NamedTuple):
    """What `nhwconv.conv2d` takes besides arrays; hashable, as JAX wants it."""

    stride: Any
    padding: Any
    dilation: Any
    groups: Any
    strategy: Any


def conv2d(
    x: npt.ArrayLike | jax.Array,
    w: npt.ArrayLike | jax.Array,
    b: npt.ArrayLike | jax.Array | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
) -> jax.Array:
    """Convolve a batch of NHWC images with D kernels and add a bias, as a JAX operation with a gradient.

    Differentiable in reverse mode, any number of times. Under `vmap` over x, the batches become one batch; over
    weights, there is one call after another.

    Parameters
    ----------
    x : array_like
        Images ``(N, H, W, C)``.
    w : array_like
        Kernels ``(D, KH, KW, C/groups)``.
    b : array_like, optional
        Bias ``(D,)``.
    stride, padding, dilation, groups, strategy
        As in `nhwconv.conv2d`; static under `jit`.

    Returns
    -------
    jax.Array
        ``(N, OH, OW, D)``.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv2d`, while JAX traces.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, nhwconv.jax
    >>> x, w = jnp.ones((8, 28, 28, 3)), jnp.ones((16, 3, 3, 3))
    >>> nhwconv.jax.conv2d(x, w).shape
    (8, 26, 26, 16)
    >>> jax.grad(lambda w: nhwconv.jax.conv2d(x, w).sum())(w).shape
    (16, 3, 3, 3)
    """
    x, w = jnp.asarray(x), jnp.asarray(w)
    b = None if b is None else jnp.asarray(b)
    if x.ndim != 4 or w.ndim != 4:
        raise ValueError(f"conv2d: x has shape {x.shape} and w {w.shape}, expected (N, H, W, C) and (D, KH, KW, C)")
    options = _Options(stride, padding, dilation, groups, strategy)
    like = ops.conv2d(no_samples(x), stand_in(w), None if b is None else stand_in(b), **options._asdict())
    y = _forward(options, x.astype(like.dtype), w.astype(like.dtype))
    return y if b is None else y + b.astype(like.dtype)


# ------------------------------------------------------------------------------------------- derivatives
# The three passes are linear in each of their two arguments, and the gradients of each are the other two. So all orders
# of derivatives come from three rules. What is not differentiated is None among what a rule keeps, and costs nothing.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(options: _Options, x: jax.Array, w: jax.Array) -> jax.Array:
    y = ops.conv2d(no_samples(x), stand_in(w), **options._asdict())
    return _call(ops.conv2d, (x.shape[0], *y.shape[1:]), x, w, **options._asdict())


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _input_grad(options: _Options, size: tuple[int, int], dy: jax.Array, w: jax.Array) -> jax.Array:
    shape = dy.shape[0], *size, w.shape[3] * options.groups
    return _call(ops.conv2d_input_grad, shape, dy, w, input_size=size, **options._asdict())


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weight_grad(options: _Options, size: tuple[int, int], x: jax.Array, dy: jax.Array) -> jax.Array:
    shape = dy.shape[3], *size, x.shape[3] // options.groups
    return _call(ops.conv2d_weight_grad, shape, x, dy, kernel_size=size, **options._asdict())


def _rule(
    function: Any,
    to_first: Callable[..., jax.Array],
    to_second: Callable[..., jax.Array],
) -> None:
    """Define the gradients of ``function(*static, first, second)``.

    They are ``to_first(static, shape of first, cotangent, second)`` and ``to_second(static, shape of second, cotangent,
    first)``.
    """

    def forward(*arguments: Any) -> tuple[jax.Array, Any]:
        *static, first, second = arguments
        kept = (second.value if first.perturbed else None), (first.value if second.perturbed else None)
        shapes = _Shapes(first.value.shape, second.value.shape)
        return function(*static, first.value, second.value), (*kept, shapes)

    def backward(*arguments: Any) -> tuple[jax.Array | None, jax.Array | None]:
        *static, (second, first, shapes), dy = arguments
        if isinstance(dy, SymbolicZero):
            return None, None
        return (
            None if second is None else to_first(static[0], shapes.first, dy, second),
            None if first is None else to_second(static[0], shapes.second, dy, first),
        )

    function.defvjp(forward, backward, symbolic_zeros=True)


@jax.tree_util.register_static
class _Shapes(NamedTuple):
    first: tuple[int, ...]
    second: tuple[int, ...]


_rule(
    _forward,
    lambda options, shape, dy, w: _input_grad(options, shape[1:3], dy, w),
    lambda options, shape, dy, x: _weight_grad(options, shape[1:3], x, dy),
)
_rule(  # of dy and w; the cotangent has x's shape
    _input_grad,
    lambda options, shape, dx, w: _forward(options, dx, w),
    lambda options, shape, dx, dy: _weight_grad(options, shape[1:3], dx, dy),
)
_rule(  # of x and dy; the cotangent has w's shape
    _weight_grad,
    lambda options, shape, dw, dy: _input_grad(options, shape[1:3], dy, dw),
    lambda options, shape, dw, x: _forward(options, x, dw),
)


# ------------------------------------------------------------------------------------------------ calls


def _call(
    function: Callable[..., Array], shape: tuple[int, ...], first: jax.Array, second: jax.Array, **options: Any
) -> jax.Array:
    """Call a function of nhwconv from within JAX's program."""
    result = jax.ShapeDtypeStruct(shape, first.dtype)
    callback = partial(_on_host, function, shape, options)
    # Under vmap, arrays get axes in front, of length 1 where they are not mapped.
    called: jax.Array = jax.pure_callback(callback, result, first, second, vmap_method="expand_dims")
    return called


def _on_host(function: Callable[..., Array], shape: tuple[int, ...], options: dict[str, Any], *arguments: Any) -> Array:
    first, second = (np.asarray(argument) for argument in arguments)
    mapped = np.broadcast_shapes(first.shape[:-4], second.shape[:-4])
    if not mapped:
        return function(first, second, **options)
    shared = all(length == 1 for length in second.shape[:-4])
    if function is not ops.conv2d_weight_grad and shared and first.shape[:-4] == mapped:
        # One set of weights for all: the mapped axes are more samples.
        merged = function(first.reshape(-1, *first.shape[-3:]), second.reshape(second.shape[-4:]), **options)
        return merged.reshape(*mapped, *shape)
    results = np.empty((*mapped, *shape), first.dtype)
    first, second = (np.broadcast_to(a, (*mapped, *a.shape[-4:])) for a in (first, second))
    for index in np.ndindex(mapped):
        function(first[index], second[index], **options, out=results[index])
    return results
