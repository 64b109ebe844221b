"""Integers for kernels: a record of named fields, which Numba unboxes in the time of one array."""

from __future__ import annotations

import numpy as np

__all__ = ["Fields"]


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
