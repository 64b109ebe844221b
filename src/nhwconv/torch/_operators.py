"""The convolution and its gradients as PyTorch's operators: for whatever looks at calls instead of numbers.

`torch.compile`, `torch.export`, fake tensors, modes, profilers of FLOPs, TorchScript's traces, `torch.func` and
forward-mode derivatives see ``nhwconv::conv2d`` and ``nhwconv::conv2d_backward``. The gradients of a convolution are
linear in each of their arguments, and their own gradients are convolutions and gradients of convolutions. So two
operators that know each other can be differentiated any number of times, in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_backward_flop, conv_flop_count, register_flop_formula

from . import _engine
from ._options import Options, unique

__all__ = ["conv2d", "conv2d_backward"]

Gradients = tuple[Tensor, Tensor, Tensor]

_library = torch.library.Library("nhwconv", "DEF")
_GEOMETRY = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, SymInt groups"
# What a graph hands to an operator has the strides that it had when the graph was made, which its results depend on.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    f"conv2d(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, str strategy='auto') -> Tensor", tags=_TAGS
)
_library.define(
    f"conv2d_backward(Tensor grad, Tensor input, Tensor weight, {_GEOMETRY}, bool[3] needs, str strategy='auto')"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

#: ``(input, weight, bias, *geometry)``; the geometry is (stride, padding, dilation, groups, strategy).
conv2d: Callable[..., Tensor] = torch.ops.nhwconv.conv2d.default


def conv2d_backward(grad: Any, input: Any, weight: Any, geometry: Sequence[Any], needs: Sequence[bool]) -> Gradients:
    """Return the gradients of input, weight and bias; an empty tensor where one is not needed."""
    *sizes, strategy = geometry
    found: Gradients = torch.ops.nhwconv.conv2d_backward.default(grad, input, weight, *sizes, list(needs), strategy)
    return found


# ---------------------------------------------------------------------------------------------- numbers


def _call(x: Tensor, w: Tensor, b: Tensor | None, geometry: Sequence[Any]) -> _engine.Call:
    """Return what is known of a convolution with these last arguments of the operators."""
    stride, pads, dilation, groups, strategy = geometry
    return _engine.call_for(x, w, b, unique(Options(tuple(stride), tuple(pads), tuple(dilation), groups, strategy)))


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    call = _call(input, weight, bias, geometry)
    if call.refused is None:
        return _engine.forward(call, input, weight, bias)
    like = _fake_forward(input, weight, bias, *geometry)
    return like.copy_(_engine.pytorchs_forward(input, weight, bias, *geometry[:4]))


def _backward(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    *sizes, needs, strategy = rest
    geometry = *sizes, strategy
    call = _call(input, weight, None, geometry)
    if call.refused is None:
        found = _engine.backward(call, input, weight, grad, needs)
    else:
        found = _engine.pytorchs_backward(input, weight, grad, needs, *sizes)
    dx, dw, db = found
    return (
        input.new_empty(0) if dx is None else dx,
        weight.new_empty(0) if dw is None else dw,
        grad.new_empty(0) if db is None else db,
    )


# Fake tensors have shapes, dtypes and strides, but no numbers: with them torch.compile traces.


def _fake_forward(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    stride, pads, dilation = geometry[:3]
    size = _engine.output_size(input, weight, stride, pads, dilation)
    torch._check(size[0] > 0 and size[1] > 0, lambda: "nhwconv::conv2d: the kernel is larger than the padded input")
    channels_last = _engine.gives_channels_last(input, weight)
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    shape = (input.shape[0], weight.shape[0], *size)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=format_)


def _fake_backward(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    needs = rest[4]
    return (
        torch.empty_like(input) if needs[0] else input.new_empty(0),
        torch.empty_like(weight) if needs[1] else weight.new_empty(0),
        grad.new_empty(weight.shape[0]) if needs[2] else grad.new_empty(0),
    )


# --------------------------------------------------------------------------------------------- autograd


@contextmanager
def _below_autograd(mode: bool) -> Iterator[None]:
    """Let operators of a block skip autograd, at this level of torch.func's transforms, with gradients on or off.

    A `torch.autograd.Function` switches both kinds of derivatives off, and that would reach the levels below, whose
    derivatives would be missing without a word.
    """
    with torch.set_grad_enabled(mode), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        yield


def _primals(ctx: Any) -> tuple[Tensor, ...]:
    """Return what was saved, without its tangents: with them, a tangent would get one of its own."""
    return tuple(forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors)


class _Convolution(torch.autograd.Function):
    """The derivatives of ``nhwconv::conv2d``."""

    @staticmethod
    def forward(ctx: Any, mode: bool, *arguments: Any) -> Tensor:
        input, weight, _, *ctx.geometry = arguments
        ctx.save_for_backward(input, weight)
        ctx.save_for_forward(input, weight)
        with _below_autograd(mode):
            return conv2d(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:4])
        found = conv2d_backward(grads[0], input, weight, ctx.geometry, needs)
        gradients = (g if needed else None for g, needed in zip(found, needs, strict=True))
        return None, *gradients, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        with forward_ad._set_fwd_grad_enabled(True):
            return _Convolution._jvp(ctx, *tangents)

    @staticmethod
    def _jvp(ctx: Any, *tangents: Any) -> Tensor:
        input, weight = _primals(ctx)
        to_input, to_weight, to_bias = tangents[1:4]
        terms = [] if to_input is None else [conv2d(to_input, weight, None, *ctx.geometry)]
        if to_weight is not None:
            terms.append(conv2d(input, to_weight, None, *ctx.geometry))
        if to_bias is not None:
            shape = _fake_forward(input, weight, None, *ctx.geometry).shape
            terms.append(to_bias[:, None, None].expand(shape))
        return sum(terms[1:], terms[0])


class _Backward(torch.autograd.Function):
    """The derivatives of ``nhwconv::conv2d_backward``, which is linear in grad, in input and in weight."""

    @staticmethod
    def forward(ctx: Any, mode: bool, *arguments: Any) -> Gradients:
        grad, input, weight, *sizes, ctx.needs, strategy = arguments
        ctx.geometry = *sizes, strategy
        ctx.save_for_backward(grad, input, weight)
        ctx.save_for_forward(grad, input, weight)
        ctx.set_materialize_grads(False)  # zeros would be convolved
        with _below_autograd(mode):
            return conv2d_backward(grad, input, weight, ctx.geometry, ctx.needs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """From gradients with respect to dx, dw and db, return those with respect to grad, input and weight."""
        grad, input, weight = ctx.saved_tensors
        dx, dw, db = (g if needed else None for g, needed in zip(grads, ctx.needs, strict=True))
        to_grad = to_input = to_weight = None
        if ctx.needs_input_grad[1]:
            terms = [] if dx is None else [conv2d(dx, weight, None, *ctx.geometry)]
            if db is not None:
                terms.append(db[:, None, None].expand_as(grad))
            if dw is not None:
                terms.append(conv2d(input, dw, None, *ctx.geometry))
            to_grad = sum(terms[1:], terms[0]) if terms else None
        if ctx.needs_input_grad[2] and dw is not None:
            to_input = conv2d_backward(grad, input, dw, ctx.geometry, [True, False, False])[0]
        if ctx.needs_input_grad[3] and dx is not None:
            to_weight = conv2d_backward(grad, dx, weight, ctx.geometry, [False, True, False])[1]
        return None, to_grad, to_input, to_weight, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        with forward_ad._set_fwd_grad_enabled(True):
            return _Backward._jvp(ctx, *tangents)

    @staticmethod
    def _jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        grad, input, weight = _primals(ctx)
        to_grad, to_input, to_weight = tangents[1:4]
        needs = ctx.needs
        found: list[list[Tensor]] = [[], [], []]
        for arguments, moved in (
            ((to_grad, input, weight), needs),
            ((grad, to_input, weight), [False, needs[1], False]),
            ((grad, input, to_weight), [needs[0], False, False]),
        ):
            if all(a is not None for a in arguments) and any(moved):
                results = conv2d_backward(*arguments, ctx.geometry, moved)
                for terms, result, has in zip(found, results, moved, strict=True):
                    if has:
                        terms.append(result)
        likes = input, weight, weight[:, 0, 0, 0]
        return tuple(
            sum(terms[1:], terms[0]) if terms else torch.zeros_like(like) if needed else like.new_empty(0)
            for terms, like, needed in zip(found, likes, needs, strict=True)
        )


# ------------------------------------------------------------------------------------------------- vmap
# A batch of convolutions with one weight is a convolution of more images; with a weight each, one of more groups.


def _front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """Return a tensor whose first axis is the batch's."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _to_channels(t: Tensor) -> Tensor:
    """Return (N, B*C, H, W) of (B, N, C, H, W)."""
    return t.movedim(0, 1).flatten(1, 2)


def _from_channels(t: Tensor, size: int) -> Tensor:
    """Return (B, N, C, H, W) of (N, B*C, H, W)."""
    return t.unflatten(1, (size, -1)).movedim(1, 0)


def _vmap_forward(info: Any, in_dims: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Any:
    size = info.batch_size
    stride, pads, dilation, groups, strategy = geometry
    if in_dims[1] is None and in_dims[2] is None:
        x = _front(input, in_dims[0], size)
        return conv2d(x.flatten(0, 1), weight, bias, *geometry).unflatten(0, x.shape[:2]), 0
    x, w = _front(input, in_dims[0], size), _front(weight, in_dims[1], size)
    b = None if bias is None else _front(bias, in_dims[2], size).flatten()
    y = conv2d(_to_channels(x), w.flatten(0, 1), b, stride, pads, dilation, groups * size, strategy)
    return _from_channels(y, size), 0


def _vmap_backward(info: Any, in_dims: Any, grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> Any:
    *sizes, needs, strategy = rest
    size = info.batch_size
    stride, pads, dilation, groups = sizes
    dy, x = _front(grad, in_dims[0], size), _front(input, in_dims[1], size)
    if in_dims[2] is None and not needs[1]:
        dx = conv2d_backward(dy.flatten(0, 1), x.flatten(0, 1), weight, (*sizes, strategy), [needs[0], False, False])[0]
        dx = dx.unflatten(0, x.shape[:2]) if needs[0] else dx
        db = dy.sum((1, 3, 4)) if needs[2] else grad.new_empty(0)
        return (dx, weight.new_empty(0), db), (0 if needs[0] else None, None, 0 if needs[2] else None)
    w = _front(weight, in_dims[2], size)
    many = stride, pads, dilation, groups * size, strategy
    dx, dw, db = conv2d_backward(_to_channels(dy), _to_channels(x), w.flatten(0, 1), many, needs)
    results = (
        _from_channels(dx, size) if needs[0] else dx,
        dw.unflatten(0, (size, -1)) if needs[1] else dw,
        db.unflatten(0, (size, -1)) if needs[2] else db,
    )
    return results, tuple(0 if needed else None for needed in needs)


# ------------------------------------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.nhwconv.conv2d)
def _forward_flops(x: Any, w: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(conv_flop_count(x, w, out_shape))


@register_flop_formula(torch.ops.nhwconv.conv2d_backward)
def _backward_flops(dy: Any, x: Any, w: Any, *rest: Any, out_shape: Any = None, **__: Any) -> int:
    stride, pads, dilation, groups, needs = rest[:5]
    sizes = None, stride, pads, dilation, False, None, groups
    return int(conv_backward_flop(dy, x, w, *sizes, needs, out_val=out_shape))  # PyTorch's, also in groups


def _register(name: str, arguments: int, number: Any, fake: Any, function: Any, vmap: Any) -> None:
    """Register what an operator does. Its last argument, the strategy, is left out where it is the default."""

    def whole(implementation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: implementation(*given, *["auto"][len(given) - arguments + 1 :])

    def differentiable(*given: Any) -> Any:
        # Of torch.func's transforms, PyTorch's dispatcher has entered one, and leads to the next one by itself.
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, function).apply(torch.is_grad_enabled(), *given)

    operator = f"nhwconv::{name}"
    _library.impl(name, whole(number), "CompositeExplicitAutograd")
    _library.impl(name, whole(differentiable), "Autograd")
    torch.library.register_fake(operator, whole(fake), lib=_library)
    torch.library.register_vmap(
        operator, lambda info, dims, *given: whole(lambda *all_: vmap(info, dims, *all_))(*given), lib=_library
    )


_register("conv2d", 8, _forward, _fake_forward, _Convolution, _vmap_forward)
_register("conv2d_backward", 9, _backward, _fake_backward, _Backward, _vmap_backward)
