"""How workers share tasks: each is done once, whoever is fast."""

import numba
import numpy as np
import pytest

from nhwconv.runtime.tasks import COUNTERS_APART, clear_queue, next_task


@numba.njit
def take(queue, worker, workers, tasks):
    return next_task(queue, worker, workers, tasks)


@numba.njit
def clear(queue, workers):
    clear_queue(queue, workers)


class Queue:
    """A cleared queue in memory that held anything."""

    def __init__(self, workers):
        self.workers, self.counters = workers, np.full(workers * COUNTERS_APART, -7)
        clear(self.counters.ctypes.data, workers)

    def take(self, worker, tasks):
        return take(self.counters.ctypes.data, worker, self.workers, tasks)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("tasks", [0, 1, 2, 5, 7, 100])
def test_every_task_is_taken_once(tasks, workers):
    """Workers that ask in any order get all tasks between them, and then nothing more."""
    rng = np.random.default_rng(tasks)
    for speeds in (np.ones(workers), 10.0 ** -np.arange(workers)):  # the last may never come
        queue = Queue(workers)
        order = rng.choice(workers, size=40 * (tasks + 1), p=speeds / speeds.sum())
        taken = [queue.take(worker, tasks) for worker in order]
        assert sorted(task for task in taken if task < tasks) == list(range(tasks))
        assert all(queue.take(worker, tasks) >= tasks for worker in range(workers))


def test_a_worker_starts_with_its_own_part():
    """So that it finds in its cache what it left there."""
    queue = Queue(3)
    assert [queue.take(1, 9) for _ in range(4)] == [3, 4, 5, 6]
    assert queue.take(2, 9) == 7
    assert queue.take(0, 9) == 0


def test_counters_lie_some_cache_lines_apart():
    """One a worker, and nothing between them is touched."""
    queue = Queue(2)
    queue.take(1, 4)
    assert (queue.counters[1:COUNTERS_APART] == -7).all()
    assert (queue.counters[COUNTERS_APART + 1 :] == -7).all()
    assert COUNTERS_APART * 8 >= 2 * 64
