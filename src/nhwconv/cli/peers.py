"""How other libraries compute the three passes, in their fastest layout: data and weights are arranged beforehand.

A function here returns what arranges arrays, the call that is timed, and what makes a NumPy array in this package's
layout of its result. It runs in a process of its own; its library is imported there and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..problem import ConvProblem, Pass
from ..runtime.arrays import Array
from ..workloads import Data

__all__ = ["Calls", "jax_calls", "torch_calls"]


class Calls(NamedTuple):
    """How a library computes a pass: `call` on what `prepare` makes of the arrays, and `to_numpy` of its result."""

    prepare: Callable[[Data], tuple[Any, ...]]
    call: Callable[..., Any]
    to_numpy: Callable[[Any], Array]


def torch_calls(problem: ConvProblem, pass_: Pass, threads: int) -> Calls:
    """PyTorch: channels last, which is how it calls NHWC, without recording gradients."""
    import torch

    if any(before != after for before, after in problem.padding):
        raise ValueError("it pads both sides alike")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    padding = [before for before, _ in problem.padding]
    stride, dilation = list(problem.stride), list(problem.dilation)

    def prepare(data: Data) -> tuple[Any, ...]:
        x, w, dy = (torch.from_numpy(a).permute(0, 3, 1, 2) for a in (data.x, data.w, data.dy))  # NHWC in memory
        return x, w.contiguous(memory_format=torch.channels_last), torch.from_numpy(data.b), dy

    def forward(x: Any, w: Any, b: Any, _: Any) -> Any:
        return torch.nn.functional.conv2d(x, w, b, stride, padding, dilation, problem.groups)

    def gradient(index: int) -> Callable[..., Any]:
        needed = [i == index for i in range(3)]
        backward = torch.ops.aten.convolution_backward
        options = ([problem.d], stride, padding, dilation, False, [0, 0], problem.groups, needed)
        return lambda x, w, _, dy: backward(dy, x, w, *options)[index]

    call = {"forward": forward, "input_grad": gradient(0), "weight_grad": gradient(1)}[pass_]
    return Calls(prepare, call, lambda result: np.ascontiguousarray(result.permute(0, 2, 3, 1).numpy()))


def jax_calls(problem: ConvProblem, pass_: Pass, threads: int) -> Calls:
    """JAX: NHWC with HWIO weights, compiled; its gradients are those of its forward pass."""
    if hasattr(os, "sched_setaffinity"):  # its threads have no setting but the processors that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import jax

    if problem.dtype == np.float64:
        jax.config.update("jax_enable_x64", True)

    def prepare(data: Data) -> tuple[Any, ...]:
        w = np.ascontiguousarray(data.w.transpose(1, 2, 3, 0))  # (kh, kw, c, d)
        return tuple(jax.numpy.asarray(array) for array in (data.x, w, data.b, data.dy))

    def convolve(x: Any, w: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, w, problem.stride, problem.padding,
            rhs_dilation=problem.dilation, feature_group_count=problem.groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    def forward(x: Any, w: Any, b: Any, _: Any) -> Any:
        return convolve(x, w) + b

    def gradient(index: int) -> Callable[..., Any]:
        return lambda x, w, _, dy: jax.vjp(convolve, x, w)[1](dy)[index]

    function = jax.jit({"forward": forward, "input_grad": gradient(0), "weight_grad": gradient(1)}[pass_])

    def to_numpy(result: Any) -> Array:
        array = np.asarray(result)
        return np.ascontiguousarray(array.transpose(3, 0, 1, 2)) if pass_ == "weight_grad" else array

    return Calls(prepare, lambda *arrays: function(*arrays).block_until_ready(), to_numpy)
