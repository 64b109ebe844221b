"""How the workers of a step share its tasks: each its own part first, then what the others have left.

A worker that always starts at the same place finds in its cache what it left there: the end of the pass before, or of
the layer before. And no worker waits while there is work, whatever else the machine does.
"""

from __future__ import annotations

from ..codegen.simd import fetch_add, integers
from .jit import device

__all__ = ["COUNTERS_APART", "clear_queue", "next_task"]

#: A queue is one counter for each worker, some cache lines apart: prefetchers ask for neighbours.
COUNTERS_APART = 32


@device
def clear_queue(queue, workers):
    """Begin: nobody has taken a task."""
    for worker in range(workers):
        integers(queue)[worker * COUNTERS_APART] = 0


@device
def next_task(queue, worker, workers, tasks):
    """Take a task that nobody has taken, and return its number; return `tasks` when none is left."""
    for step in range(workers):
        part = (worker + step) % workers
        task = part * tasks // workers + fetch_add(integers(queue), part * COUNTERS_APART)
        if task < (part + 1) * tasks // workers:
            return task
    return tasks
