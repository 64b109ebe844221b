"""The oracle: a convolution and its gradients in float64, straight from the sums. It shares no code with nhwconv.

    y[n, p, q, d] = b[d] + sum over h, v, c of x[n, i, j, c] * w[d, h, v, c]
    where i = p * stride + h * dilation - top,  j = q * stride + v * dilation - left,  and x is 0 outside of itself

Each product ``x[n, i, j, c] * w[d, h, v, c]`` that is part of ``y[n, p, q, d]`` gives one term to each gradient:

    dw[d, h, v, c]  receives  dy[n, p, q, d] * x[n, i, j, c]
    dx[n, i, j, c]  receives  dy[n, p, q, d] * w[d, h, v, c]

So all three passes are one loop over kernel positions ``(h, v)``: which outputs ``(p, q)`` read an input there, which
inputs ``(i, j)`` these are, and another product inside. Channels are split into groups, ``(..., groups, channels of a
group)``: group g of y sees group g of x only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def output_size(size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> int:
    """Count the positions, a stride apart, at which the whole kernel lies in the padded input."""
    padded = padding[0] + size + padding[1]
    return sum(1 for first in range(0, padded, stride) if first + (kernel - 1) * dilation < padded)


def _reads(
    size: int, kernel: int, out: int, stride: int, before: int, dilation: int
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Along one axis, for every kernel position: the outputs that read an input there, and what each of them reads."""
    for h in range(kernel):
        reads = {p: p * stride + h * dilation - before for p in range(out)}
        reads = {p: i for p, i in reads.items() if 0 <= i < size}
        yield h, list(reads.keys()), list(reads.values())


def _terms(
    x_size: tuple[int, int], kernel: tuple[int, int], out: tuple[int, int], stride: Any, padding: Any, dilation: Any
) -> Iterator[tuple[int, int, Any, Any]]:
    """For every kernel position ``h, v``: where arrays like y have what reads, and arrays like x what is read."""
    rows, columns = (list(_reads(x_size[a], kernel[a], out[a], stride[a], padding[a][0], dilation[a])) for a in (0, 1))
    for h, p, i in rows:
        for v, q, j in columns:
            yield h, v, (slice(None), *np.ix_(p, q)), (slice(None), *np.ix_(i, j))


def _split(a: npt.ArrayLike, groups: int) -> Array:
    """``(..., channels)`` as ``(..., groups, channels of a group)``, in float64."""
    a = np.asarray(a, np.float64)
    return a.reshape(*a.shape[:-1], groups, a.shape[-1] // groups)


def _kernels(w: npt.ArrayLike, groups: int) -> Array:
    """``(d, kh, kw, c / groups)`` as ``(groups, d of a group, kh, kw, c of a group)``, in float64."""
    w = np.asarray(w, np.float64)
    return w.reshape(groups, w.shape[0] // groups, *w.shape[1:])


def forward(
    x: npt.ArrayLike, w: npt.ArrayLike, b: npt.ArrayLike | None = None, *, stride: Any, padding: Any, dilation: Any,
    groups: int,
) -> Array:  # fmt: skip
    """Return y."""
    x, w = _split(x, groups), _kernels(w, groups)
    n, rows, columns = x.shape[:3]
    kh, kw = w.shape[2:4]
    oh = output_size(rows, kh, stride[0], padding[0], dilation[0])
    ow = output_size(columns, kw, stride[1], padding[1], dilation[1])
    y = np.zeros((n, oh, ow, groups, w.shape[1]))
    for h, v, reading, read in _terms((rows, columns), (kh, kw), (oh, ow), stride, padding, dilation):
        y[reading] += np.einsum("npqgc,gdc->npqgd", x[read], w[:, :, h, v])
    y = y.reshape(n, oh, ow, groups * w.shape[1])
    return y if b is None else y + np.asarray(b, np.float64)


def weight_grad(
    x: npt.ArrayLike, dy: npt.ArrayLike, *, kernel: tuple[int, int], stride: Any, padding: Any, dilation: Any,
    groups: int,
) -> Array:  # fmt: skip
    """Return dw for kernels of this size."""
    x, dy = _split(x, groups), _split(dy, groups)
    dw = np.zeros((groups, dy.shape[4], *kernel, x.shape[4]))
    for h, v, reading, read in _terms(x.shape[1:3], kernel, dy.shape[1:3], stride, padding, dilation):
        dw[:, :, h, v] = np.einsum("npqgd,npqgc->gdc", dy[reading], x[read])
    return dw.reshape(groups * dy.shape[4], *kernel, x.shape[4])


def input_grad(
    dy: npt.ArrayLike, w: npt.ArrayLike, *, size: tuple[int, int], stride: Any, padding: Any, dilation: Any,
    groups: int,
) -> Array:  # fmt: skip
    """Return dx for an input of this size."""
    dy, w = _split(dy, groups), _kernels(w, groups)
    dx = np.zeros((dy.shape[0], *size, groups, w.shape[4]))
    for h, v, reading, read in _terms(size, w.shape[2:4], dy.shape[1:3], stride, padding, dilation):
        dx[read] += np.einsum("npqgd,gdc->npqgc", dy[reading], w[:, :, h, v])
    return dx.reshape(dy.shape[0], *size, groups * w.shape[4])


def with_absolute(function: Callable[..., Array], *arrays: npt.ArrayLike | None, **options: Any) -> tuple[Array, Array]:
    """Return a pass's exact result, and the same sum over absolute values: what its error is measured against."""
    absolute = (None if a is None else np.abs(np.asarray(a, np.float64)) for a in arrays)
    return function(*arrays, **options), function(*absolute, **options)
