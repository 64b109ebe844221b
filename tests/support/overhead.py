"""What the protections cost a call: ``python tests/support/overhead.py`` prints a table, in nanoseconds.

Each is timed beside the same work without it, in alternating rounds; the least of all rounds counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from timeit import Timer

import numpy as np

from nhwconv import checks
from nhwconv.runtime import arrays, executor

ROUNDS, CALLS = 400, 200
#: No protection may cost more than this.
LIMIT = 1000.0


def _nothing(*arguments: object) -> None:
    """Stand for a form of the executor."""


def _launch(layer: str | None, workers: int) -> Callable[[], object]:
    def call() -> None:
        executor.launcher.layer = layer
        executor.launch(_nothing, _nothing, workers, 1, 2, 3)

    return call


def _unlaunched() -> None:
    executor.launcher.layer = "omp"
    _nothing(1, 2, 3)


def _new(size: int) -> object:
    raw = np.empty(size + arrays.ALIGNMENT, arrays._BYTE)
    return arrays._Buffer((size,), arrays._BYTE, raw, -raw.ctypes.data % arrays.ALIGNMENT)


def protections() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return each protection, by name: work with it, and without."""
    out, x = np.zeros((2, 3, 5, 4), np.float32), np.zeros((2, 5, 6, 3), np.float32)
    size = arrays.REUSED_FROM
    lock = threading.RLock()

    def locked() -> None:
        with lock:
            pass

    return {
        "serial form for one worker or in an orphan": (_launch(None, 1), _unlaunched),
        "parallel form under omp and tbb": (_launch("omp", 2), _unlaunched),
        "claim of workqueue": (_launch("workqueue", 2), _unlaunched),
        "second try of an allocation": (
            lambda: arrays._buffers.new(size),
            lambda: _new(size),
        ),
        "out is apart from an input": (
            lambda: checks.as_out("out", out, out.shape, out.dtype, {"x": x}),
            lambda: checks.as_out("out", out, out.shape, out.dtype, {}),
        ),
        "a free lock, for comparison": (locked, _nothing),
    }


def measure() -> dict[str, float]:
    """Return what each protection costs, in nanoseconds a call."""
    before, costs = executor.launcher.layer, {}
    try:
        for name, pair in protections().items():
            timers = [Timer(work) for work in pair]
            rounds = [[timer.timeit(CALLS) / CALLS * 1e9 for timer in timers] for _ in range(ROUNDS)]
            costs[name] = min(r[0] for r in rounds) - min(r[1] for r in rounds)
    finally:
        executor.launcher.layer = before
    return costs


def main() -> int:
    """Print the table; return how many cost too much."""
    costs = measure()
    for name, cost in costs.items():
        print(f"{name:<44}{cost:6.0f} ns")
    return sum(cost > LIMIT for cost in costs.values())


if __name__ == "__main__":
    raise SystemExit(main())
