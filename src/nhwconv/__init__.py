"""Batched NHWC convolution and every one of its gradients, compiled by Numba."""

from ._version import __version__
from .layer import Conv1D, Conv1DTranspose, Conv2D, Conv2DTranspose
from .one_dimension import conv1d, conv1d_backward, conv_transpose1d, conv_transpose1d_backward
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
from .transposed import conv_transpose2d, conv_transpose2d_backward
from .tuning import tune

__all__ = [
    "Conv1D",
    "Conv1DTranspose",
    "Conv2D",
    "Conv2DTranspose",
    "Gradients",
    "Plan",
    "__version__",
    "conv1d",
    "conv1d_backward",
    "conv2d",
    "conv2d_backward",
    "conv2d_bias_grad",
    "conv2d_input_grad",
    "conv2d_weight_grad",
    "conv_transpose1d",
    "conv_transpose1d_backward",
    "conv_transpose2d",
    "conv_transpose2d_backward",
    "plan",
    "strategies",
    "tune",
    "warmup",
]
