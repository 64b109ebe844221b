"""What kernels know of a problem: integers in one record of named fields, which Numba unboxes like one array."""

from __future__ import annotations

import numpy as np

from .jit import device

__all__ = ["Fields", "inside"]


class Fields:
    """The named 64-bit integers that a kernel takes in one record."""

    def __init__(self, names: str) -> None:
        self.names = names.split()
        self.dtype = np.dtype([(name, np.int64) for name in self.names])

    def record(self, values: dict[str, int]) -> np.ndarray:
        """Return a record array of one element; every field must be given, and no other."""
        if values.keys() != set(self.names):
            raise TypeError(f"fields differ: {sorted(values.keys() ^ set(self.names))}")
        return np.array([tuple(values[name] for name in self.names)], self.dtype)


@device
def inside(first, size, step, count):
    """Return which places, from and up to, are inside: those whose ``first + i * step`` is in ``[0, size)``."""
    low = (step - 1 - first) // step if first < 0 else 0
    high = (size - 1 - first) // step + 1 if first < size else 0
    return low, max(low, min(count, high))
