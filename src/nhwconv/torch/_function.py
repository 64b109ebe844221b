"""The convolutions of `torch.nn.functional`, and the way that a call takes: one for all of them.

- Eager calls, which are most, go to `_engine` through one `torch.autograd.Function`, with as little Python as possible.
- Where something looks at calls instead of numbers (`_operators` says what), they go through PyTorch's operators.
- What nhwconv doesn't do, and what is wrong, goes to PyTorch's own convolution, with PyTorch's results and errors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.utils._expanded_weights import ExpandedWeight
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _engine, _operators
from ._options import KINDS, Kind, Options, options_for, parse

__all__ = ["conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d"]

_log = logging.getLogger("nhwconv.torch")

_Recorded: Any = torch._C._profiler._RecordFunctionFast
_set_tracing_state: Any = torch._C._set_tracing_state
_PLAIN, _STRIDED = (Tensor, Parameter), torch.strided


def _is_plain(t: Any) -> bool:
    """Return whether a tensor is nothing but numbers in the CPU's memory."""
    return type(t) in _PLAIN and t.is_cpu and t.layout is _STRIDED and not t.is_neg()


def _is_watched() -> bool:
    """Return whether somebody looks at calls: a transform, a mode, a trace, forward-mode derivatives."""
    return bool(
        _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack()
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


class _Eager(torch.autograd.Function):
    """A convolution of plain tensors that nobody looks at.

    A profiler that is on sees each pass under the operator's name, with its tensors.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call, input, weight, bias = arguments
        ctx.save_for_backward(input, weight)
        ctx.call = call
        return _forward(call, input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad, call, needs = grads[0], ctx.call, ctx.needs_input_grad[1:]
        # The graph of a second derivative is made while gradients are enabled.
        # Batched gradients are the only tensors that torch.autograd makes by its older vmap, which nothing else tells.
        batched = _C._functorch.is_legacy_batchedtensor(grad)
        if torch.is_grad_enabled() or batched or not _is_plain(grad) or _is_watched() or torch.compiler.is_compiling():
            found = _operators.backward(call.kind, grad, input, weight, call.geometry, needs)
            return None, *(g if needed else None for g, needed in zip(found, needs, strict=True))
        if torch.autograd._profiler_enabled():
            with _Recorded(call.kind.operator + "_backward", [grad, input, weight], {}):
                return None, *_engine.backward(call, input, weight, grad, needs)
        return None, *_engine.backward(call, input, weight, grad, needs)


#: `Function.apply` without what it does for `torch.func`, whose calls do not come here.
_apply: Callable[..., Tensor] = super(torch.autograd.Function, _Eager).apply


def _forward(call: _engine.Call, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve, without autograd."""
    if torch.autograd._profiler_enabled():
        with _Recorded(call.kind.operator, [input, weight, bias], {}):
            return _engine.forward(call, input, weight, bias)
    return _engine.forward(call, input, weight, bias)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    strategy: str | tuple[str, ...] = "auto",
) -> Tensor:
    """Convolve a batch of images, as `torch.nn.functional.conv2d` does.

    The result lies in memory as PyTorch's would: channels_last where `input` or `weight` are, contiguous otherwise; and
    gradients lie as their tensors do. Derivatives of any order, backward and forward, and the transforms of
    `torch.func` work, and so do `torch.compile` and `torch.export`. Under autocast, and for whatever nhwconv doesn't
    do, this is `torch.nn.functional.conv2d`.

    Parameters
    ----------
    input : Tensor
        Images ``(N, C, H, W)`` or ``(C, H, W)``: float32, float64 or float16, on the CPU.
    weight : Tensor
        Kernels ``(D, C/groups, KH, KW)``.
    bias : Tensor, optional
        ``(D,)``.
    stride, dilation : int or pair
        For rows and columns.
    padding : int, pair, "valid" or "same"
        Zeros around each image.
    groups : int
        As in `nhwconv.conv2d`.
    strategy : str or tuple of str
        A name from `nhwconv.strategies`, a tuple of names to choose from, or "auto"; for the gradients as well.

    Returns
    -------
    Tensor
        ``(N, D, OH, OW)`` or ``(D, OH, OW)``.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        PyTorch's own, before any work; a ValueError where the strategy cannot do the convolution.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> x = torch.ones(8, 3, 28, 28).to(memory_format=torch.channels_last)
    >>> nhwconv.torch.conv2d(x, torch.ones(16, 3, 3, 3), padding=1).shape
    torch.Size([8, 16, 28, 28])
    """
    return _convolve(_CONV2D, strategy, input, weight, bias, stride, padding, dilation, groups)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    strategy: str | tuple[str, ...] = "auto",
) -> Tensor:
    """Convolve a batch of sequences, as `torch.nn.functional.conv1d` does, and `conv2d` images of one row.

    In PyTorch channels come before positions, so `input` is transposed first, unless it is itself a transposed
    ``(N, L, C)``, and so is the result.

    Parameters
    ----------
    input : Tensor
        Sequences ``(N, C, L)`` or ``(C, L)``.
    weight : Tensor
        Kernels ``(D, C/groups, K)``.
    bias : Tensor, optional
        ``(D,)``.
    stride, padding, dilation, groups, strategy
        As in `conv2d`, for one dimension.

    Returns
    -------
    Tensor
        ``(N, D, OL)`` or ``(D, OL)``.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As in `conv2d`.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> nhwconv.torch.conv1d(torch.ones(8, 16, 100), torch.ones(32, 16, 5), padding="same").shape
    torch.Size([8, 32, 100])
    """
    return _convolve(_CONV1D, strategy, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    strategy: str | tuple[str, ...] = "auto",
) -> Tensor:
    """Convolve a batch of images by the transpose of a convolution, as `torch.nn.functional.conv_transpose2d` does.

    Parameters
    ----------
    input : Tensor
        Images ``(N, C, H, W)`` or ``(C, H, W)``.
    weight : Tensor
        Kernels ``(C, D/groups, KH, KW)``: those of the convolution from D to C channels whose transpose this is.
    bias : Tensor, optional
        ``(D,)``.
    stride, dilation : int or pair
        For rows and columns, of that convolution.
    padding : int or pair
        What it pads its input with, and so what is cut off here on each side.
    output_padding : int or pair
        More outputs at the end of rows and columns, fewer than the stride or the dilation.
    groups, strategy
        As in `conv2d`.

    Returns
    -------
    Tensor
        ``(N, D, OH, OW)`` or ``(D, OH, OW)``, in memory as the result of `conv2d` lies.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As in `conv2d`.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> x = torch.ones(8, 32, 14, 14).to(memory_format=torch.channels_last)
    >>> nhwconv.torch.conv_transpose2d(x, torch.ones(32, 16, 2, 2), stride=2).shape
    torch.Size([8, 16, 28, 28])
    """
    return _convolve(
        _CONV_TRANSPOSE2D, strategy, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    strategy: str | tuple[str, ...] = "auto",
) -> Tensor:
    """Convolve a batch of sequences by the transpose of a convolution: `conv_transpose2d` in one dimension.

    Parameters
    ----------
    input : Tensor
        Sequences ``(N, C, L)`` or ``(C, L)``.
    weight : Tensor
        Kernels ``(C, D/groups, K)``.
    bias : Tensor, optional
        ``(D,)``.
    stride, padding, output_padding, groups, dilation, strategy
        As in `conv_transpose2d`, for one dimension.

    Returns
    -------
    Tensor
        ``(N, D, OL)`` or ``(D, OL)``.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        As in `conv2d`.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> nhwconv.torch.conv_transpose1d(torch.ones(8, 32, 100), torch.ones(32, 16, 4), stride=2, padding=1).shape
    torch.Size([8, 16, 200])
    """
    return _convolve(
        _CONV_TRANSPOSE1D, strategy, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


_CONV1D, _CONV2D = KINDS["conv1d"], KINDS["conv2d"]
_CONV_TRANSPOSE1D, _CONV_TRANSPOSE2D = KINDS["conv_transpose1d"], KINDS["conv_transpose2d"]
for _public in (conv1d, conv2d, conv_transpose1d, conv_transpose2d):
    KINDS[_public.__name__].public = _public


def _convolve(kind: Kind, strategy: Any, input: Any, weight: Any, bias: Any, *given: Any) -> Tensor:
    """Do what PyTorch's function of this kind does with these arguments."""
    compiling = torch.compiler.is_compiling()
    if not compiling and has_torch_function_variadic(input, weight, bias):
        overridden: Tensor = handle_torch_function(
            kind.public, (input, weight, bias), input, weight, bias, *given, strategy=strategy
        )
        return overridden
    options = (parse if compiling else options_for)(kind, given, strategy)
    if _C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu"):
        options = "autocast is on"
    plain = not compiling and _is_plain(input) and _is_plain(weight) and (bias is None or _is_plain(bias))
    if isinstance(options, str):
        result: Tensor | str = options
    elif plain and not _is_watched():
        result = _eagerly(input, weight, bias, options)
    else:
        result = _by_operators(input, weight, bias, options)
    if not isinstance(result, str):
        return result
    if not compiling:
        _log.debug("%s: PyTorch's own convolution runs", result)
    return kind.own(input, weight, bias, *given)


def _eagerly(input: Tensor, weight: Tensor, bias: Tensor | None, options: Options) -> Tensor | str:
    """Convolve plain tensors, or return why nhwconv doesn't."""
    if input.dim() == options.kind.dimensions + 1:
        found = _eagerly(input[None], weight, bias, options)
        return found if isinstance(found, str) else found[0]
    call = _engine.call_for(input, weight, bias, options)
    if call.refused is not None:
        return call.refused
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _apply(call, input, weight, bias) if call.left is None else call.left
    return _forward(call, input, weight, bias)


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Look at shapes without `torch.jit.trace`, which would record what is done with them, and warn."""
    state = None if torch.compiler.is_compiling() else _C._get_tracing_state()
    if state is not None:
        _set_tracing_state(None)
    try:
        yield
    finally:
        if state is not None:
            _set_tracing_state(state)


def _by_operators(input: Any, weight: Any, bias: Any, options: Options) -> Tensor | str:
    """Convolve tensors of any kind by PyTorch's operators, or return why nhwconv doesn't."""
    if isinstance(input, Tensor) and input.dim() == options.kind.dimensions + 1:
        found = _by_operators(input[None], weight, bias, options)
        return found if isinstance(found, str) else found[0]
    with _unrecorded():
        refused = _engine.refusal(input, weight, bias, options)
        geometry = options.geometry(weight.shape[2:]) if refused is None else ()
    if refused is None and not torch.compiler.is_dynamo_compiling() and torch.onnx.is_in_onnx_export():
        refused = "ONNX knows no operator of nhwconv's"
    if refused is not None:
        return refused
    return _operators.forward(options.kind, input, weight, bias, geometry)


class _PerSample:
    """What PyTorch's ExpandedWeights, gradients of each sample by tensors of their own class, have for a function."""

    def __init__(self, kind: Kind) -> None:
        self.own = kind.own

    def apply(self, names: tuple[str, ...], function: Any, *arguments: Any) -> Tensor:
        """Take PyTorch's convolution, whose gradients of each sample they know."""
        known = ExpandedWeight.handled_functions[self.own]
        y: Tensor = known.apply((), self.own, *arguments[:7])
        return y


for _kind in KINDS.values():
    if _kind.own in ExpandedWeight.handled_functions:
        ExpandedWeight.handled_functions[_kind.public] = _PerSample(_kind)
