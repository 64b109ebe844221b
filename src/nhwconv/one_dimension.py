"""Convolution in one dimension: the two-dimensional one, of images of one row."""

from __future__ import annotations

from collections.abc import Iterable

import numpy.typing as npt

from .layouts import Layout
from .ops import (
    Array,
    Convolution,
    Gradients,
    StrategyName,
    backward,
    backward_plan,
    forward,
    forward_plan,
    transposed_backward_plan,
    transposed_plan,
)

__all__ = ["conv1d", "conv1d_backward", "conv_transpose1d", "conv_transpose1d_backward"]

Padding = int | tuple[int, int] | str

_ROWS = Layout(dimensions=1)
CONV1D = Convolution("conv1d", forward_plan, backward_plan, _ROWS)
CONV_TRANSPOSE1D = Convolution("conv_transpose1d", transposed_plan, transposed_backward_plan, _ROWS)


def conv1d(
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    b: npt.ArrayLike | None = None,
    *,
    stride: int = 1,
    padding: Padding = 0,
    dilation: int = 1,
    groups: int = 1,
    layout: str = "NHWC",
    w_layout: str | None = None,
    strategy: StrategyName = "auto",
    out: Array | None = None,
) -> Array:
    """Convolve a batch of sequences with D kernels and add a bias.

    ``y[n, i, d] = b[d] + sum over k, c of x[n, i*stride + k*dilation - before, c] * w[d, k, c]``: `conv2d` of images
    of one row, on the same arrays.

    Parameters
    ----------
    x : array_like
        Sequences ``(N, L, C)``; also ``(L, C)`` and ``(L,)``. float32, float64, float16 or bfloat16. An array that is
        not C-contiguous is copied.
    w : array_like
        Kernels ``(D, K, C/groups)``; with an x of two axes also ``(K, C)``, with one of one axis ``(K,)``.
    b : array_like, optional
        Bias ``(D,)``; 0-d where w has no D axis.
    stride, dilation : int
        In positions.
    padding : int, pair, "valid" or "same"
        Zeros at both ends, (before, after), none, or as many as give ``ceil(L / stride)`` outputs. A causal
        convolution has ``(dilation * (K - 1), 0)``.
    groups : int
        Output channels ``[g*D/groups, (g+1)*D/groups)`` see input channels ``[g*C/groups, (g+1)*C/groups)`` only.
    layout : {"NHWC", "NCHW"}
        As in `conv2d`, without H. "NCHW": x is ``(N, C, L)``, w ``(D, C/groups, K)`` and the result ``(N, D, OL)``; all
        are copied to be turned.
    w_layout : {"OHWI", "HWIO"}, optional
        "HWIO": w is ``(K, C/groups, D)``.
    strategy : str or tuple of str
        A name from `strategies`, a tuple of names to choose from, or "auto".
    out : ndarray, optional
        Where the result goes: of its shape and dtype, C-contiguous, writable, apart from the inputs.

    Returns
    -------
    ndarray
        ``(N, OL, D)``, or ``(OL, D)`` and ``(OL,)`` for the smaller forms; `out` where it was given.

    Raises
    ------
    ValueError
        Where shapes, sizes or options do not fit together, or the strategy cannot do the problem.
    TypeError
        Where a dtype or the type of an argument is not accepted.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> x, w = np.ones((8, 1024, 64), np.float32), np.ones((32, 5, 64), np.float32)
    >>> nc.conv1d(x, w, padding="same").shape
    (8, 1024, 32)
    """
    return forward(CONV1D, x, w, b, stride, padding, dilation, groups, layout, w_layout, strategy, out)


def conv1d_backward(
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    dy: npt.ArrayLike,
    *,
    needs: Iterable[str] = ("dx", "dw", "db"),
    stride: int = 1,
    padding: Padding = 0,
    dilation: int = 1,
    groups: int = 1,
    layout: str = "NHWC",
    w_layout: str | None = None,
    strategy: StrategyName = "auto",
    out: Gradients | None = None,
    accumulate: bool = False,
) -> Gradients:
    """Return the gradients of a one-dimensional convolution's input, weights and bias together.

    Parameters
    ----------
    x, w : array_like
        What the forward pass was given, as in `conv1d`.
    dy : array_like
        Gradient of its output: ``(N, OL, D)``, or as the smaller forms have it.
    needs : iterable of {"dx", "dw", "db"}
        Which gradients to compute.
    stride, padding, dilation, groups, layout, w_layout, strategy
        As in `conv1d`.
    out : Gradients, optional
        Where results go; None in it allocates.
    accumulate : bool
        Add dw and db to `out` instead of overwriting them. dx is always overwritten.

    Returns
    -------
    Gradients
        ``(dx, dw, db)``, None where not needed.

    Raises
    ------
    ValueError
        Where shapes, sizes or options do not fit together.
    TypeError
        Where a dtype or the type of an argument is not accepted.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> x, w = np.ones((8, 100, 16)), np.ones((4, 3, 16))
    >>> g = nc.conv1d_backward(x, w, nc.conv1d(x, w))
    >>> g.dx.shape, g.dw.shape, g.db.shape
    ((8, 100, 16), (4, 3, 16), (4,))
    """
    return backward(
        CONV1D, x, w, dy, needs, stride, padding, dilation, groups, layout, w_layout, strategy, out, accumulate
    )


def conv_transpose1d(
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    b: npt.ArrayLike | None = None,
    *,
    stride: int = 1,
    padding: Padding = 0,
    output_padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    layout: str = "NHWC",
    w_layout: str | None = None,
    strategy: StrategyName = "auto",
    out: Array | None = None,
) -> Array:
    """Spread each position of a batch of sequences over the outputs that a kernel reaches from it, and add a bias.

    The transpose of a `conv1d` whose output has the shape of x; `conv_transpose2d` in one dimension.

    Parameters
    ----------
    x : array_like
        Sequences ``(N, L, C)``; also ``(L, C)`` and ``(L,)``.
    w : array_like
        Kernels ``(C, K, D/groups)``; with an x of one axis also ``(K, D)`` and ``(K,)``.
    b : array_like, optional
        Bias ``(D,)``; 0-d where w is ``(K,)``.
    stride, padding, output_padding, dilation, groups, strategy, out
        As in `conv_transpose2d`, each for one dimension; a pair as `padding` is (before, after).
    layout : {"NHWC", "NCHW"}
        "NCHW": x is ``(N, C, L)``, w ``(C, D/groups, K)`` and the result ``(N, D, OL)``.
    w_layout : {"OHWI", "HWIO"}, optional
        "HWIO": w is ``(K, D/groups, C)``.

    Returns
    -------
    ndarray
        ``(N, OL, D)``, or ``(OL, D)`` and ``(OL,)`` for the smaller forms; `out` where it was given.

    Raises
    ------
    ValueError
        Where shapes, sizes or options do not fit together, or the strategy cannot do the problem.
    TypeError
        Where a dtype or the type of an argument is not accepted.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> x, w = np.ones((8, 100, 16), np.float32), np.ones((16, 4, 8), np.float32)
    >>> nc.conv_transpose1d(x, w, stride=2, padding=1).shape
    (8, 200, 8)
    """
    return forward(
        CONV_TRANSPOSE1D, x, w, b, stride, padding, dilation, groups, layout, w_layout, strategy, out, output_padding
    )


def conv_transpose1d_backward(
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    dy: npt.ArrayLike,
    *,
    needs: Iterable[str] = ("dx", "dw", "db"),
    stride: int = 1,
    padding: Padding = 0,
    output_padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    layout: str = "NHWC",
    w_layout: str | None = None,
    strategy: StrategyName = "auto",
    out: Gradients | None = None,
    accumulate: bool = False,
) -> Gradients:
    """Return the gradients of a one-dimensional transposed convolution's input, weights and bias together.

    Parameters
    ----------
    x, w : array_like
        What the forward pass was given, as in `conv_transpose1d`.
    dy : array_like
        Gradient of its output: ``(N, OL, D)``, or as the smaller forms have it.
    needs : iterable of {"dx", "dw", "db"}
        Which gradients to compute.
    stride, padding, output_padding, dilation, groups, layout, w_layout, strategy
        As in `conv_transpose1d`.
    out : Gradients, optional
        Where results go; None in it allocates.
    accumulate : bool
        Add dw and db to `out` instead of overwriting them. dx is always overwritten.

    Returns
    -------
    Gradients
        ``(dx, dw, db)``, None where not needed.

    Raises
    ------
    ValueError
        Where shapes, sizes or options do not fit together.
    TypeError
        Where a dtype or the type of an argument is not accepted.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> x, w = np.ones((8, 100, 16)), np.ones((16, 4, 8))
    >>> g = nc.conv_transpose1d_backward(x, w, nc.conv_transpose1d(x, w, stride=2), stride=2)
    >>> g.dx.shape, g.dw.shape, g.db.shape
    ((8, 100, 16), (16, 4, 8), (8,))
    """
    return backward(
        CONV_TRANSPOSE1D, x, w, dy, needs, stride, padding, dilation, groups, layout, w_layout, strategy, out,
        accumulate, output_padding,
    )  # fmt: skip
