"""PyTorch's own databases of samples for functions and layers: values, gradients, and errors."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import nhwconv.torch
import replaced

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
OPS = {op.name.rpartition(".")[2]: op for op in op_db if op.name.rpartition(".")[2] in replaced.OURS}
LAYERS = {nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.LazyConv1d, nn.LazyConv2d}
MODULES = [module for module in module_db if module.module_cls in LAYERS]


def _terms(w: torch.Tensor) -> int:
    return math.prod(w.shape[1:]) * max(w.shape[0], 1)


def _samples() -> list[Any]:
    found = []
    for name, op in OPS.items():
        for dtype in DTYPES:
            if dtype in op.dtypes:
                for i, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=True)):
                    found.append(pytest.param(name, dtype, sample, id=f"{name}-{str(dtype)[6:]}-{i}"))
    return found


def _tensors(sample: Any) -> list[torch.Tensor]:
    return [t for t in (sample.input, *sample.args) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(("name", "dtype", "sample"), _samples())
def test_samples(name: str, dtype: torch.dtype, sample: Any) -> None:
    tensors = _tensors(sample)
    expected = OPS[name].op(sample.input, *sample.args, **sample.kwargs)
    got = replaced.OURS[name](sample.input, *sample.args, **sample.kwargs)
    terms = _terms(sample.args[0])
    replaced.assert_near(got, expected, dtype, terms)
    of = [t for t in tensors if t.requires_grad]
    for one, other in zip(replaced.gradients(got, of), replaced.gradients(expected, of), strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            replaced.assert_near(one, other, dtype, terms * max(got.numel() // max(got.shape[-1], 1), 1))


@pytest.mark.parametrize(
    ("name", "sample"), [pytest.param(p.values[0], p.values[2], id=p.id) for p in _samples() if "float64" in p.id]
)
def test_derivatives_of_both_orders_and_directions(name: str, sample: Any) -> None:
    tensors = _tensors(sample)

    def call(*given: torch.Tensor) -> torch.Tensor:
        more = sample.args[len(given) - 1 :]
        return replaced.OURS[name](*given, *more, **sample.kwargs)

    assert torch.autograd.gradcheck(call, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        pytest.param(name, error, id=f"{name}-{i}")
        for name, op in OPS.items()
        if op.error_inputs_func is not None
        for i, error in enumerate(op.error_inputs("cpu"))
    ],
)
def test_errors(name: str, error: Any) -> None:
    sample = error.sample_input
    with pytest.raises(error.error_type, match=error.error_regex):
        replaced.OURS[name](sample.input, *sample.args, **sample.kwargs)


def _modules() -> list[Any]:
    found = []
    for module in MODULES:
        for dtype in (torch.float32, torch.float64):
            inputs = module.module_inputs_func(module, device="cpu", dtype=dtype, requires_grad=True, training=True)
            for i, given in enumerate(inputs):
                name = f"{module.name.replace('.', '-')}-{str(dtype)[6:]}-{i}-{given.desc}"
                found.append(pytest.param(module.module_cls, dtype, given, id=name))
    return found


@pytest.mark.parametrize(("kind", "dtype", "given"), _modules())
def test_layers(kind: type[nn.Module], dtype: torch.dtype, given: Any) -> None:
    torch.manual_seed(0)
    stock = kind(*given.constructor_input.args, **given.constructor_input.kwargs, dtype=dtype)
    x = given.forward_input.args[0]
    stock(x)  # a lazy one has its sizes from here on
    ours = copy.deepcopy(stock)
    replace = getattr(nhwconv.torch, "replace_conv", None) or nhwconv.torch.replace_conv2d
    replace(ours)
    expected, got = stock(x), ours(x)
    terms = _terms(stock.weight)
    replaced.assert_near(got, expected, dtype, terms)
    one = replaced.gradients(got, [x, *ours.parameters()])
    other = replaced.gradients(expected, [x, *stock.parameters()])
    for a, b in zip(one, other, strict=True):
        replaced.assert_near(a, b, dtype, terms * max(got.numel() // got.shape[-1], 1))
