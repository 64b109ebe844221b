"""How the workers of a kernel share its tasks: each its own part first, then what the others have left.

A worker that always starts at the same place finds in its cache what it left there: the end of the pass before, or of
the layer before. And no worker waits while there is work, whatever else the machine does.
"""

from __future__ import annotations

from .jit import COUNTERS_APART, device
from .simd import fetch_add

__all__ = ["next_task"]


@device
def next_task(queue, worker, workers, tasks):
    """Take a task that nobody has taken, and return its number; return `tasks` when none is left."""
    for step in range(workers):
        part = (worker + step) % workers
        task = part * tasks // workers + fetch_add(queue, part * COUNTERS_APART)
        if task < (part + 1) * tasks // workers:
            return task
    return tasks
