"""The bias gradient: a sum of dy over samples and pixels, the same for every strategy."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from . import arrays, machine
from .arrays import Array
from .kernels.bias import COLUMN_SUMS, column_sums
from .problem import narrow

__all__ = ["bias_grad", "parts", "store"]

#: Pixels of one partial sum: short sums, added in float64, keep the error at a few roundings.
BLOCK = 256
#: Half types are converted so many elements at a time.
STRIP = 4 * 2**20
#: Below this many elements a parallel launch costs more than it saves.
SERIAL = 100_000


@arrays.values_are_data
def bias_grad(dy: Array, db: Array, accumulate: bool) -> None:
    """Write ``dy.sum(0)`` into db, or add it where `accumulate`; dy is ``(pixels, d)``."""
    total = np.zeros(db.shape, np.float64)
    step = max(1, STRIP // dy.shape[1]) if narrow(dy.dtype) else len(dy)
    for start in range(0, len(dy), step):
        rows = dy[start : start + step]
        total += _column_sums(rows.astype(np.float32) if narrow(dy.dtype) else rows)
    db[...] = total + db if accumulate else total


@arrays.values_are_data
def store(sums: Array, db: Array, accumulate: bool) -> None:
    """Write the slices' sums, added up in float64, to db, or add them to it where `accumulate`."""
    total = sums.sum(0, dtype=np.float64)
    db[...] = total + db if accumulate else total


def parts(slices: int, db: Array | None, dtype: np.dtype[Any]) -> Array:
    """Return zeros in which each slice of a weight gradient's kernel sums its pixels of dy; empty without a db."""
    return np.zeros((slices, 0 if db is None else db.size), dtype)


@lru_cache(maxsize=1024)
def _geometry(pixels: int, d: int) -> Array:
    return COLUMN_SUMS.record({"pixels": pixels, "d": d, "block": BLOCK, "tasks": -(-pixels // BLOCK)})


def _column_sums(dy: Array) -> Array:
    """Return the sums of the columns, in float64."""
    pixels, d = dy.shape
    tasks = -(-pixels // BLOCK)
    parts = arrays.empty((tasks, d), dy.dtype)
    geometry = _geometry(pixels, d)
    workers = 1 if dy.size < SERIAL else machine.threads()
    column_sums().run(dy.reshape(-1), parts.reshape(-1), geometry=geometry, workers=workers)
    total: Array = parts.sum(0, dtype=np.float64)
    return total
