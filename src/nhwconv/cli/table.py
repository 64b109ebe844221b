"""What was measured, as a table for a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..tuning import Contest
from ..workloads import Layer
from .measure import Comparison, Row
from .threads import blas_follows
from .totals import Total

__all__ = [
    "Tuned",
    "machine_line",
    "mebibytes",
    "milliseconds",
    "significant",
    "table",
    "thread_count",
    "total_table",
    "tuned_table",
]


def table(comparison: Comparison) -> RenderableType:
    """Return a heading, a row for each contender that was timed, and a line for each that refused.

    The fastest strategy is bold; "auto" marks the planner's choice. Where the spread is larger than a difference to the
    fastest, a line says so.
    """
    heading = Text(comparison.case.name, style="bold")
    heading.append(f"  {comparison.problem}", style="dim")
    rows = comparison.rows()
    fastest = min((row.seconds for row in rows), default=0.0)
    body = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    body.add_column("strategy", min_width=9)
    absent = "median" if comparison.cold else "cold"
    columns = [column for column in COLUMNS if column.name != absent]
    for column in columns:
        body.add_column(column.name, justify="right", no_wrap=True)
    body.add_column("plan", min_width=4)
    for row in rows:
        style = "bold" if row.seconds == fastest and len(rows) > 1 else None
        body.add_row(
            row.strategy, *(column.shown(row) for column in columns), "auto" if row.chosen else "", style=style
        )
    notes = [Text(f"{name}: {why}", style="dim") for name, why in comparison.refusals.items()]
    if undecided := comparison.undecided():
        notes.append(Text(f"which is faster is open, within the spread: {', '.join(undecided)}", style="yellow"))
    return Group(heading, body, *notes)


class _Column(NamedTuple):
    name: str
    shown: Callable[[Row], str]


#: In an order and in widths that fit a terminal of 80 columns, with one of "median" and "cold".
COLUMNS = (
    _Column("ms", lambda row: significant(1e3 * row.seconds)),
    _Column("median", lambda row: significant(1e3 * row.median)),
    _Column("spread", lambda row: significant(1e3 * row.spread)),
    _Column("cold", lambda row: milliseconds(row.cold)),
    _Column("GFLOP/s", lambda row: significant(row.gflops)),
    _Column("peak", lambda row: f"{row.peak_fraction:.0%}"),
    _Column("roof", lambda row: f"{row.roofline_fraction:.0%}"),
    _Column("l2 err", lambda row: f"{row.error:.1e}"),
    _Column("work", lambda row: mebibytes(row.workspace_bytes)),
    _Column("extra", lambda row: mebibytes(row.peak_bytes)),
    _Column("1st s", lambda row: f"{row.compile_seconds:.1f}"),
)


def significant(value: float) -> str:
    """Return a number with four digits that matter, at most four of them after the point."""
    after = 4 if value <= 0 else min(max(3 - math.floor(math.log10(value)), 0), 4)
    return f"{value:.{after}f}"


def mebibytes(size: int | None) -> str:
    """Return a number of bytes in MiB, a dash where it is not known."""
    return "-" if size is None else f"{size / 2**20:.1f}"


def milliseconds(seconds: float | None) -> str:
    """Return seconds as milliseconds, a dash where there are none."""
    return "-" if seconds is None else significant(1e3 * seconds)


def thread_count(number: int) -> str:
    """Return a number of threads in words."""
    return f"{number} thread{'s' if number > 1 else ''}"


def machine_line(comparison: Comparison) -> str:
    """Return the limits that percentages refer to."""
    limits = comparison.limits
    return (
        f"100% is {limits.peak / 1e9:.0f} GFLOP/s of {comparison.problem.compute_dtype} and "
        f"{limits.bandwidth / 1e9:.0f} GB/s, measured with {thread_count(limits.threads)}"
        f"{'' if blas_follows() else '; BLAS takes as many threads as it likes'}"
    )


def total_table(total: Total) -> RenderableType:
    """Return a row for each contender that can do the whole network, and a line of those that cannot.

    The fastest is bold.
    """
    body = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    body.add_column("ms", min_width=9)
    for name in (*total.passes, "sum"):
        body.add_column(name, justify="right", min_width=8)
    least = min((sums.all for sums in total.whole.values()), default=0.0)
    for name, sums in total.whole.items():
        numbers = [*(sums.seconds[pass_] for pass_ in total.passes), sums.all]
        style = "bold" if sums.all == least else None
        body.add_row(name, *(significant(1e3 * seconds) for seconds in numbers), style=style)
    others = ", ".join(f"{name} ({sums.missing})" for name, sums in total.partial.items())
    notes = [Text(f"not for all layers' passes, those missing in brackets: {others}", style="dim")] if others else []
    return Group(Text(total.title, style="bold"), body, *notes)


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
