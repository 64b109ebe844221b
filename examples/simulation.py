"""What moves a field from one moment to the next: a convolution kernel, found from what was seen of a simulation.

    python examples/simulation.py
    python examples/simulation.py --descents 1000 --out simulation.png

A substance spreads, drifts and grows: ``u[t+1] = u[t] + k * u[t] + r u[t] (1 - u[t])``, where ``k *`` is a convolution
with an unknown kernel. From noisy pictures of a few moments, gradient descent finds the kernel: each descent simulates,
compares, and carries the gradient back through all moments. Simulation, its gradient and the descents are one function
that Numba compiles, and the convolutions in it are nhwconv's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib.pyplot as plt
import numba
import numpy as np
import numpy.typing as npt

import nhwconv as nc

Array = npt.NDArray[Any]

GROWTH = 0.05


# Numba compiles a loop over elements much sooner than an expression of arrays of four axes; both run as fast.


@numba.njit
def grow(u: Array, spread: Array, after: Array) -> None:
    """Write the next moment: what has spread, and what grows."""
    for i in range(u.size):
        after.flat[i] = u.flat[i] + spread.flat[i] + GROWTH * u.flat[i] * (1 - u.flat[i])


@numba.njit
def simulate(u: Array, k: Array, moments: int) -> Array:
    """Return ``(moments + 1, N, H, W, 1)``: the fields at each moment, from u on."""
    fields = np.empty((moments + 1, *u.shape), u.dtype)
    fields[0] = u
    for t in range(moments):
        grow(fields[t], nc.conv2d(fields[t], k, padding="same"), fields[t + 1])
    return fields


@numba.njit
def gradient(fields: Array, seen: Array, k: Array) -> tuple[float, Array]:
    """Return half the mean square of what a simulation is off, and its gradient in k: from the last moment back."""
    loss, dk, g = 0.0, np.zeros_like(k), np.zeros_like(fields[0])
    for t in range(len(fields) - 1, 0, -1):
        u = fields[t - 1]
        for i in range(g.size):
            off = (fields[t].flat[i] - seen[t].flat[i]) / fields.size
            loss += 0.5 * off**2 * fields.size
            g.flat[i] += off
        du, dw, _ = nc.conv2d_backward(u, k, g, needs=("dx", "dw"), padding="same")
        for i in range(dk.size):
            dk.flat[i] += dw.flat[i]
        for i in range(g.size):
            g.flat[i] += du.flat[i] + GROWTH * (1 - 2 * u.flat[i]) * g.flat[i]
    return loss, dk


@numba.njit
def descend(k: Array, seen: Array, rate: float, descents: int) -> Array:
    """Change k, by Adam; return the loss before each descent."""
    losses, mean, square = np.empty(descents), np.zeros(k.size), np.zeros(k.size)
    for step in range(descents):
        losses[step], dk = gradient(simulate(seen[0], k, len(seen) - 1), seen, k)
        slower = 1 - step / descents
        for i in range(k.size):
            mean[i] += 0.1 * (dk.flat[i] - mean[i])
            square[i] += 0.01 * (dk.flat[i] ** 2 - square[i])
            change = mean[i] / (1 - 0.9 ** (step + 1)) / (np.sqrt(square[i] / (1 - 0.99 ** (step + 1))) + 1e-12)
            k.flat[i] -= slower * rate * change
    return losses


def true_kernel() -> Array:
    """Return a kernel (1, 5, 5, 1) that spreads more along one diagonal than across, and drifts to the right."""
    rows, columns = np.mgrid[-2:3, -2:3]
    along, across = (rows + columns) / 2, (rows - columns) / 2
    k = np.exp(-(along**2) / 1.5 - across**2 / 0.4)
    k[2, 2] = 0
    k *= 0.25 / k.sum()
    k[2, 2] = -k.sum()  # nothing is lost
    k[2, 1] += 0.05
    k[2, 3] -= 0.05
    return k[np.newaxis, :, :, np.newaxis]


def blobs(count: int, size: int, rng: np.random.Generator) -> Array:
    """Return fields (count, size, size, 1) between 0 and 1, with fine details, which tell most about a kernel."""
    noise = np.fft.rfft2(rng.standard_normal((count, size, size)))
    rows, columns = np.fft.fftfreq(size)[:, np.newaxis], np.fft.rfftfreq(size)
    u = np.fft.irfft2(noise / (1 + np.hypot(rows, columns)), (size, size))
    u = (u - u.min((1, 2), keepdims=True)) / np.ptp(u, (1, 2), keepdims=True)
    return np.ascontiguousarray(u[..., np.newaxis])


def draw(path: Path, true: Array, found: Array, losses: Array, fields: Array, again: Array) -> None:
    """Draw the kernels, the descent, and a field that no descent has seen, both ways."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.5), layout="constrained")
    scale = float(np.abs(true).max())
    for axis, kernel, title in ((axes[0, 0], true, "the kernel"), (axes[0, 1], found, "as it was found")):
        axis.imshow(kernel[0, :, :, 0], cmap="RdBu_r", vmin=-scale, vmax=scale)
        axis.set_title(title)
    image = axes[0, 2].imshow((found - true)[0, :, :, 0], cmap="RdBu_r")
    axes[0, 2].set_title("the difference")
    figure.colorbar(image, ax=axes[0, 2])
    axes[0, 3].semilogy(losses, color="black")
    axes[0, 3].set_title("loss")
    axes[0, 3].set_xlabel("descents")
    last = len(fields) - 1
    for axis, field, title in (
        (axes[1, 0], fields[0], "a new field"),
        (axes[1, 1], fields[last], f"{last} moments later"),
        (axes[1, 2], again[last], "with the kernel that was found"),
    ):
        axis.imshow(field[0, :, :, 0], cmap="magma", vmin=0, vmax=1)
        axis.set_title(title)
    image = axes[1, 3].imshow((again - fields)[last, 0, :, :, 0], cmap="RdBu_r")
    axes[1, 3].set_title("the difference")
    figure.colorbar(image, ax=axes[1, 3])
    for axis in (*axes[0, :3], *axes[1]):
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Simulate, forget the kernel, find it, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--descents", type=int, default=600)
    parser.add_argument("--fields", type=int, default=4, help="how many are seen")
    parser.add_argument("--size", type=int, default=32, help="pixels on a side")
    parser.add_argument("--moments", type=int, default=4, help="how many are seen of each")
    parser.add_argument("--noise", type=float, default=1e-3, help="of what is seen")
    parser.add_argument("--out", type=Path, default=Path("simulation.png"))
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    true = true_kernel()
    seen = simulate(blobs(options.fields, options.size, rng), true, options.moments)
    seen[1:] += options.noise * rng.standard_normal(seen[1:].shape)

    start = perf_counter()
    descend(np.zeros_like(true), seen[:2], 0.0, 1)
    print(f"compiled in {perf_counter() - start:.1f} s")
    found = np.zeros_like(true)
    start = perf_counter()
    losses = descend(found, seen, 0.01, options.descents)
    seconds = perf_counter() - start
    convolutions = 3 * options.moments * options.descents
    print(f"{options.descents} descents in {seconds:.2f} s: {convolutions} convolutions and gradients")
    print(f"loss: {losses[0]:.3g} at first, {losses[-1]:.3g} at last")
    print(f"the kernel is off by {np.linalg.norm(found - true) / np.linalg.norm(true):.2%}")

    new = blobs(1, options.size, rng)
    fields, again = (simulate(new, k, 5 * options.moments) for k in (true, found))
    print(f"a new field, {5 * options.moments} moments later: off by at most {np.abs(again - fields)[-1].max():.2g}")
    draw(options.out, true, found, losses, fields, again)
    print(f"drawn in {options.out}")


if __name__ == "__main__":
    main()
