"""The article's layer: a convolution that remembers its input and computes its gradients from eta; and its kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from . import checks, one_dimension, ops, planning, transposed
from .ops import Array, Padding, Size, StrategyName
from .runtime.arrays import values_are_data

__all__ = ["Conv1D", "Conv1DTranspose", "Conv2D", "Conv2DTranspose"]

Generator = np.random.Generator | int | None


class _Layer:
    """What all layers have: parameters, and a batch that is remembered."""

    _function: ClassVar[Callable[..., Array]]
    _gradients: ClassVar[Callable[..., ops.Gradients]]
    _dimensions: ClassVar[int] = 2
    _transposed: ClassVar[bool] = False

    def __init__(
        self, in_channels: Any, out_channels: Any, kernel_size: Any, options: dict[str, Any], strategy: Any,
        bias: bool, dtype: Any, rng: Generator, needs_input_grad: bool,
    ) -> None:  # fmt: skip
        with checks.words_of(type(self).__name__):
            self.in_channels = checks.integer("in_channels", in_channels, 1)
            self.out_channels = checks.integer("out_channels", out_channels, 1)
            if self._dimensions == 2:
                kernel = checks.pair("kernel_size", kernel_size, 1)
                self.kernel_size: int | tuple[int, int] = kernel
            else:
                self.kernel_size = checks.integer("kernel_size", kernel_size, 1)
                kernel = 1, self.kernel_size
            layout = checks.as_layout(options.pop("layout"), options.pop("w_layout"), self._dimensions)
            checked = checks.Options.of(**options, layout=layout)
            for name, channels in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
                if channels % checked.groups:
                    checks.fail(f"{name} is {channels}, which {checked.groups} groups do not divide")
            planning.strategy_names(strategy)
            dtype = checks.as_dtype(dtype)
        self.options: dict[str, Any] = {**checked.keywords(), "strategy": strategy}
        self.needs_input_grad = needs_input_grad
        self.W: Array = self._draw(kernel, checked, dtype, rng)
        self.b: Array | None = np.zeros(self.out_channels, dtype) if bias else None
        self.gradW: Array | None = None
        self.gradb: Array | None = None
        self._x: Array | None = None

    @values_are_data
    def _draw(self, kernel: tuple[int, int], options: checks.Options, dtype: Any, rng: Generator) -> Array:
        """Return initial weights: the same from a seed, in every layout."""
        d, c = self.out_channels, self.in_channels
        shape = (c, *kernel, d // options.groups) if self._transposed else (d, *kernel, c // options.groups)
        seen: Any = np.prod(shape[1:])
        if self._transposed:  # of the kernel's positions, an output meets one in a stride's
            seen = c // options.groups * max(1, np.prod(kernel) / np.prod(options.stride))
        drawn = np.random.default_rng(rng).standard_normal(shape) * np.sqrt(2 / seen)
        turned: Array = drawn.transpose(options.layout._replace(dimensions=2).weights_of((0, 1, 2, 3), 4))
        return turned.astype(dtype, order="C").reshape(options.layout.weights_of(shape, 4))

    def forward(self, x: npt.ArrayLike) -> Array:
        """Return the layer's output for a batch, and remember the batch, not a copy of it, for `backward`."""
        y = type(self)._function(x, self.W, self.b, **self.options)
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
            raise RuntimeError(f"{type(self).__name__}.backward: call forward first")
        needs = ("dw",) + ("db",) * (self.b is not None) + ("dx",) * bool(self.needs_input_grad)
        gradients = type(self)._gradients(self._x, self.W, eta, needs=needs, **self.options)
        self.gradW, self.gradb = gradients.dw, gradients.db
        return gradients.dx

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_x": None}  # a batch is no part of a model that is stored or copied

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, {self.kernel_size})"


class Conv2D(_Layer):
    """A convolution layer with parameters, and gradients after `backward`.

    `forward` remembers x, not a copy of it: x must not change before `backward`. The batch is not pickled.

    Parameters
    ----------
    in_channels, out_channels : int
        C and D.
    kernel_size : int or pair
        (KH, KW).
    stride, padding, dilation, groups, layout, w_layout, strategy
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
        Weights ``(D, KH, KW, C/groups)``, or as `w_layout` has them, from He's normal initialisation (He et al. 2015,
        section 2.2).
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

    _function = staticmethod(ops.conv2d)
    _gradients = staticmethod(ops.conv2d_backward)

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
        layout: str = "NHWC",
        w_layout: str | None = None,
        strategy: StrategyName = "auto",
        bias: bool = True,
        dtype: npt.DTypeLike = np.float32,
        rng: Generator = None,
        needs_input_grad: bool = True,
    ) -> None:
        options = dict(
            stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, w_layout=w_layout
        )
        super().__init__(in_channels, out_channels, kernel_size, options, strategy, bias, dtype, rng, needs_input_grad)


class Conv2DTranspose(_Layer):
    """A transposed convolution layer with parameters, and gradients after `backward`.

    `forward` remembers x, not a copy of it: x must not change before `backward`. The batch is not pickled.

    Parameters
    ----------
    in_channels, out_channels : int
        C and D.
    kernel_size : int or pair
        (KH, KW).
    stride, padding, output_padding, dilation, groups, layout, w_layout, strategy
        As in `nhwconv.conv_transpose2d`.
    bias, dtype, rng, needs_input_grad
        As in `Conv2D`.

    Attributes
    ----------
    W : ndarray
        Weights ``(C, KH, KW, D/groups)``, or as `w_layout` has them: those of the convolution whose transpose this is.
        He's normal initialisation, for as many weights as an output meets with this stride.
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
    >>> layer = nc.Conv2DTranspose(32, 16, 2, stride=2, rng=0)
    >>> y = layer.forward(np.ones((8, 14, 14, 32), np.float32))
    >>> y.shape, layer.backward(np.ones_like(y)).shape
    ((8, 28, 28, 16), (8, 14, 14, 32))
    """

    _function = staticmethod(transposed.conv_transpose2d)
    _gradients = staticmethod(transposed.conv_transpose2d_backward)
    _transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: Padding = 0,
        output_padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
        layout: str = "NHWC",
        w_layout: str | None = None,
        strategy: StrategyName = "auto",
        bias: bool = True,
        dtype: npt.DTypeLike = np.float32,
        rng: Generator = None,
        needs_input_grad: bool = True,
    ) -> None:
        options = dict(
            stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, w_layout=w_layout,
            output_padding=output_padding,
        )  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, options, strategy, bias, dtype, rng, needs_input_grad)


class Conv1D(_Layer):
    """A one-dimensional convolution layer with parameters, and gradients after `backward`.

    `forward` remembers x, not a copy of it: x must not change before `backward`. The batch is not pickled.

    Parameters
    ----------
    in_channels, out_channels : int
        C and D.
    kernel_size : int
        K.
    stride, padding, dilation, groups, layout, w_layout, strategy
        As in `nhwconv.conv1d`.
    bias, dtype, rng, needs_input_grad
        As in `Conv2D`.

    Attributes
    ----------
    W : ndarray
        Weights ``(D, K, C/groups)``, or as `w_layout` has them, from He's normal initialisation.
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
    >>> layer = nc.Conv1D(16, 32, 5, padding="same", rng=0)
    >>> y = layer.forward(np.ones((8, 100, 16), np.float32))
    >>> y.shape, layer.backward(np.ones_like(y)).shape
    ((8, 100, 32), (8, 100, 16))
    """

    _function = staticmethod(one_dimension.conv1d)
    _gradients = staticmethod(one_dimension.conv1d_backward)
    _dimensions = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: one_dimension.Padding = 0,
        dilation: int = 1,
        groups: int = 1,
        layout: str = "NHWC",
        w_layout: str | None = None,
        strategy: StrategyName = "auto",
        bias: bool = True,
        dtype: npt.DTypeLike = np.float32,
        rng: Generator = None,
        needs_input_grad: bool = True,
    ) -> None:
        options = dict(
            stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, w_layout=w_layout
        )
        super().__init__(in_channels, out_channels, kernel_size, options, strategy, bias, dtype, rng, needs_input_grad)


class Conv1DTranspose(_Layer):
    """A one-dimensional transposed convolution layer with parameters, and gradients after `backward`.

    `forward` remembers x, not a copy of it: x must not change before `backward`. The batch is not pickled.

    Parameters
    ----------
    in_channels, out_channels : int
        C and D.
    kernel_size : int
        K.
    stride, padding, output_padding, dilation, groups, layout, w_layout, strategy
        As in `nhwconv.conv_transpose1d`.
    bias, dtype, rng, needs_input_grad
        As in `Conv2D`.

    Attributes
    ----------
    W : ndarray
        Weights ``(C, K, D/groups)``, or as `w_layout` has them, initialised as `Conv2DTranspose` does.
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
    >>> layer = nc.Conv1DTranspose(32, 16, 4, stride=2, padding=1, rng=0)
    >>> y = layer.forward(np.ones((8, 100, 32), np.float32))
    >>> y.shape, layer.backward(np.ones_like(y)).shape
    ((8, 200, 16), (8, 100, 32))
    """

    _function = staticmethod(one_dimension.conv_transpose1d)
    _gradients = staticmethod(one_dimension.conv_transpose1d_backward)
    _dimensions = 1
    _transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: one_dimension.Padding = 0,
        output_padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        layout: str = "NHWC",
        w_layout: str | None = None,
        strategy: StrategyName = "auto",
        bias: bool = True,
        dtype: npt.DTypeLike = np.float32,
        rng: Generator = None,
        needs_input_grad: bool = True,
    ) -> None:
        options = dict(
            stride=stride, padding=padding, dilation=dilation, groups=groups, layout=layout, w_layout=w_layout,
            output_padding=output_padding,
        )  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, options, strategy, bias, dtype, rng, needs_input_grad)
