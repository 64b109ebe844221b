"""Batched NHWC convolution and every one of its gradients, compiled by Numba."""

from ._version import __version__
from .layer import Conv2D
from .ops import (
    Gradients,
    conv2d,
    conv2d_backward,
    conv2d_bias_grad,
    conv2d_input_grad,
    conv2d_weight_grad,
    plan,
    strategies,
    warmup,
)
from .planning import Plan
from .tuning import tune

__all__ = [
    "Conv2D",
    "Gradients",
    "Plan",
    "__version__",
    "conv2d",
    "conv2d_backward",
    "conv2d_bias_grad",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "plan",
    "strategies",
    "tune",
    "warmup",
]
