"""Numba's threading layers, for tests that run under each of them; those that are not installed are skipped."""

from __future__ import annotations

import pytest

LAYERS = ["workqueue", "omp", "tbb"]
each_layer = pytest.mark.parametrize("layer", LAYERS)
