"""How workers share tasks: each is done once, whoever is fast."""

import numpy as np
import pytest
from nhwconv.kernels.jit import COUNTERS_APART
from nhwconv.kernels.tasks import next_task


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("tasks", [0, 1, 2, 5, 7, 100])
def test_every_task_is_taken_once(tasks, workers):
    """Workers that ask in any order get all tasks between them, and then nothing more."""
    rng = np.random.default_rng(tasks)
    for speeds in (np.ones(workers), 10.0 ** -np.arange(workers)):  # the last may never come
        queue = np.zeros(workers * COUNTERS_APART, np.int64)
        order = rng.choice(workers, size=40 * (tasks + 1), p=speeds / speeds.sum())
        taken = [next_task(queue, worker, workers, tasks) for worker in order]
        assert sorted(task for task in taken if task < tasks) == list(range(tasks))
        assert all(next_task(queue, worker, workers, tasks) >= tasks for worker in range(workers))


def test_a_worker_starts_with_its_own_part():
    """So that it finds in its cache what it left there."""
    queue = np.zeros(3 * COUNTERS_APART, np.int64)
    assert [next_task(queue, 1, 3, 9) for _ in range(4)] == [3, 4, 5, 6]
    assert next_task(queue, 2, 3, 9) == 7
    assert next_task(queue, 0, 3, 9) == 0
