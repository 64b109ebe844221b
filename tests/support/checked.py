"""One pass of one strategy, compared with the oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cases import Case, data_of, exact_of, run
from tolerance import assert_close

LINE = 64


def at_a_line(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array full of NaN that starts at a cache line, so that streaming stores may write to it."""
    size = math.prod(shape)
    memory = np.full(size + LINE, np.nan, dtype)
    start = -memory.ctypes.data % LINE // memory.itemsize
    return memory[start : start + size].reshape(shape)


def overwritten(case: Case, dtype: Any, pass_: str, strategy: str) -> np.ndarray:
    """Return a result that equals the oracle's; nothing is left of the NaN that `out` was full of."""
    out = at_a_line(case.shape(pass_), dtype)
    assert run(case, data_of(case, dtype), pass_, strategy, out=out) is out
    assert_close(out, *exact_of(case, dtype, pass_), case.length(pass_), strategy, case)
    return out
