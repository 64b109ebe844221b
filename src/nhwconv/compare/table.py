"""What was measured, as a table for a terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..tuning import Contest
from ..workloads import Layer
from .measure import Comparison

__all__ = ["Tuned", "table", "tuned_table"]


def table(comparison: Comparison) -> RenderableType:
    """Return a heading, a row for each strategy that was timed, and a line for each that refused.

    The fastest strategy is bold; "auto" marks the planner's choice.
    """
    heading = Text(f"{comparison.layer.name} {comparison.pass_}", style="bold")
    heading.append(f"  {comparison.problem}", style="dim")
    rows = comparison.rows()
    fastest = min((row.seconds for row in rows), default=0.0)
    body = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    body.add_column("strategy", min_width=10)
    for name, width in (("ms", 10), ("spread", 8), ("GFLOP/s", 8), ("l2 error", 8)):
        body.add_column(name, justify="right", min_width=width)
    body.add_column("plan", min_width=4)
    for row in rows:
        body.add_row(
            row.strategy,
            f"{row.seconds * 1e3:.3f}",
            f"{row.spread * 1e3:.3f}",
            f"{row.gflops:.1f}" if row.gflops >= 0.1 else f"{row.gflops:.4f}",
            f"{row.error:.1e}",
            "auto" if row.chosen else "",
            style="bold" if row.seconds == fastest and len(rows) > 1 else None,
        )
    refusals = (Text(f"{name}: {why}", style="dim") for name, why in comparison.refusals.items())
    return Group(heading, body, *refusals)


@dataclass(frozen=True)
class Tuned:
    """One pass of a layer whose candidates have been measured."""

    layer: Layer
    contest: Contest


def tuned_table(rows: list[Tuned]) -> RenderableType:
    """Return a row for each pass of a layer: the fastest, its time, the planner's choice, and how much slower that is.

    Winners that the planner would not have chosen are bold.
    """
    body = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", "pass", "winner"):
        body.add_column(name)
    body.add_column("ms", justify="right", min_width=8)
    body.add_column("predicted")
    body.add_column("gain", justify="right")
    for row in rows:
        winner, predicted, seconds = row.contest.winner, row.contest.predicted, row.contest.seconds
        body.add_row(
            row.layer.name,
            row.contest.pass_,
            winner,
            f"{seconds[winner] * 1e3:.3f}" if seconds else "-",
            predicted if seconds else "no other",
            f"{seconds[predicted] / seconds[winner]:.2f}x" if seconds else "-",
            style="bold" if winner != predicted else None,
        )
    return body
