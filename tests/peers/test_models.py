"""Architectures of torchvision and timm: each convolution that they come to, forward and backward, beside PyTorch's.

A replaced model trains a step on a small batch in float64. Whatever it calls of nhwconv's functions is compared with
PyTorch's function of the same name on the same tensors, and so are the gradients that it is asked for. Whole networks
are not compared: normalisation makes of the last bits of one layer what no length of a sum could tell.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import nhwconv.torch
import replaced
from tolerance import PROMISE, gamma

torchvision_models = networks.torchvision_models()
import timm  # noqa: E402 - it imports torchvision, which may have been built for another PyTorch

Tensors = Sequence[Tensor | None]

#: How many convolutions each has, as PyTorch's models count them. All of them are replaced.
TORCHVISION = {
    "alexnet": 5, "convnext_tiny": 22, "densenet121": 120, "efficientnet_b0": 81, "googlenet": 57, "mnasnet0_5": 52,
    "mobilenet_v2": 52, "mobilenet_v3_small": 52, "regnet_x_400mf": 71, "regnet_y_400mf": 85, "resnet18": 20,
    "resnext50_32x4d": 53, "shufflenet_v2_x0_5": 56, "squeezenet1_1": 26, "vgg11_bn": 8,
}  # fmt: skip
TIMM = {
    "convmixer_768_32": 65, "cspresnet50": 55, "dla34": 38, "eca_nfnet_l0": 69, "ghostnet_050": 95,
    "hrnet_w18_small": 91, "lcnet_050": 32, "mixnet_s": 123, "nf_resnet26": 29, "res2net50_14w_8s": 149,
    "rexnet_100": 75, "selecsls42": 41, "tf_mixnet_s": 123, "xcit_nano_12_p16_224": 29,
}  # fmt: skip
CASES = [pytest.param("torchvision", *case, id=f"torchvision-{case[0]}") for case in TORCHVISION.items()] + [
    pytest.param("timm", *case, id=f"timm-{case[0]}") for case in TIMM.items()
]
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d
OURS = {function: name for name, function in replaced.OURS.items()}
STOCK = {getattr(functional, name) for name in replaced.OURS}


def _model(library: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    if library == "timm":
        options = {"img_size": 64} if "224" in name else {}
        return timm.create_model(name, num_classes=10, **options).double()
    options = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    return torchvision_models.get_model(name, weights=None, num_classes=10, **options).double()


def _loss(model: nn.Module) -> Tensor:
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    return functional.cross_entropy(model(x), torch.arange(len(x)))


class Compared(TorchFunctionMode):
    """While this is on, each convolution of nhwconv's is compared with PyTorch's, and PyTorch's own are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = self.stock = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = function(*args, **(kwargs or {}))
        self.stock += function in STOCK
        name = OURS.get(function)
        if name is not None:
            self.forward += 1
            tensors = [None if t is None else t.detach() for t in args[:3]]
            _compare(name, tensors, args[3:], [y.detach()], None)
            y.register_hook(lambda dy: self._backward(name, tensors, args[3:], dy))
        return y

    def _backward(self, name: str, tensors: Tensors, options: Any, dy: Tensor) -> None:
        self.backward += 1
        _compare(name, tensors, options, _results(replaced.OURS[name], tensors, options, dy), dy)


def _compare(name: str, tensors: Tensors, options: Any, got: list[Tensor], dy: Tensor | None) -> None:
    """Compare a result, or gradients, with PyTorch's: sums of the same products, each with its own error."""
    stock: Any = getattr(functional, name)
    expected = _results(stock, tensors, options, dy)
    magnitudes = [None if t is None else t.abs() for t in (*tensors, dy)]
    absolute = _results(stock, magnitudes[:-1], options, magnitudes[-1])
    kernels: Any = tensors[1]
    terms = max(kernels.shape[:2]) * math.prod(kernels.shape[2:])
    if dy is not None:
        terms = max(terms, dy.numel() // dy.shape[1])
    relative = PROMISE[np.dtype(np.float64)] + gamma(terms, np.dtype(np.float64))
    for one, other, magnitude in zip(got, expected, absolute, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert float((one - other).norm()) <= relative * float(magnitude.norm()), (name, options)


def _results(function: Any, tensors: Tensors, options: Any, dy: Tensor | None) -> list[Tensor]:
    """Return a function's result, or its gradients."""
    if dy is None:
        return [function(*tensors, *options)]
    given = [None if t is None else t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        return list(torch.autograd.grad(function(*given, *options), [t for t in given if t is not None], dy))


@pytest.mark.parametrize(("library", "name", "count"), CASES)
def test_architectures(library: str, name: str, count: int) -> None:
    stock = _model(library, name)
    ours = copy.deepcopy(stock)
    changed = nhwconv.torch.replace_conv(ours)
    assert changed.left == {}
    assert len(changed) == sum(isinstance(layer, CONVOLUTIONS) for layer in stock.modules()) == count
    with torch.no_grad(), Compared() as of_stock:
        _loss(stock)
    with Compared() as seen:
        _loss(ours).backward()
    assert (seen.stock, seen.forward, seen.backward) == (0, of_stock.stock, of_stock.stock)
