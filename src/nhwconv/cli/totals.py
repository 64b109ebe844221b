"""What a network's convolutions take altogether: each layer's time as often as the layer occurs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..problem import PASSES, Pass
from .measure import Comparison

__all__ = ["BEST", "CHOSEN", "Sums", "Total", "totals"]

#: Names beside the strategies': what "auto" chooses, and the fastest strategy of every single layer.
CHOSEN, BEST = "auto", "fastest"


@dataclass(frozen=True)
class Sums:
    """Seconds of one contender, pass by pass, and how many passes of layers it could not do."""

    seconds: dict[Pass, float]
    missing: int

    @property
    def all(self) -> float:
        """All passes together."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Total:
    """The sums of a network by contender, all of hot calls or all of cold ones."""

    network: str
    cold: bool
    passes: tuple[Pass, ...]
    sums: dict[str, Sums]

    @property
    def title(self) -> str:
        """What a table of it is called."""
        return f"{self.network} altogether{', cold' if self.cold else ''}"

    @property
    def whole(self) -> dict[str, Sums]:
        """The sums of those that can do every layer."""
        return {name: sums for name, sums in self.sums.items() if not sums.missing}

    @property
    def partial(self) -> dict[str, Sums]:
        """The sums of all others."""
        return {name: sums for name, sums in self.sums.items() if sums.missing}


def totals(comparisons: Sequence[Comparison]) -> list[Total]:
    """Return the sums of each network among what was compared, hot, and cold where that was timed."""
    networks = dict.fromkeys(c.case.network for c in comparisons if c.case.network)
    return [
        _total(network, [c for c in comparisons if c.case.network == network], cold)
        for network in networks
        for cold in ((False, True) if comparisons[0].cold else (False,))
    ]


def _total(network: str, comparisons: Sequence[Comparison], cold: bool) -> Total:
    passes = tuple(p for p in PASSES if any(c.case.pass_ == p for c in comparisons))
    contenders = dict.fromkeys(name for c in comparisons for name in (*c.times, *c.refusals))
    return Total(network, cold, passes, {n: _sums(comparisons, n, cold) for n in (CHOSEN, BEST, *contenders)})


def _sums(comparisons: Sequence[Comparison], name: str, cold: bool) -> Sums:
    sums: dict[Pass, float] = {}
    missing = 0
    for comparison in comparisons:
        seconds = _seconds(comparison, name, cold)
        if seconds is None:
            missing += 1
        else:
            pass_ = comparison.case.pass_
            sums[pass_] = sums.get(pass_, 0.0) + comparison.case.count * seconds
    return Sums(sums, missing)


def _seconds(comparison: Comparison, name: str, cold: bool) -> float | None:
    """Return what one call takes of a contender, or of what stands for it; None where it was not timed."""
    times = {row.strategy: row.cold if cold else row.seconds for row in comparison.rows()}
    if name == BEST:
        own = (seconds for strategy, seconds in times.items() if strategy in comparison.plans)
        return min((seconds for seconds in own if seconds is not None), default=None)
    return times.get(comparison.chosen if name == CHOSEN else name)
