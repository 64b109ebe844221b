"""What comparisons say, in words and few numbers: which contender wins, by how much, and why.

Reasons are what was measured: the part of the machine's peak or of its memory bandwidth, memory of a call's own, the
spread. They do not guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..strategies import REGISTRY
from .measure import Comparison, Row
from .table import mebibytes

__all__ = ["Standing", "Verdict", "headline", "standings", "verdicts"]

#: A call that reaches less than this part of its roofline in less than so many seconds spends them on itself.
IDLE, SHORT = 0.25, 5e-5
#: No direct convolution is faster than the peak, but the clock may be higher than when that was measured.
FEWER = 1.2
#: Memory of a call's own is worth a word from so many bytes on.
LARGE = 2**20


@dataclass(frozen=True)
class Verdict:
    """One comparison's: the fastest contender of hot calls, and the next."""

    comparison: Comparison
    winner: Row
    second: Row | None

    @property
    def lead(self) -> float | None:
        """How many times as long the second takes."""
        return None if self.second is None else self.second.seconds / self.winner.seconds

    @property
    def cold_winner(self) -> str | None:
        """The fastest of cold calls, where there were any."""
        cold = {row.strategy: row.cold for row in self.comparison.rows() if row.cold is not None}
        return min(cold, key=lambda name: cold[name]) if cold else None

    @property
    def auto_loss(self) -> float | None:
        """How many times as long the planner's choice takes as the fastest of all strategies."""
        return _ratio(self.comparison, self.comparison.chosen, cold=False)

    @property
    def why(self) -> str:
        """Why the winner wins, as far as it was measured."""
        reasons = [_pace(self.comparison, self.winner)]
        if self.second is None:
            reasons.append("nothing else could be compared")
        elif self.comparison.undecided():
            reasons.append(f"open which is faster: the spread is larger than the lead over {self.second.strategy}")
        else:
            reasons.append(f"{self.second.strategy} {_handicap(self.comparison, self.winner, self.second)}")
        return "; ".join(reasons)


def _pace(comparison: Comparison, row: Row) -> str:
    """What limits a pass, and how near to it a contender comes."""
    problem, limits = comparison.problem, comparison.limits
    if row.peak_fraction > FEWER:
        return f"fewer multiplications: as fast as {row.peak_fraction:.1f} times the peak of a direct convolution"
    if row.roofline_fraction < IDLE and row.seconds < SHORT:
        return "the call itself takes longer than its arithmetic"
    if problem.flops / limits.peak >= problem.bytes / limits.bandwidth:
        return f"{row.peak_fraction:.0%} of the peak of multiply-adds, which limit this pass"
    if row.roofline_fraction > 1:
        return "memory would limit this pass, but its arrays stay in a cache"
    return f"{row.roofline_fraction:.0%} of the bandwidth of memory, which limits this pass"


def _handicap(comparison: Comparison, winner: Row, second: Row) -> str:
    """What holds back the second."""
    own, others = winner.peak_bytes, second.peak_bytes
    if own is not None and others is not None and others > 2 * own + LARGE:
        return f"moves {mebibytes(others)} MiB of its own, {winner.strategy} {mebibytes(own)}"
    if winner.peak_fraction > FEWER >= second.peak_fraction:
        return f"multiplies directly, at {second.peak_fraction:.0%} of the peak"
    return f"reaches {second.roofline_fraction:.0%} of the roofline, {winner.strategy} {winner.roofline_fraction:.0%}"


def verdicts(comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Return a verdict for each comparison that has rows."""
    found = []
    for comparison in comparisons:
        rows = sorted(comparison.rows(), key=lambda row: row.seconds)
        if rows:
            found.append(Verdict(comparison, rows[0], rows[1] if len(rows) > 1 else None))
    return found


@dataclass(frozen=True)
class Standing:
    """How one contender does over all comparisons.

    Attributes
    ----------
    name, how : str
        The strategy or peer, and what it does; a peer's is empty.
    wins, of : int
        On how many it is the fastest, and how many it can do.
    hot, cold : float or None
        How many times as long as the fastest strategy it takes, geometric mean; less than 1 where a peer is faster.
    """

    name: str
    how: str
    wins: int
    of: int
    hot: float
    cold: float | None


def standings(comparisons: Sequence[Comparison]) -> list[Standing]:
    """Return each contender's standing, that with the most wins first."""
    winners = [verdict.winner.strategy for verdict in verdicts(comparisons)]
    found = []
    for name in dict.fromkeys(row.strategy for comparison in comparisons for row in comparison.rows()):
        hot, cold = (_ratios(comparisons, name, cold) for cold in (False, True))
        how = REGISTRY[name].summary if name in REGISTRY else ""
        found.append(Standing(name, how, winners.count(name), len(hot), _mean(hot), _mean(cold) if cold else None))
    return sorted(found, key=lambda standing: (-standing.wins, standing.hot))


def _ratios(comparisons: Sequence[Comparison], name: str, cold: bool) -> list[float]:
    return [ratio for c in comparisons if (ratio := _ratio(c, name, cold)) is not None]


def _ratio(comparison: Comparison, name: str, cold: bool) -> float | None:
    """Return how many times as long as the fastest strategy a contender takes."""
    times = {row.strategy: row.cold if cold else row.seconds for row in comparison.rows()}
    own = [seconds for strategy, seconds in times.items() if strategy in comparison.plans and seconds is not None]
    seconds = times.get(name)
    return seconds / min(own) if seconds is not None and own else None


def _mean(ratios: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(ratios))))


def headline(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the answer in sentences: who wins, whether the planner knew, and how other libraries do."""
    found = verdicts(comparisons)
    first, *others = [standing for standing in standings(comparisons) if standing.wins]
    leads = [v.lead for v in found if v.winner.strategy == first.name and v.lead is not None]
    sentence = f"{first.name} is the fastest on {first.wins} of {_passes(len(found))}"
    sentence += f", {_span(leads)} as fast as the next" if leads else ""
    sentences = [sentence + "".join(f"; {other.name} on {other.wins}" for other in others) + "."]
    losses = [loss for verdict in found if (loss := verdict.auto_loss) is not None]
    if losses:
        right = sum(loss == 1 for loss in losses)
        worst = f"; elsewhere its choice takes up to {max(losses):.2f} times as long" if right < len(losses) else ""
        sentences.append(f"The planner chose the fastest strategy on {right} of {_passes(len(losses))}{worst}.")
    for peer in dict.fromkeys(name for comparison in comparisons for name in comparison.peers):
        ratios = [t / o for c in comparisons if (t := _ratio(c, peer, False)) and (o := _ratio(c, c.chosen, False))]
        if ratios:
            slower = sum(ratio < 1 for ratio in ratios)
            sentences.append(
                f"The planner's choice is {_mean(ratios):.2f} times as fast as {peer}, geometric mean, "
                f"and slower on {slower} of {_passes(len(ratios))}."
            )
    return sentences


def _span(ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.2g}", f"{max(ratios):.2g}"
    return f"{low} times" if low == high else f"{low} to {high} times"


def _passes(number: int) -> str:
    return f"{number} pass{'es' if number > 1 else ''}"
