"""Time training steps of one network: the framework's own convolutions against nhwconv's, in turns, in this process.

    python tools/networks.py torch resnet18 --dtype float32 --batch 8 --size 224 --seconds 10

Prints one JSON object: the median of each contender's seconds a step. A step is a forward pass, a backward pass and an
update by SGD. In PyTorch a network is torchvision's, in channels_last; in JAX it is ResNet-18 as below, compiled.
`make report` runs this for each network in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

CLASSES = 1000

Step = Callable[[], object]


def in_turns(steps: dict[str, Step], seconds: float) -> dict[str, float]:
    """Return the median seconds of each contender; they take turns, a step each, until the time is up."""
    for step in steps.values():
        step()  # compiles
    times: dict[str, list[float]] = {name: [] for name in steps}
    begun = perf_counter()
    while perf_counter() - begun < seconds * len(steps) or len(times["nhwconv"]) < 2:
        for name, step in steps.items():
            start = perf_counter()
            step()
            times[name].append(perf_counter() - start)
    return {name: statistics.median(of) for name, of in times.items()}


# ---------------------------------------------------------------------------------------------- PyTorch


def torch_steps(name: str, dtype: str, batch: int, size: int) -> dict[str, Step]:
    """Return a step of torchvision's network `name` as it is, and of a copy whose convolutions are nhwconv's."""
    import torch
    from torch.nn import functional

    import nhwconv.torch

    torch.manual_seed(0)
    real = getattr(torch, dtype)
    stock = getattr(torchvision_models(), name)(num_classes=CLASSES)
    stock = stock.to(dtype=real, memory_format=torch.channels_last)
    ours = copy.deepcopy(stock)
    nhwconv.torch.replace_conv(ours)
    images = torch.randn(batch, 3, size, size, dtype=real).to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,))

    def step_of(model: Any) -> Step:
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)

        def step() -> None:
            optimiser.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimiser.step()

        return step

    return {"torch": step_of(stock), "nhwconv": step_of(ours)}


def torchvision_models() -> Any:
    """Return `torchvision.models`, also where torchvision's operators were built for another PyTorch.

    These are for detection, and no network here needs them; but importing torchvision asks for the names of two.
    """
    import torch

    try:
        import torchvision.models
    except RuntimeError:
        names = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            names.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.models
    return torchvision.models


# -------------------------------------------------------------------------------------------------- JAX


def jax_steps(name: str, dtype: str, batch: int, size: int) -> dict[str, Step]:
    """Return a compiled step of ResNet-18 with XLA's convolution, and with nhwconv's."""
    if name != "resnet18":
        raise SystemExit("in JAX there is resnet18 alone")
    os.environ["JAX_ENABLE_X64"] = "1"
    import jax
    import numpy as np

    import nhwconv.jax

    def own(x: Any, w: Any, stride: int) -> Any:
        pad = [(w.shape[1] // 2, w.shape[1] // 2)] * 2
        return jax.lax.conv_general_dilated(x, w, (stride, stride), pad, dimension_numbers=("NHWC", "OHWI", "NHWC"))

    def ours(x: Any, w: Any, stride: int) -> Any:
        return nhwconv.jax.conv2d(x, w, stride=stride, padding=w.shape[1] // 2)

    rng = np.random.default_rng(0)
    images = jax.numpy.asarray(rng.standard_normal((batch, size, size, 3)).astype(dtype))
    labels = jax.numpy.asarray(rng.integers(0, CLASSES, batch))
    return {
        "jax": _jax_step(own, _jax_weights(rng, dtype), images, labels),
        "nhwconv": _jax_step(ours, _jax_weights(rng, dtype), images, labels),
    }


#: ResNet-18's eight blocks: channels in and out, and the stride of the first convolution.
BLOCKS = [
    (64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1),
]  # fmt: skip


def _jax_weights(rng: Any, dtype: str) -> list[Any]:
    """Return the weights in the order in which `_resnet18` takes them."""
    shapes: list[tuple[int, ...]] = [(64, 7, 7, 3)]
    for inside, outside, stride in BLOCKS:
        shapes += [(outside, 3, 3, inside), (outside, 3, 3, outside)]
        shapes += [(outside, 1, 1, inside)] * (stride > 1)
    shapes.append((512, CLASSES))
    return [rng.standard_normal(shape).astype(dtype) * (2 / shape[-1]) ** 0.5 / 3 for shape in shapes]


def _resnet18(convolve: Callable[..., Any], weights: list[Any], x: Any) -> Any:
    """Return the scores of He et al. 2015, section 4.1; normalisation is by the batch, without a scale and shift."""
    import jax

    left = iter(weights)

    def normal(y: Any) -> Any:
        return (y - y.mean((0, 1, 2))) * jax.lax.rsqrt(y.var((0, 1, 2)) + 1e-5)

    x = jax.nn.relu(normal(convolve(x, next(left), 2)))
    edges = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jax.lax.reduce_window(x, -jax.numpy.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), edges)
    for _, _, stride in BLOCKS:
        y = jax.nn.relu(normal(convolve(x, next(left), stride)))
        y = normal(convolve(y, next(left), 1))
        x = jax.nn.relu(y + (normal(convolve(x, next(left), stride)) if stride > 1 else x))
    return x.mean((1, 2)) @ next(left)


def _jax_step(convolve: Callable[..., Any], weights: list[Any], images: Any, labels: Any) -> Step:
    import jax

    def loss(weights: list[Any]) -> Any:
        p = jax.nn.log_softmax(_resnet18(convolve, weights, images))
        return -p[jax.numpy.arange(len(labels)), labels].mean()

    @jax.jit
    def update(weights: list[Any]) -> list[Any]:
        return [w - 1e-3 * g for w, g in zip(weights, jax.grad(loss)(weights), strict=True)]

    state = [weights]

    def step() -> None:
        state[0] = jax.block_until_ready(update(state[0]))

    return step


def main() -> None:
    """Time one network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("framework", choices=["torch", "jax"])
    parser.add_argument("network", help="one of torchvision's; in JAX, resnet18")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="rows and columns of the images")
    parser.add_argument("--seconds", type=float, default=10, help="how long each contender steps")
    given = parser.parse_args()
    make = torch_steps if given.framework == "torch" else jax_steps
    print(json.dumps(in_turns(make(given.network, given.dtype, given.batch, given.size), given.seconds)))


if __name__ == "__main__":
    main()
