"""Transposed convolution: what an input gradient is to a convolution, as a layer of its own."""

from __future__ import annotations

from collections.abc import Iterable

import numpy.typing as npt

from .ops import (
    Array,
    Convolution,
    Gradients,
    Padding,
    Size,
    StrategyName,
    backward,
    forward,
    transposed_backward_plan,
    transposed_plan,
)

__all__ = ["conv_transpose2d", "conv_transpose2d_backward"]

CONV_TRANSPOSE2D = Convolution("conv_transpose2d", transposed_plan, transposed_backward_plan)


def conv_transpose2d(
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    b: npt.ArrayLike | None = None,
    *,
    stride: Size = 1,
    padding: Padding = 0,
    output_padding: Size | None = None,
    dilation: Size = 1,
    groups: int = 1,
    layout: str = "NHWC",
    w_layout: str | None = None,
    strategy: StrategyName = "auto",
    out: Array | None = None,
) -> Array:
    """Spread each pixel of a batch of NHWC images over the outputs that a kernel reaches from it, and add a bias.

    The transpose of a convolution whose output has the shape of x: the pixel ``(i, j)`` adds ``x[n, i, j, :] . w[:, h,
    v, d]`` to output ``(i*stride + h*dilation - top, j*stride + v*dilation - left)``. With a stride it makes images
    larger. It is computed as the input gradient of that convolution, `conv2d_input_grad`, with the bias in the same
    pass.

    Parameters
    ----------
    x : array_like
        Images ``(N, H, W, C)``; also ``(H, W, C)`` and ``(H, W)``. float32, float64, float16 or bfloat16. An
        array that is not C-contiguous is copied.
    w : array_like
        Kernels ``(C, KH, KW, D/groups)``: those of the convolution from D to C channels whose transpose this is. With
        an x of two axes also ``(KH, KW, D)`` and ``(KH, KW)``.
    b : array_like, optional
        Bias ``(D,)``; 0-d where w is ``(KH, KW)``.
    stride, dilation : int or pair
        For rows and columns, of the convolution.
    padding : int, pair, pair of pairs, "valid" or "same"
        What the convolution pads its input with, and so what is cut off here: outputs are ``(size - 1) * stride +
        dilation * (kernel - 1) + 1 - before - after + output_padding``. "same" gives ``size * stride`` outputs, and
        "valid" cuts off nothing, and leaves out no pixel between kernels that are smaller than the stride.
    output_padding : int or pair, optional
        More outputs at the end of rows and columns, fewer than the stride or the dilation. With "same" and "valid",
        sizes are those that Keras gives.
    groups : int
        Output channels ``[g*D/groups, (g+1)*D/groups)`` see input channels ``[g*C/groups, (g+1)*C/groups)`` only.
    layout : {"NHWC", "NCHW"}
        "NCHW": x is ``(N, C, H, W)``, w ``(C, D/groups, KH, KW)`` as PyTorch has it, and the result ``(N, D, OH,
        OW)``; all are copied to be turned.
    w_layout : {"OHWI", "HWIO"}, optional
        "HWIO": w is ``(KH, KW, D/groups, C)``, as TensorFlow and Keras have it.
    strategy : str or tuple of str
        A name from `strategies`, a tuple of names to choose from, or "auto".
    out : ndarray, optional
        Where the result goes: of its shape and dtype, C-contiguous, writable, apart from the inputs.

    Returns
    -------
    ndarray
        ``(N, OH, OW, D)``, or ``(OH, OW, D)`` and ``(OH, OW)`` for the smaller forms; `out` where it was given.

    Raises
    ------
    ValueError
        Where shapes, sizes or options do not fit together, or the strategy cannot do the problem.
    TypeError
        Where a dtype or the type of an argument is not accepted.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> x = np.ones((8, 14, 14, 32), np.float32)
    >>> w = np.ones((32, 2, 2, 16), np.float32)
    >>> nc.conv_transpose2d(x, w, stride=2).shape
    (8, 28, 28, 16)

    The way back through an autoencoder has the weights of the way in:

    >>> x = np.ones((1, 28, 28, 16), np.float32)
    >>> y = nc.conv2d(x, w, stride=2)
    >>> nc.conv_transpose2d(y, w, stride=2).shape == x.shape
    True
    """
    return forward(
        CONV_TRANSPOSE2D, x, w, b, stride, padding, dilation, groups, layout, w_layout, strategy, out, output_padding
    )


def conv_transpose2d_backward(
    x: npt.ArrayLike,
    w: npt.ArrayLike,
    dy: npt.ArrayLike,
    *,
    needs: Iterable[str] = ("dx", "dw", "db"),
    stride: Size = 1,
    padding: Padding = 0,
    output_padding: Size | None = None,
    dilation: Size = 1,
    groups: int = 1,
    layout: str = "NHWC",
    w_layout: str | None = None,
    strategy: StrategyName = "auto",
    out: Gradients | None = None,
    accumulate: bool = False,
) -> Gradients:
    """Return the gradients of a transposed convolution's input, weights and bias together.

    That of the input is a convolution of dy, `conv2d`; that of the weights a convolution's, `conv2d_weight_grad`, with
    x and dy in each other's places.

    Parameters
    ----------
    x, w : array_like
        What the forward pass was given, as in `conv_transpose2d`.
    dy : array_like
        Gradient of its output: ``(N, OH, OW, D)``, or as the smaller forms have it.
    needs : iterable of {"dx", "dw", "db"}
        Which gradients to compute.
    stride, padding, output_padding, dilation, groups, layout, w_layout, strategy
        As in `conv_transpose2d`.
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
    >>> x, w = np.ones((8, 14, 14, 32)), np.ones((32, 2, 2, 16))
    >>> g = nc.conv_transpose2d_backward(x, w, nc.conv_transpose2d(x, w, stride=2), stride=2)
    >>> g.dx.shape, g.dw.shape, g.db.shape
    ((8, 14, 14, 32), (32, 2, 2, 16), (16,))
    """
    return backward(
        CONV_TRANSPOSE2D, x, w, dy, needs, stride, padding, dilation, groups, layout, w_layout, strategy, out,
        accumulate, output_padding,
    )  # fmt: skip
