"""Derivatives of every kind and order: `torch.func`, forward mode, batched gradients, against PyTorch's convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn import functional
from torch.utils._pytree import tree_flatten

import nhwconv.torch
from nhwconv.torch import _engine

pytestmark = [
    # PyTorch's transforms script something of their own, which is deprecated.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning"),  # linearize, with any function
]

GENERATOR = torch.Generator().manual_seed(0)
X, W, B = (torch.randn(shape, dtype=torch.float64, generator=GENERATOR) for shape in ((2, 4, 5, 4), (6, 2, 3, 2), (6,)))

#: Convolutions of images and weights as those, by the functions of a module: PyTorch's or ours. Without output padding,
#: with which PyTorch's own third derivatives raise an error.
VARIANTS: dict[str, Callable[[Any], Callable[..., Tensor]]] = {
    "conv2d": lambda m: lambda x, w, b: m.conv2d(x, w, b, stride=(2, 1), padding=1, groups=2),
    "conv2d, same": lambda m: lambda x, w, b: m.conv2d(x, w, b, padding="same", groups=2, dilation=(1, 2)),
    "conv1d": lambda m: lambda x, w, b: m.conv1d(x[..., 0], w[..., 1], b, stride=2, padding=2, groups=2),
    "conv_transpose2d": lambda m: (
        lambda x, w, b: m.conv_transpose2d(x, w[:4], None if b is None else b[2:], (2, 1), (1, 0), 0, 2, (1, 2))
    ),
    "conv_transpose1d": lambda m: (
        lambda x, w, b: m.conv_transpose1d(x[..., 0], w[:4, :, :, 0], None if b is None else b[2:], 2, 1, 0, 2)
    ),
}


def loss(conv: Any) -> Callable[..., Tensor]:
    return lambda x, w, b: conv(x, w, b).pow(3).sum()


def several(t: Tensor, number: int = 3) -> Tensor:
    return torch.stack([t + i for i in range(number)])


def dual(conv: Any) -> Any:
    with forward_ad.dual_level():
        y = conv(forward_ad.make_dual(X, X + 1), forward_ad.make_dual(W, W * W), forward_ad.make_dual(B, B - 1))
        return tuple(forward_ad.unpack_dual(y))


def dual_over_backward(conv: Any) -> Any:
    x = X.clone().requires_grad_()
    with forward_ad.dual_level():
        y = conv(x, forward_ad.make_dual(W.clone().requires_grad_(), W * W), B).pow(3).sum()
        return tuple(forward_ad.unpack_dual(torch.autograd.grad(y, x, create_graph=True)[0]))


def backward_over_dual(conv: Any) -> Any:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    with forward_ad.dual_level():
        y = conv(forward_ad.make_dual(x, X + 1), forward_ad.make_dual(w, W * W), B)
        return torch.autograd.grad(forward_ad.unpack_dual(y).tangent.square().sum(), (x, w))


def batched_gradients(conv: Any) -> Any:
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    y = conv(x, w, B)
    return torch.autograd.grad(y, (x, w), several(torch.ones_like(y)), is_grads_batched=True)


def gradients_off_inside(conv: Any) -> Any:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = conv(x, W, B)
        return (y * x.sum()).sum()

    return grad(lambda x: grad(function)(x).square().sum())(X)


def after_a_transform(conv: Any) -> Any:
    """Use what a transform of `torch.func` left behind, after it is over."""
    kept = []

    def function(w: Tensor) -> Tensor:
        kept.append(w)
        return conv(X, w, B).sum()

    grad(function)(W)
    return conv(X, kept[0], B)


#: What is computed of ``conv(x, w, b)``, which has the options of each variant already.
CASES: dict[str, Callable[[Any], Any]] = {
    "grad": lambda c: grad(loss(c), (0, 1, 2))(X, W, B),
    "vjp": lambda c: (lambda y, pull: (y, pull(y)))(*vjp(c, X, W, B)),
    "jvp": lambda c: jvp(c, (X, W, B), (X + 1, W * W, B - 1)),
    "jvp of weights": lambda c: jvp(lambda w: c(X, w, None), (W,), (W * W,)),
    "jvp of a bias": lambda c: jvp(lambda b: c(X, W, b), (B,), (B * B,)),
    "linearize": lambda c: linearize(lambda w: c(X, w, B), W)[1](W * W),
    "jacrev": lambda c: jacrev(c, (0, 1, 2))(X, W, B),
    "jacfwd": lambda c: jacfwd(c, (0, 1, 2))(X, W, B),
    "hessian": lambda c: hessian(loss(c), (0, 1, 2))(X, W, B),
    "forward over forward": lambda c: jacfwd(jacfwd(loss(c), (1, 2)), (1, 2))(X, W, B),
    "backward over backward": lambda c: jacrev(jacrev(loss(c), (1, 2)), (1, 2))(X, W, B),
    "backward over forward": lambda c: jacrev(jacfwd(loss(c), (1, 2)), (1, 2))(X, W, B),
    "third order": lambda c: grad(lambda w: grad(lambda x: grad(loss(c), 1)(x, w, B).square().sum())(X).sum())(W),
    "third order forward": lambda c: jvp(
        lambda w: jvp(lambda x: grad(loss(c), 1)(x, w, B), (X,), (X + 1,))[1], (W,), (W * W,)
    ),
    "gradient of a jvp": lambda c: grad(lambda w: jvp(c, (X, w, B), (X + 1, w * w, B))[1].square().sum())(W),
    "vmap of images": lambda c: vmap(lambda x: c(x, W, B))(several(X)),
    "vmap of single images": lambda c: vmap(lambda x: c(x, W, B))(X),
    "vmap of weights": lambda c: vmap(lambda w: c(X, w, B))(several(W)),
    "vmap of biases": lambda c: vmap(lambda b: c(X, W, b))(several(B)),
    "vmap along other axes": lambda c: vmap(lambda x, w: c(x, w, None), (1, 2), 1)(
        several(X).movedim(0, 1), several(W).movedim(0, 2)
    ),
    "vmap in vmap": lambda c: vmap(lambda x: vmap(lambda w: c(x, w, B))(several(W, 2)))(several(X)),
    "vmap of a jvp": lambda c: vmap(lambda t: jvp(lambda w: c(X, w, B), (W,), (t,))[1])(several(W)),
    "gradients of each sample": lambda c: vmap(grad(loss(c), (0, 1, 2)), (0, None, None))(X[:, None], W, B),
    "gradients of an ensemble": lambda c: vmap(grad(loss(c), (0, 1, 2)), (None, 0, 0))(X, several(W), several(B)),
    "input gradients of each sample": lambda c: vmap(grad(loss(c)), (0, None, None))(X[:, None], W, B),
    "hessian of each sample": lambda c: vmap(hessian(loss(c), 2), (0, None, None))(X[:, None], W, B),
    "dual numbers": dual,
    "dual over backward": dual_over_backward,
    "backward over dual": backward_over_dual,
    "batched gradients": batched_gradients,
    "torch.autograd.functional": lambda c: (
        torch.autograd.functional.hessian(lambda w: loss(c)(X, w, B), W),
        torch.autograd.functional.jvp(lambda w: c(X, w, B), W, W + 1),
        torch.autograd.functional.jacobian(lambda w: c(X, w, B), W, vectorize=True, strategy="forward-mode"),
        torch.autograd.functional.jacobian(lambda w: c(X, w, B), W, vectorize=True),
    ),
    "gradients off inside": gradients_off_inside,
    "after a transform": after_a_transform,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CASES)
def test_transforms_are_pytorchs(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = _engine.forward
    monkeypatch.setattr(_engine, "forward", lambda *a: (calls.append(1), forward(*a))[1])
    got, expected = (tree_flatten(CASES[name](VARIANTS[variant](module)))[0] for module in (nhwconv.torch, functional))
    assert len(got) == len(expected)
    assert calls
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_in_both_directions_and_of_batches(variant: str) -> None:
    arrays = [t.clone().requires_grad_() for t in (X[:1], W, B)]
    function = VARIANTS[variant](nhwconv.torch)
    assert torch.autograd.gradcheck(
        function, arrays, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(
        function, arrays, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad"])
def test_operators_themselves_are_transformed(transform: str) -> None:
    """As in a graph that was exported, or a trace, where the operator stands."""
    geometry = [1, 1], [1, 1, 0, 0], [1, 1], 2
    operator = torch.ops.nhwconv.conv2d

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(x, (0, 0, 1, 1)), w, groups=2)

    run = {
        "jvp": lambda f: jvp(f, (X, W), (X + 1, W * W)),
        "vmap": lambda f: vmap(f)(several(X), several(W)),
        "grad": lambda f: grad(lambda w: grad(lambda x: f(x, w).pow(3).sum())(X).square().sum())(W),
    }[transform]
    torch.testing.assert_close(run(lambda x, w: operator(x, w, None, *geometry)), run(theirs), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_sees_through_transforms(mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def function(x: Tensor, w: Tensor) -> Tensor:
        return grad(lambda w: nhwconv.torch.conv2d(x, w, groups=2).pow(3).sum())(w)

    graph = make_fx(function, tracing_mode=mode)(X, W)
    assert str(graph.graph).count("nhwconv.conv2d_backward.default") == 1
    torch.testing.assert_close(graph(2 * X, W + 1), function(2 * X, W + 1))


@pytest.mark.parametrize("name", ["gradients of each sample", "jvp", "hessian", "forward over forward"])
def test_compiled_transforms(name: str) -> None:
    torch._dynamo.reset()

    def function(x: Tensor) -> Any:
        return CASES[name](lambda *a: nhwconv.torch.conv2d(*a, groups=2) + x)

    shift = torch.ones((), dtype=torch.float64)
    compiled = torch.compile(function, backend="aot_eager")
    torch.testing.assert_close(compiled(shift), function(shift), rtol=1e-9, atol=1e-9)


def test_per_sample_gradients_of_a_model() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(6, 2, 3), torch.nn.Flatten()
    ).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def each() -> Any:
        return vmap(
            grad(lambda p, x: functional_call(model, p, (x[None],)).square().sum()), (None, 0)
        )(parameters, X)  # fmt: skip

    expected = each()
    assert nhwconv.torch.replace_conv(model) == ["0", "2"]
    torch.testing.assert_close(each(), expected, rtol=1e-9, atol=1e-10)
