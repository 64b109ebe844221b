"""Seven rungs of one ladder, from the article's tensordot to Winograd's fewer multiplications.

Each rung computes the same two passes, the forward pass and the gradient of weights and bias. Each is checked against
float64 before it is timed, so that a wrong answer never looks fast. Run it, then read it; docs/ladder.md goes with it:

    python examples/ladder.py
    python examples/ladder.py --layer n8h28w28c128d128k3 --out ladder.png
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange
from rich.console import Console
from rich.table import Table

import nhwconv as nc
from nhwconv.problem import ConvProblem
from nhwconv.strategies import REGISTRY
from nhwconv.timing import time_calls
from nhwconv.workloads import make_data, parse_layer

Array = npt.NDArray[Any]

#: An early layer of ResNet-50 with two images, small enough for every rung to take milliseconds.
LAYER = "n2h58w58c64d64k3"
#: How long each rung is timed, after the call that `check` looks at, which compiles; the fastest call counts.
SECONDS = 0.5

# ------------------------------------------------------------------------------- rung 1: the article's tensordot
# A kernel position sees one window of x, and all samples, pixels and channels of it are a matrix product. NumPy has
# to copy each window into a matrix before BLAS can multiply it, and a 3 x 3 kernel copies x nine times.


def tensordot_forward(x: Array, w: Array, b: Array) -> Array:
    """Sum a tensordot over kernel positions: ``y (n, oh, ow, d)``."""
    d, kh, kw, _ = w.shape
    n, oh, ow = x.shape[0], x.shape[1] - kh + 1, x.shape[2] - kw + 1
    y = np.broadcast_to(b, (n, oh, ow, d)).copy()
    for h in range(kh):
        for v in range(kw):
            y += np.tensordot(x[:, h : h + oh, v : v + ow, :], w[:, h, v, :], ([3], [1]))
    return y


def tensordot_weight_grad(x: Array, eta: Array, kh: int, kw: int) -> tuple[Array, Array]:
    """The fourth step of the article: one tensordot for each kernel position."""
    oh, ow, d = eta.shape[1:]
    grad_w = np.empty((d, kh, kw, x.shape[3]), x.dtype)
    for h in range(kh):
        for v in range(kw):
            grad_w[:, h, v, :] = np.tensordot(eta, x[:, h : h + oh, v : v + ow, :], ([0, 1, 2], [0, 1, 2]))
    return grad_w, eta.sum((0, 1, 2))


# ------------------------------------------------------------------------------------ rung 2: plain loops in Numba
# Nothing is copied. But every multiplication loads its operands from cache, and one core works. The forward pass has
# one accumulator: each addition waits for the one before, and a compiler may not reorder a sum of floats into vectors.
# (`prange` is `range` here: it means something on the next rung.)


@njit
def naive_forward(x: Array, w: Array, b: Array) -> Array:
    """Add up each output by itself."""
    n, (d, kh, kw, c) = x.shape[0], w.shape
    oh, ow = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    y = np.empty((n, oh, ow, d), x.dtype)
    for p in prange(oh):
        for i in range(n):
            for q in range(ow):
                for k in range(d):
                    total = b[k]
                    for h in range(kh):
                        for v in range(kw):
                            for m in range(c):
                                total += x[i, p + h, q + v, m] * w[k, h, v, m]
                    y[i, p, q, k] = total
    return y


@njit
def naive_weight_grad(x: Array, eta: Array, kh: int, kw: int) -> tuple[Array, Array]:
    """Add up each element of the gradient by itself."""
    n, oh, ow, d = eta.shape
    c = x.shape[3]
    grad_w, grad_b = np.zeros((d, kh, kw, c), x.dtype), np.zeros(d, x.dtype)
    for k in prange(d):
        for i in range(n):
            for p in range(oh):
                for q in range(ow):
                    grad_b[k] += eta[i, p, q, k]
        for h in range(kh):
            for v in range(kw):
                for m in range(c):
                    for i in range(n):
                        for p in range(oh):
                            for q in range(ow):
                                grad_w[k, h, v, m] += eta[i, p, q, k] * x[i, p + h, q + v, m]
    return grad_w, grad_b


# ------------------------------------------------------------------------------------------ rung 3: all cores
# The very same loops, where `prange` shares out the outermost: rows of y, or output channels. No two threads add to one
# sum.

parallel_forward = njit(parallel=True)(naive_forward.py_func)
parallel_weight_grad = njit(parallel=True)(naive_weight_grad.py_func)


# ---------------------------------------------------------------------------------- rung 4: the innermost loop last
# The innermost loop runs over numbers that lie side by side and are summed apart: a compiler turns it into vectors
# without reordering any sum. But each multiply-add still loads a sum from cache and stores it there again.


@njit(parallel=True)
def reordered_forward(x: Array, w: Array, b: Array) -> Array:
    """Add to all output channels of a pixel at once, with the weights as ``(kh, kw, c, d)``."""
    n, (d, kh, kw, c) = x.shape[0], w.shape
    oh, ow = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    turned = w.transpose(1, 2, 3, 0).copy()
    y = np.empty((n, oh, ow, d), x.dtype)
    for p in prange(oh):
        for i in range(n):
            for q in range(ow):
                for k in range(d):
                    y[i, p, q, k] = b[k]
                for h in range(kh):
                    for v in range(kw):
                        for m in range(c):
                            for k in range(d):
                                y[i, p, q, k] += x[i, p + h, q + v, m] * turned[h, v, m, k]
    return y


@njit(parallel=True)
def reordered_weight_grad(x: Array, eta: Array, kh: int, kw: int) -> tuple[Array, Array]:
    """Add to all input channels of a kernel position at once."""
    n, oh, ow, d = eta.shape
    c = x.shape[3]
    grad_w, grad_b = np.zeros((d, kh, kw, c), x.dtype), np.zeros(d, x.dtype)
    for k in prange(d):
        for i in range(n):
            for p in range(oh):
                for q in range(ow):
                    grad_b[k] += eta[i, p, q, k]
                    for h in range(kh):
                        for v in range(kw):
                            for m in range(c):
                                grad_w[k, h, v, m] += eta[i, p, q, k] * x[i, p + h, q + v, m]
    return grad_w, grad_b


# ------------------------------------------------------------------------------------------------- rung 5: im2col
# Every window of x is copied into a row of one matrix, and BLAS, whose inner loops hold sums in registers, does the
# rest in one product. The copies are kh * kw times as large as x.


def patches(x: Array, kh: int, kw: int) -> Array:
    """Return the window of each output pixel as a row: ``(pixels, kh * kw * c)``."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), (1, 2))  # (n, oh, ow, c, kh, kw)
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, kh * kw * x.shape[3])


def im2col_forward(x: Array, w: Array, b: Array) -> Array:
    """Multiply the patches with the kernels."""
    d, kh, kw, _ = w.shape
    y = patches(x, kh, kw) @ w.reshape(d, -1).T + b
    return y.reshape(x.shape[0], x.shape[1] - kh + 1, x.shape[2] - kw + 1, d)


def im2col_weight_grad(x: Array, eta: Array, kh: int, kw: int) -> tuple[Array, Array]:
    """Multiply the gradient with the patches: a sum over all pixels."""
    flat = eta.reshape(-1, eta.shape[3])
    grad_w = flat.T @ patches(x, kh, kw)
    return grad_w.reshape(eta.shape[3], kh, kw, x.shape[3]), flat.sum(0)


# ------------------------------------------------------------------------------- rungs 6 and 7: nhwconv's strategies
# "loop": the loops of rung 4 around a micro-kernel. A tile of sums stays in vector registers for the whole of a long
# sum, so each number that is loaded is multiplied with many others before it is let go, and nothing is copied out.
# "winograd": the same micro-kernel on transformed tiles, where a 3 x 3 kernel needs a quarter of the multiplications.


def package(strategy: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the two passes with one strategy; "auto" would take the faster."""

    def forward(x: Array, w: Array, b: Array) -> Array:
        return nc.conv2d(x, w, b, strategy=strategy)

    def weight_grad(x: Array, eta: Array, kh: int, kw: int) -> tuple[Array, Array]:
        return nc.conv2d_weight_grad(x, eta, (kh, kw), strategy=strategy), nc.conv2d_bias_grad(eta)

    return forward, weight_grad


# ------------------------------------------------------------------------------------------------------- the ladder

RUNGS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "article's tensordot": (tensordot_forward, tensordot_weight_grad),
    "plain loops": (naive_forward, naive_weight_grad),
    "parallel loops": (parallel_forward, parallel_weight_grad),
    "reordered loops": (reordered_forward, reordered_weight_grad),
    "im2col": (im2col_forward, im2col_weight_grad),
    "register tiles": package("loop"),
    "Winograd": package("winograd"),
}

#: For each pass, each rung's GFLOP/s.
Speeds = dict[str, dict[str, float]]


def climb(problem: ConvProblem, console: Console) -> Speeds:
    """Check and time every rung in both passes, and print them as a table."""
    x, w, b, eta = make_data(problem)
    able = [pass_ for pass_ in ("forward", "weight_grad") if REGISTRY["winograd"].supports(problem, pass_) is None]
    rungs = {name: functions for name, functions in RUNGS.items() if name != "Winograd" or len(able) == 2}
    caption = f"{problem.flops / 1e9:.2f} GFLOP a pass" + ("" if len(able) == 2 else "; not for Winograd")
    table = Table("pass", "rung", title=str(problem), caption=caption)
    for name in ("ms", "GFLOP/s", "speed-up", "l2 error"):
        table.add_column(name, justify="right")
    passes = {"forward": (x, w, b), "dw and db": (x, eta, problem.kh, problem.kw)}
    speeds: Speeds = {pass_: {} for pass_ in passes}
    for index, (pass_, arguments) in enumerate(passes.items()):
        exact = tensordot_in_float64(index, arguments)
        for name, functions in rungs.items():
            with console.status(f"{pass_}: {name}"):
                error = check(name, functions[index](*arguments), exact, problem)
                seconds = min(time_calls(partial(functions[index], *arguments), SECONDS))
            own = speeds[pass_]
            own[name] = problem.flops / seconds / 1e9
            gain = own[name] / own["article's tensordot"]
            cells = (f"{seconds * 1e3:.2f}", f"{own[name]:.1f}", f"{gain:.2f}", f"{error:.0e}")
            table.add_row(pass_ if len(own) == 1 else "", name, *cells)
        table.add_section()
    console.print(table)
    return speeds


def draw(speeds: Speeds, title: str, file: Path) -> None:
    """Draw the ladder: a bar for each rung and pass."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for index, (pass_, own) in enumerate(speeds.items()):
        places = [place + 0.4 * index for place in range(len(own))]
        bars = axes.barh(places, list(own.values()), 0.38, label=pass_)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.set_yticks([place + 0.2 for place in range(len(own))], list(own))
    axes.invert_yaxis()
    axes.set(xlabel="GFLOP/s, as a direct convolution counts", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def tensordot_in_float64(index: int, arguments: tuple[Any, ...]) -> Any:
    """Return what the first rung finds with twice the digits."""
    double = (a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in arguments)
    return RUNGS["article's tensordot"][index](*double)


def check(name: str, got: Any, exact: Any, problem: ConvProblem) -> float:
    """Return the l2 error against float64, the worse of a pass's results; stop where rounding does not explain it."""
    pairs = zip(got, exact, strict=True) if isinstance(got, tuple) else [(got, exact)]
    error = max(float(np.linalg.norm(g - e) / np.linalg.norm(e)) for g, e in pairs)
    # Rounding errors of one running sum add up like a random walk.
    terms = max(problem.n * problem.oh * problem.ow, problem.kh * problem.kw * problem.c)
    if not error < float(np.finfo(np.float32).eps) * math.sqrt(terms):
        raise SystemExit(f"{name}: wrong, with an error of {error:.1e}")
    return error


def main() -> None:
    """Climb the ladder on one layer."""
    parser = argparse.ArgumentParser(description="From the article's tensordot to nhwconv, checked and timed.")
    parser.add_argument("--layer", default=LAYER, help="in the notation of nhwconv.workloads (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="draw the ladder into this file")
    arguments = parser.parse_args()
    try:
        layer = parse_layer(arguments.layer)
    except ValueError as error:
        parser.error(str(error))
    if any(layer.options[name] not in ((1, 1), (0, 0), 1) for name in layer.options):
        parser.error("these few lines know neither stride, padding, dilation nor groups; leave s, p, l and g out")
    console = Console()
    speeds = climb(layer.problem(), console)
    if arguments.out is not None:
        draw(speeds, str(layer.problem()), arguments.out)


if __name__ == "__main__":
    main()
