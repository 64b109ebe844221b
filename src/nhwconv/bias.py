"""The bias gradient: a sum of dy over samples and pixels, the same for every strategy."""

from __future__ import annotations

import numpy as np

from .strategies.base import Array

__all__ = ["bias_grad"]


def bias_grad(dy: Array, db: Array, accumulate: bool) -> None:
    """Write ``dy.sum(0)`` into db, or add it where `accumulate`; dy is ``(pixels, d)``."""
    total = dy.sum(0, dtype=np.float64)
    db[...] = total + db if accumulate else total
