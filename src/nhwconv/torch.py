"""PyTorch: `conv2d` and `Conv2d` as in `torch.nn`, on nhwconv's kernels, on the CPU.

Images and weights are NCHW in meaning and channels_last in memory, which is nhwconv's NHWC: they pass as they lie,
in both directions. What nhwconv doesn't do (other dtypes, devices, padding modes), and what is wrong, goes to PyTorch's
own convolution, so that results and errors are PyTorch's; the logger ``nhwconv.torch`` says why, at level DEBUG.

Import this module before the first convolution of the process, so that it can choose OpenMP for Numba's threads: they
are then PyTorch's. Two pools would stall each other. ``torch.set_num_threads`` holds for nhwconv too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numba
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import ops
from .runtime import machine

__all__ = ["Conv2d", "conv2d", "replace_conv2d", "restore_conv2d"]

_log = logging.getLogger(__name__)

#: Tensors of these dtypes are NumPy arrays that nhwconv takes; NumPy has no bfloat16.
_DTYPES = frozenset((torch.float32, torch.float64, torch.float16))


# ---------------------------------------------------------------------------------------------- threads


def _start_threads() -> None:
    """Start Numba's threads: OpenMP's, unless the user or an earlier call chose otherwise.

    PyTorch and Numba then share one libgomp and its pool, whichever was loaded first. A pool of its own, such as tbb's,
    would have to wait for PyTorch's threads, which spin for milliseconds after each operation. And a forked child can
    tell from the started layer that OpenMP would not survive in it.
    """
    config: Any = numba.config
    threads, priority = torch.get_num_threads(), config.THREADING_LAYER_PRIORITY
    if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
        config.THREADING_LAYER_PRIORITY = ["omp", *(name for name in priority if name != "omp")]
    try:
        numba.get_num_threads()
    finally:
        config.THREADING_LAYER_PRIORITY = priority
    torch.set_num_threads(threads)  # OpenMP's number, which the layer has set to its own


_start_threads()


def _threads() -> AbstractContextManager[None]:
    """No more threads than PyTorch's setting allows, which is 1 in a DataLoader's worker."""
    return machine.at_most_threads(torch.get_num_threads())


# -------------------------------------------------------------------------------------------- operators


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    """Return the NHWC array of a tensor; in channels_last it is the same memory."""
    nhwc: npt.NDArray[Any] = _channels_last(tensor.detach()).permute(0, 2, 3, 1).numpy(force=True)
    return nhwc


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """Return the channels_last tensor that an NHWC array is."""
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    # Strides are those of the fake tensors, also where NumPy has none.
    return tensor if array.size else torch.empty_like(tensor, memory_format=torch.channels_last)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _options(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> dict[str, Any]:
    """Return nhwconv's arguments; padding is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    return {
        "stride": tuple(stride), "padding": ((top, bottom), (left, right)), "dilation": tuple(dilation),
        "groups": groups,
    }  # fmt: skip


_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"


@torch.library.custom_op(
    "nhwconv::conv2d",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
)
def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    b = None if bias is None else bias.detach().numpy(force=True)
    with _threads():
        return _tensor(ops.conv2d(_array(input), _array(weight), b, **_options(stride, padding, dilation, groups)))


@torch.library.custom_op(
    "nhwconv::conv2d_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor grad, Tensor input, Tensor weight, {_GEOMETRY}, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor, input: Tensor, weight: Tensor,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of input, weight and bias; an empty tensor where one is not needed."""
    names = [name for name, needed in zip(ops.Gradients._fields, needs, strict=True) if needed]
    with _threads():
        dx, dw, db = ops.conv2d_backward(
            _array(input), _array(weight), _array(grad), needs=names, **_options(stride, padding, dilation, groups)
        )
    return (
        input.new_empty(0) if dx is None else _tensor(dx),
        weight.new_empty(0) if dw is None else _tensor(dw),
        grad.new_empty(0) if db is None else torch.from_numpy(db),
    )


# Fake tensors have shapes, dtypes and strides, but no numbers: with them torch.compile traces.


@_forward.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    sizes = _output_size(input, weight, stride, padding, dilation)
    shape = (input.shape[0], weight.shape[0], *sizes)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)


@_backward.register_fake
def _(
    grad: Tensor, input: Tensor, weight: Tensor,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(input, memory_format=torch.channels_last) if needs[0] else input.new_empty(0),
        torch.empty_like(weight, memory_format=torch.channels_last) if needs[1] else weight.new_empty(0),
        grad.new_empty(weight.shape[0]) if needs[2] else grad.new_empty(0),
    )


def _output_size(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Return (OH, OW), below 1 where the kernel is larger than the padded input."""
    top, bottom, left, right = padding
    height = input.shape[2] + top + bottom - dilation[0] * (weight.shape[2] - 1) - 1
    width = input.shape[3] + left + right - dilation[1] * (weight.shape[3] - 1) - 1
    return height // stride[0] + 1, width // stride[1] + 1


# --------------------------------------------------------------------------------------------- autograd
# The gradients of a convolution are linear in each of their arguments, and their own gradients are convolutions and
# gradients of convolutions. So two operators that know each other can be differentiated any number of times.


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.geometry = inputs[3:]


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    found = _backward(grad, input, weight, *ctx.geometry, needs)
    return *(g if needed else None for g, needed in zip(found, needs, strict=True)), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.geometry, ctx.needs = inputs[3:7], inputs[7]
    ctx.set_materialize_grads(False)  # zeros would be convolved


def _second_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """From gradients with respect to the results of `_backward`, those with respect to grad, input and weight."""
    grad, input, weight = ctx.saved_tensors
    dx, dw, db = (g if needed else None for g, needed in zip(grads, ctx.needs, strict=True))
    to_grad: Tensor | None = None
    to_input: Tensor | None = None
    to_weight: Tensor | None = None
    if ctx.needs_input_grad[0]:
        terms = [] if dx is None else [_forward(dx, weight, db, *ctx.geometry)]
        if dx is None and db is not None:
            terms.append(db[:, None, None].expand_as(grad))
        if dw is not None:
            terms.append(_forward(input, dw, None, *ctx.geometry))
        to_grad = sum(terms[1:], terms[0]) if terms else None
    if ctx.needs_input_grad[1] and dw is not None:
        to_input = _backward(grad, input, dw, *ctx.geometry, [True, False, False])[0]
    if ctx.needs_input_grad[2] and dx is not None:
        to_weight = _backward(grad, dx, weight, *ctx.geometry, [False, True, False])[1]
    return to_grad, to_input, to_weight, None, None, None, None, None


_backward.register_autograd(_second_gradients, setup_context=_keep_backward)


# -------------------------------------------------------------------------------------- public functions


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve a batch of images, as `torch.nn.functional.conv2d` does.

    Works under autograd to any order, and under `torch.compile`. Tensors that are not channels_last are converted
    first, and the result is channels_last always. Under autocast, and for whatever nhwconv doesn't do, this is
    `torch.nn.functional.conv2d`.

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

    Returns
    -------
    Tensor
        ``(N, D, OH, OW)`` or ``(D, OH, OW)``.

    Raises
    ------
    RuntimeError, TypeError, ValueError
        PyTorch's own, before any work.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> x = torch.ones(8, 3, 28, 28).to(memory_format=torch.channels_last)
    >>> nhwconv.torch.conv2d(x, torch.ones(16, 3, 3, 3), padding=1).shape
    torch.Size([8, 16, 28, 28])
    """
    geometry = _geometry(input, weight, bias, stride, padding, dilation, groups)
    if isinstance(geometry, str):
        if not torch.compiler.is_compiling():
            _log.debug("%s: PyTorch's own convolution runs", geometry)
        own: Callable[..., Tensor] = functional.conv2d
        return own(input, weight, bias, stride, padding, dilation, groups)
    if input.dim() == 3:
        return _forward(_channels_last(input[None]), _channels_last(weight), bias, *geometry)[0]
    return _forward(_channels_last(input), _channels_last(weight), bias, *geometry)


def _geometry(
    input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> tuple[list[int], list[int], list[int], int] | str:
    """Return the operators' last four arguments, or the reason why this is left to PyTorch."""
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
            return f"{name} is not a dense tensor on the CPU"
        if tensor.dtype not in _DTYPES or tensor.dtype is not input.dtype:
            return f"{name} has dtype {tensor.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    strides, dilations = _pair(stride, 1), _pair(dilation, 1)
    if strides is None or dilations is None or not isinstance(groups, int) or groups < 1:
        return "stride, dilation or groups is not what nhwconv takes"
    if input.dim() not in (3, 4) or weight.dim() != 4 or min(weight.shape) < 1:
        return f"input has {input.dim()} axes and weight the shape {tuple(weight.shape)}"
    d, c, kh, kw = weight.shape
    if input.shape[-3] != c * groups or d % groups or (bias is not None and bias.shape != (d,)):
        return f"shapes do not go together: {tuple(input.shape)} and {tuple(weight.shape)} in {groups} groups"
    pads = _pads(padding, (kh, kw), strides, dilations)
    if pads is None:
        return f"padding is {padding!r}"
    image = input if input.dim() == 4 else input[None]
    if min(_output_size(image, weight, strides, pads, dilations)) < 1:
        return "the kernel is larger than the padded input"
    return list(strides), pads, list(dilations), groups


def _pair(value: Any, least: int) -> tuple[int, int] | None:
    """Return a pair of ints from an int, one or two of them; None for anything else."""
    both = (value,) if isinstance(value, int) else value
    if not isinstance(both, (tuple, list)) or len(both) not in (1, 2):
        return None
    if any(not isinstance(v, int) or v < least for v in both):
        return None
    return both[0], both[-1]


def _pads(
    padding: Any, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> list[int] | None:
    """Return (top, bottom, left, right); None for what nhwconv doesn't do."""
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":
        if stride != (1, 1):
            return None
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [half for total in totals for half in (total // 2, total - total // 2)]
    pair = _pair(padding, 0)
    return None if pair is None else [pair[0], pair[0], pair[1], pair[1]]


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on `nhwconv.torch.conv2d`: the same arguments, parameters and ``state_dict``.

    Padding modes other than "zeros" are left to PyTorch. ``.to(memory_format=torch.channels_last)`` on the model saves
    a conversion of the weights at each call.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> layer = nhwconv.torch.Conv2d(3, 16, 3, padding="same")
    >>> layer(torch.ones(8, 3, 28, 28)).shape
    torch.Size([8, 16, 28, 28])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            if not torch.compiler.is_compiling():
                _log.debug("padding_mode is %r: PyTorch's own convolution runs", self.padding_mode)
            return super()._conv_forward(input, weight, bias)
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def replace_conv2d(model: nn.Module) -> list[str]:
    """Make every eligible `torch.nn.Conv2d` of a model an `nhwconv.torch.Conv2d`, in place.

    A layer keeps its identity, parameters and hooks: only its class changes, as `torch.nn.utils.parametrize` does it.
    Eligible are layers of exactly that class, on the CPU, padded with zeros, in a dtype that nhwconv takes.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it may be a layer itself.

    Returns
    -------
    list of str
        The names of the layers that were swapped, as in ``model.named_modules()``.

    Examples
    --------
    >>> import torch, nhwconv.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU())
    >>> nhwconv.torch.replace_conv2d(model)
    ['0']
    >>> nhwconv.torch.restore_conv2d(model)
    ['0']
    """
    return _change(model, nn.Conv2d, Conv2d)


def restore_conv2d(model: nn.Module) -> list[str]:
    """Undo `replace_conv2d`: make every `nhwconv.torch.Conv2d` of a model a `torch.nn.Conv2d`, in place.

    Parameters
    ----------
    model : torch.nn.Module
        The model.

    Returns
    -------
    list of str
        The names of the layers that were swapped.
    """
    return _change(model, Conv2d, nn.Conv2d)


def _change(model: nn.Module, old: type[nn.Conv2d], new: type[nn.Conv2d]) -> list[str]:
    changed = []
    for name, module in model.named_modules():
        if type(module) is old and (new is nn.Conv2d or _eligible(module)):
            module.__class__ = new
            changed.append(name)
    return changed


def _eligible(layer: nn.Conv2d) -> bool:
    weight = layer.weight
    return layer.padding_mode == "zeros" and weight.dtype in _DTYPES and weight.device.type == "cpu"
