"""PyTorch with nhwconv's convolutions in the place of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

import nhwconv.torch

#: What nhwconv has in the place of PyTorch's functions, by their names.
OURS = {
    name: getattr(nhwconv.torch, name)
    for name in ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")
    if hasattr(nhwconv.torch, name)
}


@contextmanager
def functions() -> Iterator[None]:
    """Whoever calls PyTorch's functions by `torch.nn.functional` calls nhwconv's."""
    stock = {name: getattr(functional, name) for name in OURS}
    for name, ours in OURS.items():
        setattr(functional, name, ours)
    try:
        yield
    finally:
        for name, function in stock.items():
            setattr(functional, name, function)


def bound(dtype: torch.dtype, terms: int) -> float:
    """Return how far two sums of so many terms may differ, relative to the largest of them."""
    return 8 * torch.finfo(dtype).eps * max(terms, 1) ** 0.5


def assert_near(got: Any, expected: Any, dtype: torch.dtype, terms: int) -> None:
    """Check a tensor against what PyTorch has, as far as the order of sums may tell them apart."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if not expected.numel():
        return
    scale = max(float(expected.detach().abs().max()), 1.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=bound(dtype, terms) * scale, equal_nan=True)


def gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the gradients of a weighted sum of an output."""
    weights = torch.linspace(-1, 1, max(output.numel(), 1), dtype=output.dtype)[: output.numel()]
    return list(torch.autograd.grad((output * weights.view(output.shape)).sum(), inputs, allow_unused=True))
