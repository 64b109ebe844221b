"""What was measured, as a table for a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .measure import Comparison

__all__ = ["table"]


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
