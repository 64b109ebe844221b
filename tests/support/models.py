"""A dozen small networks as people write them, and their training: what whole-network tests of adapters share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class InPlace(nn.Module):
    """VGG's manner: in-place ReLUs, `view` before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.classifier = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.shape[0], -1))


class Residual(nn.Module):
    """ResNet's manner: normalisation, strides, a projection, additions in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.down, self.projection = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(8, 16, 1, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(self.norms[0](self.stem(x)))
        y = functional.relu_(self.norms[1](self.a(x)))
        y = self.norms[2](self.b(y))
        y += x
        x = functional.relu_(y)
        y = self.down(x)
        y += self.projection(x)
        return self.head(y.relu_().mean((2, 3)))


class Depthwise(nn.Module):
    """MobileNet's and ConvNeXt's manner: depthwise with a multiplier, pointwise, gates multiplied in place."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 5, padding=2, groups=8)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.project = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(functional.silu(self.expand(x), inplace=True))
        gate = self.excite(functional.relu(self.squeeze(functional.adaptive_avg_pool2d(x, 1)), inplace=True))
        x = x * gate.sigmoid_()
        return self.project(x).mean((2, 3))


class Dense(nn.Module):
    """DenseNet's manner: everything before is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 4 * i) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.cat([x, layer(functional.relu(norm(x), inplace=True))], 1)
        return x[:, -4:].amax((2, 3))


class Unet(nn.Module):
    """U-Net's manner: down, up by transposed convolutions, skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.rise, self.up = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kept = functional.relu(self.down(x), inplace=True)
        x = functional.relu(self.middle(functional.max_pool2d(kept, 2)), inplace=True)
        return self.up(torch.cat([kept, self.rise(x)], 1)).flatten(2).logsumexp(2)


class Grouped(nn.Module):
    """ResNeXt's and ShuffleNet's manner: groups, a channel shuffle by views, a split and a dilated branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.branch, self.last = nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(8, 4, (1, 3), (2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x).relu_())
        n, c, h, w = x.shape
        x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, 1)
        return self.last(torch.cat([left, self.branch(right)], 1)).sum((2, 3))


class Shared(nn.Module):
    """One layer used at several scales, and its weights once more in a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.shared = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        small = self.shared(functional.avg_pool2d(x, 2)).tanh_()
        y = self.shared(self.shared(x).tanh()) + functional.interpolate(small, scale_factor=2)
        return functional.conv2d(y, self.shared.weight.flip(2), padding=1).mean((2, 3))


class Frozen(nn.Module):
    """Transfer learning: a frozen body, a frozen bias, a head that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
        self.body.requires_grad_(False)
        self.head.weight.requires_grad_(False)
        self.last.bias.requires_grad_(False)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.body(x).relu_()).relu_()).mean((2, 3))


class Same(nn.Conv2d):
    """As TensorFlow pads: behind more than before."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    """Weights with mean 0 and variance 1, and then PyTorch's layer."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Derived(nn.Module):
    """Layers of derived classes, a reflected border, an unbatched call."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.standard = Same(3, 6, 3, stride=2), Standardised(6, 6, 3, padding=1)
        self.border = nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        x = self.standard(self.same(x)).relu_()
        return torch.cat([self.border(x[0])[None], self.border(x[1:])]).mean((2, 3))


class Patches(nn.Module):
    """A transformer's manner: patches by a strided convolution, then tokens; a convolution among them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = (
            nn.Conv2d(3, 8, 4, 4),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, c, h, w = x.shape
        tokens = functional.layer_norm(x.flatten(2).transpose(1, 2), (c,))
        tokens = tokens + self.mix(tokens.transpose(1, 2).reshape(n, c, h, w)).flatten(2).transpose(1, 2)
        return self.head(tokens.mean(1))


class Waves(nn.Module):
    """WaveNet's and a codec's manner: dilated convolutions in one dimension, gates, transposed ones on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.down = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 4, stride=2, padding=1, bias=False)
        self.dilated, self.depth = nn.Conv1d(8, 16, 3, padding="same", dilation=4), nn.Conv1d(8, 8, 7, groups=8)
        self.up, self.rise = nn.ConvTranspose1d(8, 8, 4, 2, 1), nn.ConvTranspose1d(8, 4, 3, 2, groups=4, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.embed(x.flatten(2)).relu_())
        gate, value = self.dilated(x).chunk(2, 1)
        x = x + value.tanh() * gate.sigmoid()
        x = self.depth(functional.pad(x, (6, 0)).transpose(1, 2).contiguous().transpose(1, 2))
        x = self.up(x)
        x *= 0.5
        return self.rise(x, output_size=[2 * x.shape[2] + 3 + 1]).logsumexp(2)


class Generator(nn.Module):
    """A GAN's manner: transposed convolutions with normalisation, in groups, to an output of a given size."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.first = nn.Conv2d(3, 6, 4, 4), nn.ConvTranspose2d(6, 8, 4, 2, 1, bias=False)
        self.norm, self.second = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 3, 2, 1, groups=4)
        self.image = nn.ConvTranspose2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        code = functional.leaky_relu_(self.encode(x))
        y = functional.relu_(self.norm(self.first(code)))
        return self.image(self.second(y, output_size=x.shape[2:]).tanh_()).square().mean((2, 3))


#: All take images (N, 3, 12, 12) and give scores (N, 4).
MODELS: dict[str, Callable[[], nn.Module]] = {
    m.__name__: m
    for m in (
        InPlace, Residual, Depthwise, Dense, Unet, Grouped, Shared, Frozen, Derived, Patches, Waves, Generator,
    )
}  # fmt: skip


def build(name: str, channels_last: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return one of `MODELS` with the same parameters each time."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def batch(n: int = 4, channels_last: bool = False, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return images and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 12, 12, dtype=torch.float64, generator=generator)
    return x.to(memory_format=torch.channels_last) if channels_last else x, torch.arange(n) % 4


def gradients(model: nn.Module, x: Tensor, target: Tensor, backwards: int = 1) -> dict[str, Tensor]:
    """Return the loss and all gradients, the input's too, after this many backward passes of one graph."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    loss = functional.cross_entropy(model(leaf), target)
    for i in range(backwards):
        loss.backward(retain_graph=i + 1 < backwards)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "input": leaf.grad, **found}


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int = 3) -> list[float]:
    """Return the losses of some steps of gradient descent with momentum."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
