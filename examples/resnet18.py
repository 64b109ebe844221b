"""A training step of ResNet-18 on the CPU: PyTorch's convolutions against nhwconv's.

    python examples/resnet18.py
    python examples/resnet18.py --layers          # and where the time goes, layer by layer
    python examples/resnet18.py --compile         # and torch.compile

The network (He et al. 2015, section 4.1), its loss and its optimiser are plain PyTorch in channels_last. Each contender
is a copy of it with the same initial weights; they take turns, a step each, and a step is a forward pass, a backward
pass and an update by SGD. Needs ``pip install 'nhwconv[torch]'``.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional

from nhwconv.torch import conv2d, replace_conv


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        """Return an image of half the size and twice the channels, or of the same."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(classes: int = 1000) -> nn.Sequential:
    """Return the network with 11.7 million parameters."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(channels, width, stride), Block(width, width, 1)]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Trainer:
    """A model with its optimiser and the times of its steps."""

    def __init__(self, model: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self.run = model, run or model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Take one step of gradient descent."""
        start = perf_counter()
        self.optimizer.zero_grad()
        loss = functional.cross_entropy(self.run(images), labels)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(perf_counter() - start)


def contenders(compiled: bool) -> dict[str, Trainer]:
    """Return copies of one network, one for each way to run its convolutions."""
    stock = resnet18().to(memory_format=torch.channels_last)
    ours = copy.deepcopy(stock)
    print(f"nhwconv runs {len(replace_conv(ours))} convolutions")
    found = {"PyTorch": Trainer(stock), "nhwconv": Trainer(ours)}
    if compiled:
        for name, trainer in list(found.items()):
            model = copy.deepcopy(trainer.model)
            found[f"{name}, compiled"] = Trainer(model, torch.compile(model))
    return found


def peak_mib() -> float:
    """Return the largest memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def race(trainers: dict[str, Trainer], steps: int, images: Tensor, labels: Tensor) -> None:
    """Let all take turns, and print the medians."""
    for trainer in trainers.values():  # compiles, fills caches; not counted
        trainer.step(images, labels)
        trainer.step(images, labels)
        trainer.seconds.clear()
    before = peak_mib()
    for _ in range(steps):
        for trainer in trainers.values():
            trainer.step(images, labels)
    first = next(iter(trainers.values()))
    for name, trainer in trainers.items():
        median, fastest = statistics.median(trainer.seconds), min(trainer.seconds)
        ratio = statistics.median(first.seconds) / median
        milliseconds = f"{median * 1e3:7.1f} ms a step, fastest {fastest * 1e3:7.1f}"
        print(f"{name:>18}: {milliseconds}; {ratio:.2f} times PyTorch's speed")
    print(f"peak memory: {before:.0f} MiB after two steps each, {peak_mib():.0f} MiB after {steps + 2}")


# ------------------------------------------------------------------------------------------ layer by layer


def shapes(model: nn.Module, images: Tensor) -> dict[tuple[object, ...], list[nn.Conv2d]]:
    """Return the model's convolutions by the shapes of their inputs and weights, and their strides."""
    found: dict[tuple[object, ...], list[nn.Conv2d]] = defaultdict(list)

    def note(layer: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        found[tuple(inputs[0].shape), tuple(layer.weight.shape), layer.stride[0], layer.padding[0]].append(layer)

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def layers(images: Tensor, repeats: int = 7) -> None:
    """Time forward and backward of every distinct convolution by itself, alternating."""
    print(f"{'input, weight, stride':>42} {'':3} {'forward, ms':>15} {'backward, ms':>17}   (PyTorch, nhwconv)")
    total = [0.0] * 4
    for (x_shape, w_shape, stride, padding), same in shapes(resnet18(), images).items():
        first = x_shape[1] == 3
        x = torch.randn(x_shape).to(memory_format=torch.channels_last).requires_grad_(not first)
        w = torch.randn(w_shape).to(memory_format=torch.channels_last).requires_grad_()
        times: list[list[float]] = [[], [], [], []]
        for _ in range(repeats + 1):
            for side, function in enumerate((functional.conv2d, conv2d)):
                start = perf_counter()
                y = function(x, w, None, stride, padding)
                middle = perf_counter()
                torch.autograd.grad(y, [w] if first else [x, w], y.detach())
                times[side].append(middle - start)
                times[2 + side].append(perf_counter() - middle)
        cells = [statistics.median(t[1:]) * 1e3 for t in times]
        total = [t + c * len(same) for t, c in zip(total, cells, strict=True)]
        name = f"{'x'.join(map(str, x_shape))}, {'x'.join(map(str, w_shape))}, {stride}"
        print(f"{name:>42} x{len(same)} {cells[0]:8.2f}{cells[1]:8.2f} {cells[2]:9.2f}{cells[3]:8.2f}")
    print(f"{'all':>42}    {total[0]:8.2f}{total[1]:8.2f} {total[2]:9.2f}{total[3]:8.2f}")


def main() -> None:
    """Race the contenders."""
    parser = argparse.ArgumentParser(description="A training step of ResNet-18: PyTorch against nhwconv.")
    parser.add_argument("--batch", type=int, default=16, help="images a step (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="height and width (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each contender (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--layers", action="store_true", help="each convolution by itself as well")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (arguments.batch,))
    if arguments.layers:
        layers(images)
    race(contenders(arguments.compile), arguments.steps, images, labels)


if __name__ == "__main__":
    main()
