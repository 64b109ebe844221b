"""Three rungs of one ladder: the article's tensordot, loops compiled by Numba as anyone would write them, nhwconv.

Each rung computes the same two passes, the forward pass and the gradient of weights and bias. Each is checked against
float64 before it is timed, so that a wrong answer never looks fast. Run it, then read it:

    python examples/ladder.py
    python examples/ladder.py --layer n8h28w28c128d128k3
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, prange
from rich.console import Console
from rich.table import Table

import nhwconv as nc
from nhwconv.problem import ConvProblem
from nhwconv.workloads import make_data, parse_layer

Array = npt.NDArray[Any]

#: An early layer of ResNet-50 with two images, small enough for every rung to take milliseconds.
LAYER = "n2h58w58c64d64k3"

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
# Nothing is copied, and all cores work. But every multiplication loads its operands from cache and most of them store
# a sum there again, so the processor waits for loads and stores while its multipliers idle. The forward pass is worse
# off: its sum over channels has one accumulator, each addition waits for the one before, and a compiler may not
# reorder a sum of floats into vectors.


@njit(parallel=True)
def loops_forward(x: Array, w: Array, b: Array) -> Array:
    """Add up each output by itself; threads share out the rows of y."""
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


@njit(parallel=True)
def loops_weight_grad(x: Array, eta: Array, kh: int, kw: int) -> tuple[Array, Array]:
    """Add each pixel's share to the gradient; threads share out the output channels, so that no two add to one sum."""
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


# ------------------------------------------------------------------------------------------- rung 3: nhwconv's loop
# The same loops around a micro-kernel: a tile of sums stays in vector registers for the whole of a long sum, so each
# number that is loaded is multiplied with many others before it is let go.


def package_forward(x: Array, w: Array, b: Array) -> Array:
    """Call the strategy "loop"; "auto" may know a faster one."""
    return nc.conv2d(x, w, b, strategy="loop")


def package_weight_grad(x: Array, eta: Array, kh: int, kw: int) -> tuple[Array, Array]:
    """Call the strategy "loop"; "auto" may know a faster one."""
    return nc.conv2d_weight_grad(x, eta, (kh, kw), strategy="loop"), nc.conv2d_bias_grad(eta)


# ------------------------------------------------------------------------------------------------------- the ladder

RUNGS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "article's tensordot": (tensordot_forward, tensordot_weight_grad),
    "plain Numba loops": (loops_forward, loops_weight_grad),
    "nhwconv's loop": (package_forward, package_weight_grad),
}


def climb(problem: ConvProblem, console: Console) -> Table:
    """Check and time every rung in both passes."""
    x, w, b, eta = make_data(problem)
    table = Table("pass", "rung", title=str(problem), caption=f"{problem.flops / 1e9:.2f} GFLOP a pass")
    for name in ("ms", "GFLOP/s", "speed-up", "l2 error"):
        table.add_column(name, justify="right")
    for index, (pass_, arguments) in enumerate(
        (("forward", (x, w, b)), ("dw and db", (x, eta, problem.kh, problem.kw)))
    ):
        exact = tensordot_in_float64(index, arguments)
        article = None
        for name, functions in RUNGS.items():
            with console.status(f"{pass_}: {name}"):
                error = check(name, functions[index](*arguments), exact, problem)
                seconds = fastest(functions[index], arguments)
            label, article = (pass_, seconds) if article is None else ("", article)
            speed = problem.flops / seconds / 1e9
            cells = (f"{seconds * 1e3:.2f}", f"{speed:.1f}", f"{article / seconds:.1f}", f"{error:.0e}")
            table.add_row(label, name, *cells)
        table.add_section()
    return table


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


def fastest(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float = 1.0) -> float:
    """Return the time of the fastest call within so many seconds; everything has been compiled by `check`'s call."""
    times: list[float] = []
    end = perf_counter() + seconds
    while not times or perf_counter() < end:
        start = perf_counter()
        function(*arguments)
        times.append(perf_counter() - start)
    return min(times)


def main() -> None:
    """Climb the ladder on one layer."""
    parser = argparse.ArgumentParser(description="From the article's tensordot to nhwconv, checked and timed.")
    parser.add_argument("--layer", default=LAYER, help="in the notation of nhwconv.workloads (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        layer = parse_layer(arguments.layer)
    except ValueError as error:
        parser.error(str(error))
    if any(layer.options[name] not in ((1, 1), (0, 0), 1) for name in layer.options):
        parser.error("these few lines know neither stride, padding, dilation nor groups; leave s, p, l and g out")
    console = Console()
    console.print(climb(layer.problem(), console))


if __name__ == "__main__":
    main()
