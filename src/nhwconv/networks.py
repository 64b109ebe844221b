"""The convolutions of whole networks, each with how often it occurs, worked out from how the networks are built.

A network is described in the words of its paper: stages, blocks, widths. Walking through it, with the size and the
channels of the images at hand, counts every convolution that a training step calls. Layers that networks write as
matrix products of their own (classifiers, attention) are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Self

from .names import known
from .workloads import Layer

__all__ = ["NETWORKS", "Part", "network"]


@dataclass(frozen=True)
class Part:
    """A convolution of a network, and how often it occurs."""

    layer: Layer
    count: int


@dataclass
class _Walk:
    """Where one has come to in a network: the size and the channels of its images; and what was found on the way."""

    network: str
    size: int = 224
    c: int = 3
    images: int = 8
    found: dict[Layer, int] = field(default_factory=dict)

    def conv(self, d: int, k: int, s: int = 1, p: int | None = None, g: int = 1) -> Self:
        """Count a convolution, whose padding keeps the size unless it is given, and go on behind it."""
        p = k // 2 if p is None else p
        strided = f"s{s}" if s > 1 else ""
        grouped = f"g{g}" if g > 1 else ""
        name = f"{self.network}.{k}x{k}.{self.c}-{d}{strided}{grouped}@{self.size}"
        layer = Layer(name, self.images, self.size, self.size, self.c, d, k, k, (s, s), (p, p), groups=g)
        self.found[layer] = self.found.get(layer, 0) + 1
        self.c, self.size = d, (self.size + 2 * p - k) // s + 1
        return self

    def depthwise(self, k: int, s: int = 1) -> Self:
        return self.conv(self.c, k, s, g=self.c)

    def pool(self, k: int, s: int, p: int = 0) -> Self:
        self.size = (self.size + 2 * p - k) // s + 1
        return self

    def branch(self) -> Self:
        """Start a second way from here, which counts into the same."""
        return replace(self)

    def squeeze(self, d: int) -> Self:
        """Squeeze and excite: two convolutions of an image's mean."""
        mean = replace(self, size=1)
        mean.conv(d, 1).conv(self.c, 1)
        return self


def _lenet5(net: _Walk) -> None:  # LeCun et al. 1998
    net.size, net.c, net.images = 28, 1, 64
    net.conv(6, 5, p=0).pool(2, 2).conv(16, 5, p=0)


def _alexnet(net: _Walk) -> None:  # Krizhevsky 2014
    net.conv(64, 11, 4, p=2).pool(3, 2).conv(192, 5).pool(3, 2)
    net.conv(384, 3).conv(256, 3).conv(256, 3)


def _vgg16(net: _Walk) -> None:  # Simonyan and Zisserman 2014
    net.images = 2
    for d, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            net.conv(d, 3)
        net.pool(2, 2)


def _shortcut(net: _Walk, d: int, s: int) -> None:
    """Match what a block adds to its result, where size or channels differ."""
    if s > 1 or net.c != d:
        net.branch().conv(d, 1, s)


def _resnet18(net: _Walk) -> None:  # He et al. 2015
    net.conv(64, 7, 2).pool(3, 2, 1)
    for d in (64, 128, 256, 512):
        for s in (1 if d == 64 else 2, 1):
            _shortcut(net, d, s)
            net.conv(d, 3, s).conv(d, 3)


def _bottlenecks(narrowing: int, groups: int) -> Callable[[_Walk], None]:
    """Return a walk of 50 layers, whose 3x3 are so many times narrower than what comes out, in so many groups."""

    def walk(net: _Walk) -> None:
        net.conv(64, 7, 2).pool(3, 2, 1)
        for d, depth in ((256, 3), (512, 4), (1024, 6), (2048, 3)):
            for block in range(depth):
                s = 2 if d > 256 and block == 0 else 1
                _shortcut(net, d, s)
                net.conv(d // narrowing, 1).conv(d // narrowing, 3, s, g=groups).conv(d, 1)

    return walk


def _densenet121(net: _Walk) -> None:  # Huang et al. 2017
    net.conv(64, 7, 2).pool(3, 2, 1)
    for depth in (6, 12, 24, 16):
        for _ in range(depth):
            before = net.c
            net.conv(128, 1).conv(32, 3)
            net.c += before  # what a block computes stands beside what it was given
        if depth != 16:
            net.conv(net.c // 2, 1).pool(2, 2)


def _mobilenetv2(net: _Walk) -> None:  # Sandler et al. 2018
    net.conv(32, 3, 2).depthwise(3).conv(16, 1)
    for d, depth, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)):
        for block in range(depth):
            net.conv(6 * net.c, 1).depthwise(3, stride if block == 0 else 1).conv(d, 1)
    net.conv(1280, 1)


def _efficientnetb0(net: _Walk) -> None:  # Tan and Le 2019
    net.conv(32, 3, 2).depthwise(3).squeeze(8).conv(16, 1)
    stages = ((24, 2, 3, 2), (40, 2, 5, 2), (80, 3, 3, 2), (112, 3, 5, 1), (192, 4, 5, 2), (320, 1, 3, 1))
    for d, depth, k, stride in stages:
        for block in range(depth):
            given = net.c
            net.conv(6 * given, 1).depthwise(k, stride if block == 0 else 1).squeeze(given // 4).conv(d, 1)
    net.conv(1280, 1)


def _regnety400(net: _Walk) -> None:  # Radosavovic et al. 2020: RegNetY-400MF, groups of 8 channels
    net.conv(32, 3, 2)
    for d, depth in ((48, 1), (104, 3), (208, 6), (440, 6)):
        for block in range(depth):
            s, given = 2 if block == 0 else 1, net.c
            _shortcut(net, d, s)
            net.conv(d, 1).conv(d, 3, s, g=d // 8).squeeze(round(given / 4)).conv(d, 1)


def _convnext(net: _Walk) -> None:  # Liu et al. 2022: ConvNeXt-T
    net.conv(96, 4, 4, p=0)
    for d, depth in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if d > 96:
            net.conv(d, 2, 2, p=0)
        for _ in range(depth):
            net.depthwise(7)


def _vit(net: _Walk) -> None:  # Dosovitskiy et al. 2021: ViT-B/16, whose only convolution cuts the patches
    net.conv(768, 16, 16, p=0)


_WALKS: dict[str, Callable[[_Walk], None]] = {
    "lenet5": _lenet5,
    "alexnet": _alexnet,
    "vgg16": _vgg16,
    "resnet18": _resnet18,
    "resnet50": _bottlenecks(narrowing=4, groups=1),
    "resnext50": _bottlenecks(narrowing=2, groups=32),  # Xie et al. 2017: 32 x 4d
    "densenet121": _densenet121,
    "mobilenetv2": _mobilenetv2,
    "efficientnetb0": _efficientnetb0,
    "regnety400": _regnety400,
    "convnext": _convnext,
    "vit": _vit,
}

#: The names that `network` knows.
NETWORKS: tuple[str, ...] = tuple(_WALKS)


@lru_cache
def network(name: str) -> tuple[Part, ...]:
    """Return the convolutions of a network, from its input on, each once with how often it occurs.

    Parameters
    ----------
    name : str
        One of `NETWORKS`.

    Returns
    -------
    tuple of Part
        Images are 224 x 224 in batches of 8 (VGG-16: 2; LeNet-5: 64 of 28 x 28). The first is the only one that needs
        no input gradient in training.

    Raises
    ------
    ValueError
        Where there is no such network; the message suggests the nearest name.

    Examples
    --------
    >>> from nhwconv.networks import network
    >>> [(part.layer.name, part.count) for part in network("resnet18")][:2]
    [('resnet18.7x7.3-64s2@224', 1), ('resnet18.3x3.64-64@56', 4)]
    """
    net = _Walk(known("network", name, NETWORKS))
    _WALKS[name](net)
    return tuple(Part(layer, count) for layer, count in net.found.items())
