"""The article's layer: a convolution that remembers its input and computes its gradients from eta."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import checks, ops, planning
from .ops import Padding, Size, StrategyName

__all__ = ["Conv2D"]

Array = npt.NDArray[Any]


class Conv2D:
    """A convolution layer with parameters, and gradients after `backward`.

    Parameters
    ----------
    in_channels, out_channels : int
        C and D.
    kernel_size : int or pair
        (KH, KW).
    stride, padding, dilation, groups, strategy
        As in `nhwconv.conv2d`.
    bias : bool
        Whether there is a bias `b`.
    dtype : dtype_like
        Of the parameters.
    rng : numpy.random.Generator or int, optional
        Where the initial weights are drawn from; a seed is accepted.
    needs_input_grad : bool
        False for a network's first layer: `backward` then returns None and saves that work.

    Attributes
    ----------
    W : ndarray
        Weights ``(D, KH, KW, C/groups)``, from He's normal initialisation (He et al. 2015, section 2.2).
    b : ndarray or None
        Bias ``(D,)``, zeros at first.
    gradW, gradb : ndarray or None
        Gradients, once `backward` has run.

    Raises
    ------
    ValueError, TypeError
        Where sizes or options do not fit together.

    Examples
    --------
    >>> import numpy as np, nhwconv as nc
    >>> layer = nc.Conv2D(3, 16, 3, padding=1, rng=0)
    >>> y = layer.forward(np.ones((8, 28, 28, 3), np.float32))
    >>> dx = layer.backward(np.ones_like(y))
    >>> y.shape, dx.shape, layer.gradW.shape, layer.gradb.shape
    ((8, 28, 28, 16), (8, 28, 28, 3), (16, 3, 3, 3), (16,))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: Padding = 0,
        dilation: Size = 1,
        groups: int = 1,
        strategy: StrategyName = "auto",
        bias: bool = True,
        dtype: npt.DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
        needs_input_grad: bool = True,
    ) -> None:
        with checks.words_of("Conv2D"):
            self.in_channels = checks.integer("in_channels", in_channels, 1)
            self.out_channels = checks.integer("out_channels", out_channels, 1)
            self.kernel_size = checks.pair("kernel_size", kernel_size, 1)
            options = checks.Options.of(stride, padding, dilation, groups)
            for name, channels in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
                if channels % options.groups:
                    checks.fail(f"{name} is {channels}, which {options.groups} groups do not divide")
            planning.strategy_names(strategy)
            dtype = checks.as_dtype(dtype)
        self.options: dict[str, Any] = {**vars(options), "strategy": strategy}
        self.needs_input_grad = needs_input_grad
        shape = (self.out_channels, *self.kernel_size, self.in_channels // options.groups)
        deviation = np.sqrt(2 / np.prod(shape[1:]))
        self.W: Array = (np.random.default_rng(rng).standard_normal(shape) * deviation).astype(dtype)
        self.b: Array | None = np.zeros(self.out_channels, dtype) if bias else None
        self.gradW: Array | None = None
        self.gradb: Array | None = None
        self._x: Array | None = None

    def forward(self, x: npt.ArrayLike) -> Array:
        """Return the layer's output for a batch ``(N, H, W, C)``, and remember the batch for `backward`."""
        y = ops.conv2d(x, self.W, self.b, **self.options)
        self._x = np.asarray(x)
        return y

    def backward(self, eta: npt.ArrayLike) -> Array | None:
        """Set `gradW` and `gradb` from the gradient of the output; return the gradient of the input.

        Raises
        ------
        RuntimeError
            Where `forward` has not run.
        """
        if self._x is None:
            raise RuntimeError("Conv2D.backward: call forward first")
        needs = ["dw"] + ["db"] * (self.b is not None) + ["dx"] * self.needs_input_grad
        gradients = ops.conv2d_backward(self._x, self.W, eta, needs=needs, **self.options)
        self.gradW, self.gradb = gradients.dw, gradients.db
        return gradients.dx

    def __repr__(self) -> str:
        return f"Conv2D({self.in_channels}, {self.out_channels}, {self.kernel_size})"
