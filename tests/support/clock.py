"""A clock that goes when it is told to, so that tests of timing depend on no machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nhwconv import timing

__all__ = ["Clock"]


class Clock:
    """Stands in for `perf_counter` once `run`; `pass_` lets time pass."""

    def __init__(self, set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
        self.now = 0.0
        set_attribute(timing, "perf_counter", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        """Let so much time pass."""
        self.now += seconds
