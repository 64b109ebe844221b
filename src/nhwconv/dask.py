"""Dask: the convolutions and their gradients on arrays chunked over samples, for data beyond one machine or its memory.

Samples are independent of each other in the output and in the input's gradient, so blocks map. The gradients of
weights and bias are sums over samples: each block gives a part, and the parts are added in a tree. All of it is made of
two functions of nhwconv's, the one called and its backward one, for every convolution alike.

Dask's workers are the parallelism: a block is computed with one thread of Numba's, so that workers don't fight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.delayed import Delayed, delayed

from . import checks, one_dimension, ops, transposed
from .checks import no_samples, stand_in, words_of
from .ops import Gradients, Padding, Size, StrategyName
from .runtime import machine

__all__ = [
    "conv1d",
    "conv1d_backward",
    "conv2d",
    "conv2d_backward",
    "conv_transpose1d",
    "conv_transpose1d_backward",
    "conv_transpose2d",
    "conv_transpose2d_backward",
]

Array = npt.NDArray[Any]
Weights: TypeAlias = npt.ArrayLike | da.Array


def conv2d(
    x: da.Array,
    w: Weights,
    b: Weights | None = None,
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
        Those of `nhwconv.conv2d`, now rather than in a worker; and ValueError where x is chunked over
        another axis.

    Examples
    --------
    >>> import dask.array as da, numpy as np, nhwconv.dask
    >>> x = da.ones((64, 28, 28, 3), chunks=(16, -1, -1, -1), dtype=np.float32)
    >>> y = nhwconv.dask.conv2d(x, np.ones((16, 3, 3, 3), np.float32))
    >>> y.shape, y.numblocks
    ((64, 26, 26, 16), (4, 1, 1, 1))
    """
    return _forward(
        ops.conv2d, x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups,
        strategy=strategy,
    )  # fmt: skip


def conv2d_backward(
    x: da.Array,
    w: Weights,
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
        Those of `nhwconv.conv2d_backward`, now rather than in a worker; and ValueError where x is chunked
        over another axis.

    Examples
    --------
    >>> import dask.array as da, numpy as np, nhwconv.dask
    >>> x = da.ones((64, 28, 28, 3), chunks=(16, -1, -1, -1))
    >>> w, dy = np.ones((16, 3, 3, 3)), da.ones((64, 26, 26, 16), chunks=(16, -1, -1, -1))
    >>> dx, dw, db = nhwconv.dask.conv2d_backward(x, w, dy)
    >>> float(db.sum().compute()) == dy.size
    True
    """
    return _backward(
        ops.conv2d_backward, x, w, dy, needs, stride=stride, padding=padding, dilation=dilation,
        groups=groups, strategy=strategy,
    )  # fmt: skip


def conv_transpose2d(
    x: da.Array,
    w: Weights,
    b: Weights | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    output_padding: Size | None = None,
    dilation: Size = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
) -> da.Array:
    """Convolve a batch of images by the transpose of a convolution and add a bias, block by block.

    Parameters
    ----------
    x : dask.array.Array
        Images ``(N, H, W, C)``, chunked over N alone, in chunks whose sizes may be unknown.
    w : array_like or dask.array.Array
        Kernels ``(C, KH, KW, D/groups)``; every worker gets all of them.
    b : array_like or dask.array.Array, optional
        Bias ``(D,)``.
    stride, padding, output_padding, dilation, groups, strategy
        As in `nhwconv.conv_transpose2d`.

    Returns
    -------
    dask.array.Array
        ``(N, OH, OW, D)``, chunked as x is.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv_transpose2d`, now rather than in a worker; and ValueError where x is chunked over
        another axis.

    Examples
    --------
    >>> import dask.array as da, numpy as np, nhwconv.dask
    >>> x = da.ones((64, 14, 14, 32), chunks=(16, -1, -1, -1))
    >>> nhwconv.dask.conv_transpose2d(x, np.ones((32, 2, 2, 16)), stride=2).shape
    (64, 28, 28, 16)
    """
    return _forward(
        transposed.conv_transpose2d, x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups,
        strategy=strategy, output_padding=output_padding,
    )  # fmt: skip


def conv_transpose2d_backward(
    x: da.Array,
    w: Weights,
    dy: da.Array,
    *,
    needs: Iterable[str] = ("dx", "dw", "db"),
    stride: Size = 1,
    padding: Padding = 0,
    output_padding: Size | None = None,
    dilation: Size = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
) -> Gradients:
    """Return the gradients of a transposed convolution's input, weights and bias, not computed yet.

    Parameters
    ----------
    x : dask.array.Array
        Images ``(N, H, W, C)``, chunked over N alone, in chunks whose sizes may be unknown.
    w : array_like or dask.array.Array
        Kernels ``(C, KH, KW, D/groups)``.
    dy : dask.array.Array
        Gradient of the output ``(N, OH, OW, D)``, chunked as in `conv2d_backward`.
    needs : iterable of {"dx", "dw", "db"}
        Which gradients to return.
    stride, padding, output_padding, dilation, groups, strategy
        As in `nhwconv.conv_transpose2d`.

    Returns
    -------
    Gradients
        ``(dx, dw, db)``, as from `conv2d_backward`.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv_transpose2d_backward`, now rather than in a worker; and ValueError where x is chunked
        over another axis.

    Examples
    --------
    >>> import dask.array as da, numpy as np, nhwconv.dask
    >>> x, w = da.ones((64, 14, 14, 32), chunks=(16, -1, -1, -1)), np.ones((32, 2, 2, 16))
    >>> y = nhwconv.dask.conv_transpose2d(x, w, stride=2)
    >>> [g.shape for g in nhwconv.dask.conv_transpose2d_backward(x, w, y, stride=2)]
    [(64, 14, 14, 32), (32, 2, 2, 16), (16,)]
    """
    return _backward(
        transposed.conv_transpose2d_backward, x, w, dy, needs, stride=stride, padding=padding, dilation=dilation,
        groups=groups, strategy=strategy, output_padding=output_padding,
    )  # fmt: skip


def conv1d(
    x: da.Array,
    w: Weights,
    b: Weights | None = None,
    *,
    stride: int = 1,
    padding: one_dimension.Padding = 0,
    dilation: int = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
) -> da.Array:
    """Convolve a batch of sequences with D kernels and add a bias, block by block.

    Parameters
    ----------
    x : dask.array.Array
        Sequences ``(N, L, C)``, chunked over N alone, in chunks whose sizes may be unknown.
    w : array_like or dask.array.Array
        Kernels ``(D, K, C/groups)``; every worker gets all of them.
    b : array_like or dask.array.Array, optional
        Bias ``(D,)``.
    stride, padding, dilation, groups, strategy
        As in `nhwconv.conv1d`.

    Returns
    -------
    dask.array.Array
        ``(N, OL, D)``, chunked as x is.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv1d`, now rather than in a worker; and ValueError where x is chunked over
        another axis.

    Examples
    --------
    >>> import dask.array as da, numpy as np, nhwconv.dask
    >>> x = da.ones((64, 100, 3), chunks=(16, -1, -1))
    >>> nhwconv.dask.conv1d(x, np.ones((16, 5, 3)), padding="same").shape
    (64, 100, 16)
    """
    return _forward(
        one_dimension.conv1d, x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups,
        strategy=strategy,
    )  # fmt: skip


def conv1d_backward(
    x: da.Array,
    w: Weights,
    dy: da.Array,
    *,
    needs: Iterable[str] = ("dx", "dw", "db"),
    stride: int = 1,
    padding: one_dimension.Padding = 0,
    dilation: int = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
) -> Gradients:
    """Return the gradients of a one-dimensional convolution's input, weights and bias, not computed yet.

    Parameters
    ----------
    x : dask.array.Array
        Sequences ``(N, L, C)``, chunked over N alone, in chunks whose sizes may be unknown.
    w : array_like or dask.array.Array
        Kernels ``(D, K, C/groups)``.
    dy : dask.array.Array
        Gradient of the output ``(N, OL, D)``, chunked as in `conv2d_backward`.
    needs : iterable of {"dx", "dw", "db"}
        Which gradients to return.
    stride, padding, dilation, groups, strategy
        As in `nhwconv.conv1d`.

    Returns
    -------
    Gradients
        ``(dx, dw, db)``, as from `conv2d_backward`.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv1d_backward`, now rather than in a worker; and ValueError where x is chunked
        over another axis.

    Examples
    --------
    >>> import dask.array as da, numpy as np, nhwconv.dask
    >>> x, w = da.ones((64, 100, 3), chunks=(16, -1, -1)), np.ones((16, 5, 3))
    >>> [g.shape for g in nhwconv.dask.conv1d_backward(x, w, nhwconv.dask.conv1d(x, w))]
    [(64, 100, 3), (16, 5, 3), (16,)]
    """
    return _backward(
        one_dimension.conv1d_backward, x, w, dy, needs, stride=stride, padding=padding, dilation=dilation,
        groups=groups, strategy=strategy,
    )  # fmt: skip


def conv_transpose1d(
    x: da.Array,
    w: Weights,
    b: Weights | None = None,
    *,
    stride: int = 1,
    padding: one_dimension.Padding = 0,
    output_padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
) -> da.Array:
    """Convolve a batch of sequences by the transpose of a convolution and add a bias, block by block.

    Parameters
    ----------
    x : dask.array.Array
        Sequences ``(N, L, C)``, chunked over N alone, in chunks whose sizes may be unknown.
    w : array_like or dask.array.Array
        Kernels ``(C, K, D/groups)``; every worker gets all of them.
    b : array_like or dask.array.Array, optional
        Bias ``(D,)``.
    stride, padding, output_padding, dilation, groups, strategy
        As in `nhwconv.conv_transpose1d`.

    Returns
    -------
    dask.array.Array
        ``(N, OL, D)``, chunked as x is.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv_transpose1d`, now rather than in a worker; and ValueError where x is chunked over
        another axis.

    Examples
    --------
    >>> import dask.array as da, numpy as np, nhwconv.dask
    >>> x = da.ones((64, 100, 16), chunks=(16, -1, -1))
    >>> nhwconv.dask.conv_transpose1d(x, np.ones((16, 4, 3)), stride=2, padding=1).shape
    (64, 200, 3)
    """
    return _forward(
        one_dimension.conv_transpose1d, x, w, b, stride=stride, padding=padding, dilation=dilation, groups=groups,
        strategy=strategy, output_padding=output_padding,
    )  # fmt: skip


def conv_transpose1d_backward(
    x: da.Array,
    w: Weights,
    dy: da.Array,
    *,
    needs: Iterable[str] = ("dx", "dw", "db"),
    stride: int = 1,
    padding: one_dimension.Padding = 0,
    output_padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    strategy: StrategyName = "auto",
) -> Gradients:
    """Return the gradients of `conv_transpose1d`'s input, weights and bias, not computed yet.

    Parameters
    ----------
    x : dask.array.Array
        Sequences ``(N, L, C)``, chunked over N alone, in chunks whose sizes may be unknown.
    w : array_like or dask.array.Array
        Kernels ``(C, K, D/groups)``.
    dy : dask.array.Array
        Gradient of the output ``(N, OL, D)``, chunked as in `conv2d_backward`.
    needs : iterable of {"dx", "dw", "db"}
        Which gradients to return.
    stride, padding, output_padding, dilation, groups, strategy
        As in `nhwconv.conv_transpose1d`.

    Returns
    -------
    Gradients
        ``(dx, dw, db)``, as from `conv2d_backward`.

    Raises
    ------
    ValueError, TypeError
        Those of `nhwconv.conv_transpose1d_backward`, now rather than in a worker; and ValueError where x is chunked
        over another axis.

    Examples
    --------
    >>> import dask.array as da, numpy as np, nhwconv.dask
    >>> x, w = da.ones((64, 100, 16), chunks=(16, -1, -1)), np.ones((16, 4, 3))
    >>> y = nhwconv.dask.conv_transpose1d(x, w, stride=2)
    >>> [g.shape for g in nhwconv.dask.conv_transpose1d_backward(x, w, y, stride=2)]
    [(64, 100, 16), (16, 4, 3), (3,)]
    """
    return _backward(
        one_dimension.conv_transpose1d_backward, x, w, dy, needs, stride=stride, padding=padding, dilation=dilation,
        groups=groups, strategy=strategy, output_padding=output_padding,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- arguments


_AXES = {3: "three", 4: "four"}


def _rank_of(function: Callable[..., Any]) -> int:
    return 3 if "1d" in function.__name__ else 4


def _check_array(name: str, array: Any, rank: int) -> None:
    if not isinstance(array, da.Array):
        checks.fail(f"{name} is of type {type(array).__name__}, expected a dask.array.Array", TypeError)
    if array.ndim != rank:
        checks.fail(f"{name} has shape {array.shape}, expected {_AXES[rank]} axes, samples first")


def _check_chunks(name: str, array: Any, rank: int) -> None:
    _check_array(name, array, rank)
    if any(count != 1 for count in array.numblocks[1:]):
        checks.fail(
            f"{name} has {array.numblocks} blocks, expected all of them along the first axis; "
            f"use {name}.rechunk({('auto', *(-1,) * (rank - 1))})",
        )


def _whole(name: str, value: Any) -> Any:
    """Return weights or a bias as an array of either kind, in one piece."""
    return value.rechunk(-1) if isinstance(value, da.Array) else checks.as_input(name, value)


def _chunked_like(dy: da.Array, x: da.Array) -> da.Array:
    """Return dy in chunks of as many samples as x's have; sizes that are not known yet are taken to be."""
    whole = dict.fromkeys(range(1, dy.ndim), -1)
    if not np.isnan([dy.shape[0], x.shape[0]]).any():
        if dy.shape[0] != x.shape[0]:
            checks.fail(f"dy has {dy.shape[0]} samples, but x has {x.shape[0]}")
        return dy.rechunk({0: x.chunks[0], **whole})
    if dy.numblocks[0] != x.numblocks[0]:
        checks.fail(
            f"dy has {dy.numblocks[0]} chunks of samples, but x has {x.numblocks[0]}, and not all of their sizes are "
            "known, so they cannot be matched; use compute_chunk_sizes()",
        )
    dy = dy.rechunk(whole)
    # Said to be of one size, or Dask would not put the blocks of the two side by side.
    return da.Array(dy.dask, dy.name, (x.chunks[0], *dy.chunks[1:]), meta=dy)


# ------------------------------------------------------------------------------------------------ graphs


def _forward(function: Callable[..., Array], x: Any, w: Any, b: Any, **options: Any) -> da.Array:
    """Apply a convolution of nhwconv's to each block of samples."""
    with words_of(function.__name__):
        w, b = _whole("w", w), None if b is None else _whole("b", b)
        _check_chunks("x", x, _rank_of(function))
        y = function(no_samples(x), stand_in(w), None if b is None else stand_in(b), **options)
    return _map(function, x, shape=y.shape[1:], dtype=y.dtype, whole=(w,) if b is None else (w, b), **options)


def _backward(
    function: Callable[..., Gradients], x: Any, w: Any, dy: Any, needs: Iterable[str], **options: Any
) -> Gradients:
    """Put together the gradients that a backward function of nhwconv's gives for each block of samples."""
    with words_of(function.__name__):
        w, needs = _whole("w", w), (needs,) if isinstance(needs, str) else tuple(needs)
        _check_chunks("x", x, _rank_of(function))
        _check_array("dy", dy, x.ndim)
        checked = function(no_samples(x), stand_in(w), no_samples(dy), needs=needs, **options)
        dy = _chunked_like(dy, x)
    absent = {"x": (x.shape[1:], x.dtype), "w": (w.shape, w.dtype)}
    options |= {"of": function, "absent": absent}
    dx = dw = db = None
    if checked.dx is not None:
        more: Any = {"takes": ("dy", "w"), "need": "dx", **options}
        dx = _map(_gradient, dy, shape=x.shape[1:], dtype=checked.dx.dtype, whole=(w,), **more)
    if checked.dw is not None:
        more = {"takes": ("x", "dy"), "need": "dw", **options}
        dw = _sum(_gradient, x, dy, shape=w.shape, dtype=checked.dw.dtype, **more)
    if checked.db is not None:
        more = {"takes": ("dy",), "need": "db", **options}
        db = _sum(_gradient, dy, shape=checked.db.shape, dtype=checked.db.dtype, **more)
    return Gradients(dx, dw, db)


def _gradient(
    *arrays: Array, of: Callable[..., Gradients], takes: tuple[str, ...], need: str, absent: dict[str, Any],
    **options: Any,
) -> Array:  # fmt: skip
    """Return one gradient of a block; what it does not depend on is memory that nobody reads or writes."""
    given = dict(zip(takes, arrays, strict=True))
    for name, (shape, dtype) in absent.items():
        if name not in given:
            given[name] = np.empty((len(given["dy"]), *shape) if name == "x" else shape, dtype)
    gradient: Array = getattr(of(**given, needs=need, **options), need)
    return gradient


def _map(
    function: Callable[..., Array], x: da.Array, *, shape: tuple[int, ...], dtype: np.dtype[Any],
    whole: tuple[Any, ...], **options: Any,
) -> da.Array:  # fmt: skip
    """Apply a function to each block of samples; the arrays in `whole` go to all of them."""
    chunks = (x.chunks[0], *((size,) for size in shape))
    whole = tuple(_in_one_task(array) for array in whole)
    return x.map_blocks(_block, function=function, whole=whole, chunks=chunks, meta=_meta(x.ndim, dtype), **options)


def _sum(
    function: Callable[..., Array], *arrays: da.Array, shape: tuple[int, ...], dtype: np.dtype[Any], **options: Any
) -> da.Array:
    """Add up a function's results for all blocks of samples, in a tree."""
    chunks = ((1,) * arrays[0].numblocks[0], *((size,) for size in shape))
    # Each part gets an axis in front, along which the parts are the blocks of an array.
    rank = arrays[0].ndim
    axes = {"new_axis": [rank]} if len(shape) == rank else {"drop_axis": [*range(2, rank)]}
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
