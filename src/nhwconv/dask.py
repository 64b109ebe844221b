"""Dask: `conv2d` and `conv2d_backward` on arrays chunked over samples, for data beyond one machine or its memory.

Samples are independent of each other in the output and in the input's gradient, so blocks map. The gradients of
weights and bias are sums over samples: each block gives a part, and the parts are added in a tree.

Dask's workers are the parallelism: a block is computed with one thread of Numba's, so that workers don't fight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import Delayed, delayed

from . import checks, ops
from .checks import no_samples, stand_in, words_of
from .ops import Gradients, Padding, Size, StrategyName
from .runtime import machine

__all__ = ["conv2d", "conv2d_backward"]

Array = npt.NDArray[Any]


@words_of("conv2d")
def conv2d(
    x: da.Array,
    w: npt.ArrayLike | da.Array,
    b: npt.ArrayLike | da.Array | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
) -> da.Array:
    """Convolve a batch of NHWC images with D kernels and add a bias, block by block.

    Parameters
    ----------
    x : dask.array.Array
        Images ``(N, H, W, C)``, chunked over N alone, in chunks whose sizes may be unknown.
    w : array_like or dask.array.Array
        Kernels ``(D, KH, KW, C/groups)``; every worker gets all of them.
    b : array_like or dask.array.Array, optional
        Bias ``(D,)``.
    stride, padding, dilation, groups, strategy
        As in `nhwconv.conv2d`.

    Returns
    -------
    dask.array.Array
        ``(N, OH, OW, D)``, chunked as x is.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv2d`, now rather than in a worker; and ValueError where x is chunked over another axis.

    Examples
    --------
    >>> import dask.array as da, numpy as np, nhwconv.dask
    >>> x = da.ones((64, 28, 28, 3), chunks=(16, -1, -1, -1), dtype=np.float32)
    >>> y = nhwconv.dask.conv2d(x, np.ones((16, 3, 3, 3), np.float32))
    >>> y.shape, y.numblocks
    ((64, 26, 26, 16), (4, 1, 1, 1))
    """
    options: dict[str, Any] = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "strategy": strategy,
    }  # fmt: skip
    w, b = _whole("w", w), None if b is None else _whole("b", b)
    _check_chunks("x", x)
    y = ops.conv2d(no_samples(x), stand_in(w), None if b is None else stand_in(b), **options)
    return _map(ops.conv2d, x, shape=y.shape[1:], dtype=y.dtype, whole=(w,) if b is None else (w, b), **options)


@words_of("conv2d_backward")
def conv2d_backward(
    x: da.Array,
    w: npt.ArrayLike | da.Array,
    dy: da.Array,
    *,
    needs: Iterable[str] = ("dx", "dw", "db"),
    stride: Size = 1,
    padding: Padding = 0,
    dilation: Size = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
) -> Gradients:
    """Return the gradients of a convolution's input, weights and bias, as Dask arrays that are not computed yet.

    Compute what you need of them together, ``dask.compute(*gradients)``, so that Dask reads x and dy once.

    Parameters
    ----------
    x : dask.array.Array
        Images ``(N, H, W, C)``, chunked over N alone, in chunks whose sizes may be unknown.
    w : array_like or dask.array.Array
        Kernels ``(D, KH, KW, C/groups)``.
    dy : dask.array.Array
        Gradient of the output ``(N, OH, OW, D)``; rechunked where its chunks are not x's. Where sizes of either's
        chunks are unknown, both need as many chunks; two that differ are an error of the task that reads both.
    needs : iterable of {"dx", "dw", "db"}
        Which gradients to return.
    stride, padding, dilation, groups, strategy
        As in `nhwconv.conv2d`.

    Returns
    -------
    Gradients
        ``(dx, dw, db)``: dx chunked as x is, dw and db in one chunk; None where not needed. Parts of dw and db are
        added in float32 at least, each rounded to the arrays' dtype; their last bits depend on the chunks, as those
        of dx do where a strategy is chosen for each chunk.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv2d_backward`, now rather than in a worker; and ValueError where x is chunked over
        another axis.

    Examples
    --------
    >>> import dask.array as da, numpy as np, nhwconv.dask
    >>> x = da.ones((64, 28, 28, 3), chunks=(16, -1, -1, -1))
    >>> w, dy = np.ones((16, 3, 3, 3)), da.ones((64, 26, 26, 16), chunks=(16, -1, -1, -1))
    >>> dx, dw, db = nhwconv.dask.conv2d_backward(x, w, dy)
    >>> float(db.sum().compute()) == dy.size
    True
    """
    options: dict[str, Any] = {
        "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "strategy": strategy,
    }  # fmt: skip
    w, needs = _whole("w", w), (needs,) if isinstance(needs, str) else tuple(needs)
    _check_chunks("x", x)
    _check_array("dy", dy)
    checked = ops.conv2d_backward(no_samples(x), stand_in(w), no_samples(dy), needs=needs, **options)
    dy = _chunked_like(dy, x)
    dx = dw = db = None
    if checked.dx is not None:
        more = {"input_size": x.shape[1:3], **options}
        dx = _map(ops.conv2d_input_grad, dy, shape=x.shape[1:], dtype=checked.dx.dtype, whole=(w,), **more)
    if checked.dw is not None:
        more = {"kernel_size": w.shape[1:3], **options}
        dw = _sum(ops.conv2d_weight_grad, x, dy, shape=w.shape, dtype=checked.dw.dtype, **more)
    if checked.db is not None:
        db = _sum(ops.conv2d_bias_grad, dy, shape=w.shape[:1], dtype=checked.db.dtype)
    return Gradients(dx, dw, db)


# --------------------------------------------------------------------------------------------- arguments


def _check_array(name: str, array: Any) -> None:
    if not isinstance(array, da.Array):
        checks.fail(f"{name} is of type {type(array).__name__}, expected a dask.array.Array", TypeError)
    if array.ndim != 4:
        checks.fail(f"{name} has shape {array.shape}, expected four axes, samples first")


def _check_chunks(name: str, array: Any) -> None:
    _check_array(name, array)
    if array.numblocks[1:] != (1, 1, 1):
        checks.fail(
            f"{name} has {array.numblocks} blocks, expected all of them along the first axis; "
            f"use {name}.rechunk(('auto', -1, -1, -1))",
        )


def _whole(name: str, value: Any) -> Any:
    """Return weights or a bias as an array of either kind, in one piece."""
    return value.rechunk(-1) if isinstance(value, da.Array) else checks.as_input(name, value)


def _chunked_like(dy: da.Array, x: da.Array) -> da.Array:
    """Return dy in chunks of as many samples as x's have; sizes that are not known yet are taken to be."""
    if not np.isnan([dy.shape[0], x.shape[0]]).any():
        if dy.shape[0] != x.shape[0]:
            checks.fail(f"dy has {dy.shape[0]} samples, but x has {x.shape[0]}")
        return dy.rechunk((x.chunks[0], -1, -1, -1))
    if dy.numblocks[0] != x.numblocks[0]:
        checks.fail(
            f"dy has {dy.numblocks[0]} chunks of samples, but x has {x.numblocks[0]}, and not all of their sizes are "
            "known, so they cannot be matched; use compute_chunk_sizes()",
        )
    dy = dy.rechunk({1: -1, 2: -1, 3: -1})
    # Said to be of one size, or Dask would not put the blocks of the two side by side.
    return da.Array(dy.dask, dy.name, (x.chunks[0], *dy.chunks[1:]), meta=dy)


# ------------------------------------------------------------------------------------------------ graphs


def _map(
    function: Callable[..., Array], x: da.Array, *, shape: tuple[int, ...], dtype: np.dtype[Any],
    whole: tuple[Any, ...], **options: Any,
) -> da.Array:  # fmt: skip
    """Apply a function to each block of samples; the arrays in `whole` go to all of them."""
    chunks = (x.chunks[0], *((size,) for size in shape))
    whole = tuple(_in_one_task(array) for array in whole)
    return x.map_blocks(_block, function=function, whole=whole, chunks=chunks, meta=_meta(4, dtype), **options)


def _sum(
    function: Callable[..., Array], *arrays: da.Array, shape: tuple[int, ...], dtype: np.dtype[Any], **options: Any
) -> da.Array:
    """Add up a function's results for all blocks of samples, in a tree."""
    chunks = ((1,) * arrays[0].numblocks[0], *((size,) for size in shape))
    # Each part gets an axis in front, along which the parts are the blocks of an array.
    axes = {"new_axis": [4]} if len(shape) == 4 else {"drop_axis": [2, 3]}
    meta = _meta(1 + len(shape), dtype)
    parts = da.map_blocks(_part, *arrays, function=function, chunks=chunks, meta=meta, **axes, **options)
    return parts.sum(0, dtype=np.promote_types(dtype, np.float32), split_every=4).astype(dtype)


def _in_one_task(array: Array | da.Array) -> Delayed:
    return array.to_delayed().item() if isinstance(array, da.Array) else delayed(array)


def _meta(ndim: int, dtype: np.dtype[Any]) -> Array:
    return np.empty((0,) * ndim, dtype)


def _block(*blocks: Array, function: Callable[..., Array], whole: tuple[Array, ...] = (), **options: Any) -> Array:
    """Call a function of nhwconv in a worker, with one thread."""
    with machine.at_most_threads(1):
        return function(*blocks, *whole, **options)


def _part(*blocks: Array, **options: Any) -> Array:
    return _block(*blocks, **options)[None]
