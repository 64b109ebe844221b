"""How other libraries compute the three passes, in their fastest layout: data and weights are arranged beforehand.

A function here returns the call that is timed, and what makes a NumPy array in this package's layout of its result. It
runs in a process of its own; its library is imported there and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import Array
from ..problem import ConvProblem, Pass
from ..workloads import Data

__all__ = ["Calls", "jax_calls", "torch_calls"]

Calls = tuple[Callable[[], Any], Callable[[Any], Array]]


def torch_calls(problem: ConvProblem, pass_: Pass, data: Data, threads: int) -> Calls:
    """PyTorch: channels last, which is how it calls NHWC, without recording gradients."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    x, dy = (torch.from_numpy(array).permute(0, 3, 1, 2) for array in (data.x, data.dy))  # (n, c, h, w), NHWC in memory
    w = torch.from_numpy(data.w).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    b = torch.from_numpy(data.b)
    padding = [before for before, _ in problem.padding]
    stride, dilation = list(problem.stride), list(problem.dilation)

    def forward() -> Any:
        return torch.nn.functional.conv2d(x, w, b, stride, padding, dilation, problem.groups)

    def gradient(index: int) -> Callable[[], Any]:
        needed = [i == index for i in range(3)]
        backward = torch.ops.aten.convolution_backward
        arguments = (dy, x, w, [problem.d], stride, padding, dilation, False, [0, 0], problem.groups, needed)
        return lambda: backward(*arguments)[index]

    call = {"forward": forward, "input_grad": gradient(0), "weight_grad": gradient(1)}[pass_]
    return call, lambda result: np.ascontiguousarray(result.permute(0, 2, 3, 1).numpy())


def jax_calls(problem: ConvProblem, pass_: Pass, data: Data, threads: int) -> Calls:
    """JAX: NHWC with HWIO weights, compiled; its gradients are those of its forward pass."""
    if hasattr(os, "sched_setaffinity"):  # its threads have no setting but the processors that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import jax

    if problem.dtype == np.float64:
        jax.config.update("jax_enable_x64", True)
    x, b, dy = (jax.numpy.asarray(array) for array in (data.x, data.b, data.dy))
    w = jax.numpy.asarray(np.ascontiguousarray(data.w.transpose(1, 2, 3, 0)))  # (kh, kw, c, d)

    def convolve(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, w, problem.stride, problem.padding,
            rhs_dilation=problem.dilation, feature_group_count=problem.groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    if pass_ == "forward":
        function = jax.jit(lambda x, w, b: convolve(x, w) + b)
        return lambda: function(x, w, b).block_until_ready(), np.asarray
    index = 0 if pass_ == "input_grad" else 1
    gradient = jax.jit(lambda x, w, dy: jax.vjp(convolve, x, w)[1](dy)[index])

    def to_numpy(result: Any) -> Array:
        array = np.asarray(result)
        return np.ascontiguousarray(array.transpose(3, 0, 1, 2)) if index else array

    return lambda: gradient(x, w, dy).block_until_ready(), to_numpy
