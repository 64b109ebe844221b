"""What was measured, as a table for a terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..tuning import Contest
from ..workloads import Layer
from .measure import Comparison, Row

__all__ = ["Tuned", "machine_line", "mebibytes", "significant", "table", "tuned_table"]


def table(comparison: Comparison) -> RenderableType:
    """Return a heading, a row for each contender that was timed, and a line for each that refused.

    The fastest strategy is bold; "auto" marks the planner's choice. Where the spread is larger than a difference to the
    fastest, a line says so.
    """
    heading = Text(f"{comparison.layer.name} {comparison.pass_}", style="bold")
    heading.append(f"  {comparison.problem}", style="dim")
    rows = comparison.rows()
    fastest = min((row.seconds for row in rows), default=0.0)
    body = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    body.add_column("strategy", min_width=9)
    for name in COLUMNS:
        body.add_column(name, justify="right", no_wrap=True)
    body.add_column("plan", min_width=4)
    for row in rows:
        style = "bold" if row.seconds == fastest and len(rows) > 1 else None
        body.add_row(row.strategy, *_cells(row), "auto" if row.chosen else "", style=style)
    notes = [Text(f"{name}: {why}", style="dim") for name, why in comparison.refusals.items()]
    if undecided := comparison.undecided():
        notes.append(Text(f"which is faster is open, within the spread: {', '.join(undecided)}", style="yellow"))
    return Group(heading, body, *notes)


#: What `_cells` are, in an order and in widths that fit a terminal of 80 columns.
COLUMNS = ("ms", "median", "spread", "GFLOP/s", "peak", "roof", "l2 err", "work", "extra", "1st s")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        *(significant(1e3 * seconds) for seconds in (row.seconds, row.median, row.spread)),
        significant(row.gflops),
        f"{row.peak_fraction:.0%}",
        f"{row.roofline_fraction:.0%}",
        f"{row.error:.1e}",
        *map(mebibytes, (row.workspace_bytes, row.peak_bytes)),
        f"{row.compile_seconds:.1f}",
    )


def significant(value: float) -> str:
    """Return a number with four digits that matter, at most four of them after the point."""
    after = 4 if value <= 0 else min(max(3 - math.floor(math.log10(value)), 0), 4)
    return f"{value:.{after}f}"


def mebibytes(size: int | None) -> str:
    """Return a number of bytes in MiB, a dash where it is not known."""
    return "-" if size is None else f"{size / 2**20:.1f}"


def machine_line(comparison: Comparison) -> str:
    """Return the limits that percentages refer to."""
    limits = comparison.limits
    return (
        f"100% is {limits.peak / 1e9:.0f} GFLOP/s of {comparison.problem.compute_dtype} and "
        f"{limits.bandwidth / 1e9:.0f} GB/s, measured with {limits.threads} threads"
    )


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
