"""Train a LeNet-like network on scanned digits: nhwconv's layers, and the rest of the network in plain NumPy.

    python examples/digits.py

The images are scikit-learn's `load_digits`: 1,797 handwritten digits of 8x8 pixels. Every layer has the two methods
of the article's: `forward(x)`, and `backward(eta)`, which takes the gradient of the loss with respect to what the
layer gave out, and returns it with respect to what the layer was given.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # the figure goes to a file

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nhwconv as nc

Array = npt.NDArray[Any]

SEED = 0
BATCH = 32


# ------------------------------------------------------------------------------- layers without a convolution


class ReLU:
    """``max(x, 0)``."""

    def forward(self, x: Array) -> Array:
        """Keep what is positive."""
        self.positive = x > 0
        return x * self.positive

    def backward(self, eta: Array) -> Array:
        """Pass the gradient on where the input was positive."""
        return eta * self.positive


class MaxPool:
    """The largest of each 2x2 square of pixels, for every channel."""

    def forward(self, x: Array) -> Array:
        """(n, h, w, c) becomes (n, h/2, w/2, c)."""
        n, h, w, c = x.shape
        squares = x.reshape(n, h // 2, 2, w // 2, 2, c)
        y = squares.max(axis=(2, 4), keepdims=True)
        self.largest = squares == y
        return y.reshape(n, h // 2, w // 2, c)

    def backward(self, eta: Array) -> Array:
        """Give each gradient to the pixel that was the largest."""
        n, h, w, c = eta.shape
        return (self.largest * eta[:, :, None, :, None, :]).reshape(n, 2 * h, 2 * w, c)


class Flatten:
    """One row of numbers for each image."""

    def forward(self, x: Array) -> Array:
        """(n, h, w, c) becomes (n, h*w*c)."""
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, eta: Array) -> Array:
        """Put the gradient back into the image's shape."""
        return eta.reshape(self.shape)


class Dense:
    """``x @ W + b``, with the names that `nhwconv.Conv2D` has."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        self.W = (rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs)).astype(np.float32)
        self.b = np.zeros(outputs, np.float32)

    def forward(self, x: Array) -> Array:
        """(n, inputs) becomes (n, outputs)."""
        self.x = x
        return x @ self.W + self.b

    def backward(self, eta: Array) -> Array:
        """Set gradW and gradb; return the gradient of x."""
        self.gradW = self.x.T @ eta
        self.gradb = eta.sum(axis=0)
        return eta @ self.W.T


# ------------------------------------------------------------------------------------- network, loss, optimiser


class Network:
    """Two convolutions and two dense layers."""

    def __init__(self, rng: np.random.Generator) -> None:
        # Nothing comes before the first layer, so nobody needs the gradient of its input.
        self.first = nc.Conv2D(1, 16, 5, padding=2, rng=rng, needs_input_grad=False)
        self.layers: list[Any] = [
            self.first, ReLU(), MaxPool(),                         # (n, 8, 8, 1) -> (n, 4, 4, 16)
            nc.Conv2D(16, 32, 3, padding=1, rng=rng), ReLU(), MaxPool(),  # -> (n, 2, 2, 32)
            Flatten(), Dense(128, 64, rng), ReLU(), Dense(64, 10, rng),   # -> (n, 10)
        ]  # fmt: skip

    def forward(self, x: Array) -> Array:
        """Return ten scores for each image."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, eta: Array) -> None:
        """Set the gradients of all parameters, from the gradient of the scores."""
        for layer in reversed(self.layers):
            eta = layer.backward(eta)


def softmax(scores: Array) -> Array:
    """Turn each row of scores into probabilities."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def cross_entropy(scores: Array, labels: Array) -> tuple[float, Array]:
    """Return the mean of ``-log p(label)``, and its gradient with respect to the scores."""
    p = softmax(scores)
    rows = np.arange(len(labels))
    loss = float(-np.log(p[rows, labels] + 1e-12).mean())
    p[rows, labels] -= 1
    return loss, p / len(labels)


class Momentum:
    """Stochastic gradient descent with momentum, ``v = m v - rate g; parameter += v``, and weight decay."""

    def __init__(self, layers: list[Any], momentum: float = 0.9, decay: float = 0.005) -> None:
        self.layers = [layer for layer in layers if hasattr(layer, "W")]
        self.momentum, self.decay = momentum, decay
        self.v = [(np.zeros_like(layer.W), np.zeros_like(layer.b)) for layer in self.layers]

    def step(self, rate: float) -> None:
        """Update every parameter in place."""
        for layer, (vW, vb) in zip(self.layers, self.v, strict=True):
            decayed = layer.gradW + self.decay * layer.W
            for v, parameter, gradient in ((vW, layer.W, decayed), (vb, layer.b, layer.gradb)):
                v *= self.momentum
                v -= rate * gradient
                parameter += v


# -------------------------------------------------------------------------------------------------- training


class Digits(NamedTuple):
    """Images (n, 8, 8, 1) from 0 to 1, and what they show."""

    x: Array
    label: Array


def load() -> tuple[Digits, Digits]:
    """Return the digits to learn from, and a held-out fifth."""
    data = load_digits()
    images = (data.images / 16).astype(np.float32)[..., None]
    x, x_test, label, label_test = train_test_split(
        images, data.target, test_size=0.2, random_state=SEED, stratify=data.target
    )
    return Digits(x, label), Digits(x_test, label_test)


def jitter(x: Array, rng: np.random.Generator) -> Array:
    """Move some of the images by a pixel: a digit remains the same digit."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    start = rng.choice(3, (2, len(x), 1), p=[1 / 6, 2 / 3, 1 / 6])
    rows, columns = start + np.arange(8)  # (n, 8) each
    return padded[np.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]


class History(NamedTuple):
    """What the loss curve shows: the loss of each step, and the held-out accuracy after each epoch."""

    loss: list[float]
    accuracy: list[float]


def train(network: Network, digits: Digits, test: Digits, epochs: int, console: Console) -> History:
    """Train for some epochs, with a progress bar."""
    rng = np.random.default_rng(SEED)
    optimiser = Momentum(network.layers)
    history = History([], [])
    steps = len(digits.x) // BATCH
    columns = (
        TextColumn("epoch {task.fields[epoch]:2d}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  held-out accuracy {task.fields[accuracy]:.1%}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=epochs * steps, epoch=1, loss=float("nan"), accuracy=accuracy(network, test))
        for epoch in range(epochs):
            order = rng.permutation(len(digits.x))
            for step in range(steps):
                batch = order[step * BATCH : (step + 1) * BATCH]
                scores = network.forward(jitter(digits.x[batch], rng))
                loss, eta = cross_entropy(scores, digits.label[batch])
                network.backward(eta)
                done = (epoch * steps + step) / (epochs * steps)
                optimiser.step(rate=0.04 * (1 + np.cos(np.pi * done)) / 2)  # a cosine from 0.04 down to 0
                history.loss.append(loss)
                bar.update(task, advance=1, epoch=epoch + 1, loss=np.mean(history.loss[-steps:]))
            history.accuracy.append(accuracy(network, test))
            bar.update(task, accuracy=history.accuracy[-1])
    return history


def accuracy(network: Network, digits: Digits) -> float:
    """Return the share of digits that are read rightly."""
    return float((network.forward(digits.x).argmax(axis=1) == digits.label).mean())


# ---------------------------------------------------------------------------------------------------- figure

INK, ACCENT, WRONG = "#30343b", "#2563a8", "#c2402f"


def draw(network: Network, history: History, test: Digits, path: Path) -> None:
    """Save a figure: how training went, what the first layer learned, and which digits are hard."""
    style = {"font.size": 9, "axes.titlesize": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
             "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    with plt.rc_context(style):
        figure = plt.figure(figsize=(10, 7.2), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.15, 1], hspace=0.06)
        left, right = top.subfigures(1, 2, width_ratios=[1.25, 1], wspace=0.04)
        draw_curves(left, history)
        draw_kernels(right, network.first.W)
        draw_hardest(bottom, softmax(network.forward(test.x)), test)
        figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)
        plt.close(figure)


def draw_curves(figure: Any, history: History) -> None:
    """The loss of every step with its mean over an epoch, and the error on held-out digits."""
    epochs = len(history.accuracy)
    steps = len(history.loss) // epochs
    loss_axes, error_axes = figure.subplots(2, 1, sharex=True)
    loss = np.array(history.loss)
    loss_axes.plot(np.arange(1, len(loss) + 1) / steps, loss, color=ACCENT, alpha=0.25, linewidth=0.7, label="batch")
    at = np.arange(1, epochs + 1)
    loss_axes.plot(at, loss.reshape(epochs, steps).mean(axis=1), color=ACCENT, label="mean of an epoch")
    loss_axes.set(yscale="log", ylabel="training loss", title="Training")
    loss_axes.legend(frameon=False)
    error_axes.plot(at, 100 * (1 - np.array(history.accuracy)), color=WRONG, marker="o", markersize=3, clip_on=False)
    error_axes.xaxis.get_major_locator().set_params(integer=True)
    error_axes.set(xlabel="epoch", ylabel="held-out error, %", xlim=(0, epochs), ylim=(0, None))


def draw_kernels(figure: Any, w: Array) -> None:
    """The kernels of the first layer, all on one scale."""
    figure.suptitle("The 16 kernels of the first layer", fontsize=11)
    limit = np.abs(w).max()
    axes = figure.subplots(4, 4)
    for ax, kernel in zip(axes.flat, w[..., 0], strict=True):
        image = ax.imshow(kernel, cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set_axis_off()
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30)
    bar.outline.set_visible(False)


def draw_hardest(figure: Any, p: Array, test: Digits) -> None:
    """The held-out digits that the network gives the least chance; the misread ones come first, in red."""
    chance, read = p[np.arange(len(p)), test.label], p.argmax(axis=1)
    wrong = read != test.label
    hardest = np.lexsort((chance, ~wrong))[:16]
    figure.suptitle(f"Held-out digits: {wrong.sum()} of {len(p)} misread (red), then the least certain", fontsize=11)
    for ax, i in zip(figure.subplots(2, 8).flat, hardest, strict=True):
        ax.imshow(test.x[i, :, :, 0], cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color=WRONG if wrong[i] else "#c9ccd1", linewidth=1.5 if wrong[i] else 0.8)
        text = f"read {read[i]}, is {test.label[i]}" if wrong[i] else f"{read[i]}, {chance[i]:.0%} sure"
        ax.set_xlabel(text, color=WRONG if wrong[i] else INK)


# ------------------------------------------------------------------------------------------------------ main


def main() -> None:
    """Train, draw, and print the accuracy."""
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits with nhwconv.")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training digits (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="the figure (default: digits.png)")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error("--epochs: expected at least 1")

    console = Console()
    digits, test = load()
    network = Network(np.random.default_rng(SEED))
    console.print(f"{len(digits.x)} digits to learn from, {len(test.x)} held out")
    with console.status("compiling kernels; later runs load them from the cache"):
        _, eta = cross_entropy(network.forward(digits.x[:BATCH]), digits.label[:BATCH])
        network.backward(eta)
        accuracy(network, test)

    start = time.perf_counter()
    history = train(network, digits, test, options.epochs, console)
    seconds = time.perf_counter() - start
    draw(network, history, test, options.out)
    console.print(f"trained for {options.epochs} epochs in {seconds:.1f} s; figure: {options.out}", highlight=False)
    console.print(f"test accuracy: {history.accuracy[-1]:.1%}", highlight=False)


if __name__ == "__main__":
    main()
