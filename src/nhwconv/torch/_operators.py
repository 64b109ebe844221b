"""Convolutions and their gradients as PyTorch's operators: for whatever looks at calls instead of numbers.

`torch.compile`, `torch.export`, fake tensors, modes, profilers of FLOPs, TorchScript's traces, `torch.func` and
forward-mode derivatives see ``nhwconv::conv2d`` and ``nhwconv::conv2d_backward``, and two of each other kind. The
gradients of a convolution are linear in each of their arguments, and their own gradients are convolutions and gradients
of convolutions. So two operators that know each other can be differentiated any number of times, in both directions.
All of this is the same for every kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils.flop_counter import conv_backward_flop, conv_flop_count, register_flop_formula

from . import _engine
from ._options import KINDS, Kind, Options, unique

__all__ = ["backward", "forward"]

Gradients = tuple[Tensor, Tensor, Tensor]

_library = torch.library.Library("nhwconv", "DEF")
# What a graph hands to an operator has the strides that it had when the graph was made, which its results depend on.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def forward(kind: Kind, input: Any, weight: Any, bias: Any, geometry: Sequence[Any]) -> Tensor:
    """Convolve. The geometry is (stride, padding, dilation, groups, output_padding if transposed, strategy)."""
    y: Tensor = getattr(torch.ops.nhwconv, kind.name).default(input, weight, bias, *geometry)
    return y


def backward(
    kind: Kind, grad: Any, input: Any, weight: Any, geometry: Sequence[Any], needs: Sequence[bool]
) -> Gradients:
    """Return the gradients of input, weight and bias; an empty tensor where one is not needed."""
    *sizes, strategy = geometry
    operator = getattr(torch.ops.nhwconv, f"{kind.name}_backward").default
    found: Gradients = operator(grad, input, weight, *sizes, list(needs), strategy)
    return found


# ---------------------------------------------------------------------------------------------- numbers


def _forward(kind: Kind, input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    options = unique(Options.of(kind, geometry))
    call = _engine.call_for(input, weight, bias, options)
    if call.refused is None:
        return _engine.forward(call, input, weight, bias)
    like = _fake_forward(kind, input, weight, bias, *geometry)
    return like.copy_(_engine.pytorchs_forward(input, weight, bias, options))


def _backward(kind: Kind, grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    *sizes, needs, strategy = rest
    options = unique(Options.of(kind, (*sizes, strategy)))
    call = _engine.call_for(input, weight, None, options)
    if call.refused is None:
        torch._check(
            grad.shape == call.shape and grad.dtype == input.dtype,
            lambda: (
                f"{kind.operator}_backward: grad is {tuple(grad.shape)} of {grad.dtype}, expected {tuple(call.shape)} "
                f"of {input.dtype}"
            ),
        )
        found = _engine.backward(call, input, weight, grad, tuple(needs))
    else:
        found = _engine.pytorchs_backward(input, weight, grad, needs, options)
    dx, dw, db = found
    return (
        input.new_empty(0) if dx is None else dx,
        weight.new_empty(0) if dw is None else dw,
        grad.new_empty(0) if db is None else db,
    )


# Fake tensors have shapes, dtypes and strides, but no numbers: with them torch.compile traces.


def _result_shape(kind: Kind, input: Tensor, weight: Tensor, geometry: Sequence[Any]) -> tuple[Any, ...]:
    options = Options.of(kind, geometry)
    _, d = kind.channels(weight.shape, options.groups)
    return input.shape[0], d, *options.output_size(input.shape[2:], weight.shape[2:])


def _fake_forward(kind: Kind, input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    shape = _result_shape(kind, input, weight, geometry)
    for size in shape[2:]:
        torch._check(size > 0, lambda: f"nhwconv::{kind.name}: the kernel is larger than the padded input")
    channels_last = _engine.gives_channels_last(input, weight)
    return _engine.room_for_result(shape, channels_last, dtype=input.dtype, device=input.device)


def _fake_backward(kind: Kind, grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> Gradients:
    needs = rest[-2]
    return (
        torch.empty_like(input) if needs[0] else input.new_empty(0),
        torch.empty_like(weight) if needs[1] else weight.new_empty(0),
        grad.new_empty(grad.shape[1]) if needs[2] else grad.new_empty(0),
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


def _save(ctx: Any, *tensors: Tensor) -> None:
    """Keep tensors for derivatives in both directions."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _forwards(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Return a rule for the tangents of three tensors as PyTorch calls it, with all tangents and forward mode off."""

    def jvp(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return rule(ctx, *tangents[2:5])

    return jvp


def _of_channels(t: Tensor, like: Sequence[Any]) -> Tensor:
    """Return a tensor of one number for each channel as one of this shape."""
    return t.reshape(-1, *[1] * (len(like) - 2)).expand(like)


class _Convolution(torch.autograd.Function):
    """The derivatives of a convolution."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, mode: bool, *arguments: Any) -> Tensor:
        input, weight, bias, *ctx.geometry = arguments
        ctx.kind = kind
        _save(ctx, input, weight)
        with _below_autograd(mode):
            return forward(kind, input, weight, bias, ctx.geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[2:5])
        found = backward(ctx.kind, grads[0], input, weight, ctx.geometry, needs)
        gradients = (g if needed else None for g, needed in zip(found, needs, strict=True))
        return None, None, *gradients, *[None] * len(ctx.geometry)

    @staticmethod
    @_forwards
    def jvp(ctx: Any, to_input: Tensor | None, to_weight: Tensor | None, to_bias: Tensor | None) -> Tensor:
        input, weight = _primals(ctx)
        terms = [] if to_input is None else [forward(ctx.kind, to_input, weight, None, ctx.geometry)]
        if to_weight is not None:
            terms.append(forward(ctx.kind, input, to_weight, None, ctx.geometry))
        if to_bias is not None:
            terms.append(_of_channels(to_bias, _result_shape(ctx.kind, input, weight, ctx.geometry)))
        return sum(terms[1:], terms[0])


class _Backward(torch.autograd.Function):
    """The derivatives of a convolution's gradients, which are linear in grad, in input and in weight."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, mode: bool, *arguments: Any) -> Gradients:
        grad, input, weight, *sizes, ctx.needs, strategy = arguments
        ctx.kind, ctx.geometry = kind, (*sizes, strategy)
        _save(ctx, grad, input, weight)
        ctx.set_materialize_grads(False)  # zeros would be convolved
        with _below_autograd(mode):
            return backward(kind, grad, input, weight, ctx.geometry, ctx.needs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """From gradients with respect to dx, dw and db, return those with respect to grad, input and weight."""
        grad, input, weight = ctx.saved_tensors
        kind, geometry = ctx.kind, ctx.geometry
        dx, dw, db = (g if needed else None for g, needed in zip(grads, ctx.needs, strict=True))
        to_grad = to_input = to_weight = None
        if ctx.needs_input_grad[2]:
            terms = [] if dx is None else [forward(kind, dx, weight, None, geometry)]
            if db is not None:
                terms.append(_of_channels(db, grad.shape))
            if dw is not None:
                terms.append(forward(kind, input, dw, None, geometry))
            to_grad = sum(terms[1:], terms[0]) if terms else None
        if ctx.needs_input_grad[3] and dw is not None:
            to_input = backward(kind, grad, input, dw, geometry, [True, False, False])[0]
        if ctx.needs_input_grad[4] and dx is not None:
            to_weight = backward(kind, grad, dx, weight, geometry, [False, True, False])[1]
        return None, None, to_grad, to_input, to_weight, *[None] * (len(geometry) + 1)

    @staticmethod
    @_forwards
    def jvp(ctx: Any, to_grad: Tensor, to_input: Tensor, to_weight: Tensor) -> tuple[Tensor, ...]:
        grad, input, weight = _primals(ctx)
        needs = ctx.needs
        found: list[list[Tensor]] = [[], [], []]
        for arguments, moved in (
            ((to_grad, input, weight), needs),
            ((grad, to_input, weight), [False, needs[1], False]),
            ((grad, input, to_weight), [needs[0], False, False]),
        ):
            if all(a is not None for a in arguments) and any(moved):
                results = backward(ctx.kind, *arguments, ctx.geometry, moved)
                for terms, result, has in zip(found, results, moved, strict=True):
                    if has:
                        terms.append(result)
        likes = input, weight, grad.new_empty(grad.shape[1])
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
    """Return (N, B*C, ...) of (B, N, C, ...)."""
    return t.movedim(0, 1).flatten(1, 2)


def _from_channels(t: Tensor, size: int) -> Tensor:
    """Return (B, N, C, ...) of (N, B*C, ...)."""
    return t.unflatten(1, (size, -1)).movedim(1, 0)


def _of_groups(geometry: Sequence[Any], size: int) -> tuple[Any, ...]:
    """Return the geometry of so many convolutions side by side."""
    stride, pads, dilation, groups, *more = geometry
    return stride, pads, dilation, groups * size, *more


def _vmap_forward(
    kind: Kind, info: Any, in_dims: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any
) -> Any:
    size = info.batch_size
    if in_dims[1] is None and in_dims[2] is None:
        x = _front(input, in_dims[0], size)
        return forward(kind, x.flatten(0, 1), weight, bias, geometry).unflatten(0, x.shape[:2]), 0
    x, w = _front(input, in_dims[0], size), _front(weight, in_dims[1], size)
    b = None if bias is None else _front(bias, in_dims[2], size).flatten()
    y = forward(kind, _to_channels(x), w.flatten(0, 1), b, _of_groups(geometry, size))
    return _from_channels(y, size), 0


def _vmap_backward(kind: Kind, info: Any, in_dims: Any, grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> Any:
    *sizes, needs, strategy = rest
    geometry, size = (*sizes, strategy), info.batch_size
    dy, x = _front(grad, in_dims[0], size), _front(input, in_dims[1], size)
    if in_dims[2] is None and not needs[1]:
        dx = backward(kind, dy.flatten(0, 1), x.flatten(0, 1), weight, geometry, [needs[0], False, False])[0]
        dx = dx.unflatten(0, x.shape[:2]) if needs[0] else dx
        db = dy.flatten(3).sum((1, 3)) if needs[2] else grad.new_empty(0)
        return (dx, weight.new_empty(0), db), (0 if needs[0] else None, None, 0 if needs[2] else None)
    w = _front(weight, in_dims[2], size)
    dx, dw, db = backward(kind, _to_channels(dy), _to_channels(x), w.flatten(0, 1), _of_groups(geometry, size), needs)
    results = (
        _from_channels(dx, size) if needs[0] else dx,
        dw.unflatten(0, (size, -1)) if needs[1] else dw,
        db.unflatten(0, (size, -1)) if needs[2] else db,
    )
    return results, tuple(0 if needed else None for needed in needs)


# ------------------------------------------------------------------------------------------------ FLOPs


def _forward_flops(kind: Kind, x: Any, w: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(conv_flop_count(x, w, out_shape, kind.transposed))


def _backward_flops(kind: Kind, dy: Any, x: Any, w: Any, *rest: Any, out_shape: Any = None, **__: Any) -> int:
    stride, pads, dilation, groups = rest[:4]
    needs = rest[4 + kind.transposed]
    sizes = None, stride, pads, dilation, kind.transposed, None, groups
    return int(conv_backward_flop(dy, x, w, *sizes, needs, out_val=out_shape))  # PyTorch's, also in groups


# ------------------------------------------------------------------------------------------ registration


def _register(kind: Kind, name: str, schema: str, number: Any, fake: Any, function: Any, vmap: Any, flops: Any) -> None:
    """Make an operator. Its last argument, the strategy, is left out where it is the default."""
    _library.define(f"{name}({schema}, str strategy='auto')" + _RESULTS[function], tags=_TAGS)
    arguments = schema.count(",") + 2

    def whole(implementation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: implementation(kind, *given, *["auto"][len(given) - arguments + 1 :])

    def differentiable(kind: Kind, *given: Any) -> Any:
        # Of torch.func's transforms, PyTorch's dispatcher has entered one, and leads to the next one by itself.
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, function).apply(kind, torch.is_grad_enabled(), *given)

    operator = f"nhwconv::{name}"
    _library.impl(name, whole(number), "CompositeExplicitAutograd")
    _library.impl(name, whole(differentiable), "Autograd")
    torch.library.register_fake(operator, whole(fake), lib=_library)
    torch.library.register_vmap(
        operator,
        lambda info, dims, *given: whole(lambda kind, *all_: vmap(kind, info, dims, *all_))(*given),
        lib=_library,
    )
    register_flop_formula(getattr(torch.ops.nhwconv, name))(partial(flops, kind))


_RESULTS: dict[Any, str] = {_Convolution: " -> Tensor", _Backward: " -> (Tensor, Tensor, Tensor)"}

for _kind in KINDS.values():
    _n = _kind.dimensions
    _geometry = f"SymInt[{_n}] stride, SymInt[{2 * _n}] padding, SymInt[{_n}] dilation, SymInt groups"
    _geometry += f", SymInt[{_n}] output_padding" * _kind.transposed
    _register(
        _kind, _kind.name, f"Tensor input, Tensor weight, Tensor? bias, {_geometry}",
        _forward, _fake_forward, _Convolution, _vmap_forward, _forward_flops,
    )  # fmt: skip
    _register(
        _kind, f"{_kind.name}_backward", f"Tensor grad, Tensor input, Tensor weight, {_geometry}, bool[3] needs",
        _backward, _fake_backward, _Backward, _vmap_backward, _backward_flops,
    )  # fmt: skip
