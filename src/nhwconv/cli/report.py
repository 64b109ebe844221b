"""Comparisons as one HTML page that needs nothing else: who wins and why, then plots, then a table that sorts.

Plotly draws; its library is part of the page. What a browser does beyond that is in ``page.html``, the frame.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ..problem import PASSES
from .info import facts
from .measure import Comparison, Row
from .table import machine_line, mebibytes, milliseconds, significant, thread_count
from .totals import Total, totals
from .verdict import headline, standings, verdicts

__all__ = ["page"]

#: Okabe and Ito's colours, which tell strategies apart on white and on black, and for the colour-blind.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8a8a00", "#999999")
#: Each pass has a marker of its own.
MARKERS = {"forward": "circle", "weight_grad": "square", "input_grad": "diamond"}
#: Lines that can be seen on white and on black.
GREY = "rgba(128, 128, 128, 0.35)"
#: Pixels of one bar, and of what a plot has beside its bars.
BAR, AROUND = 13, 120


def page(comparisons: Sequence[Comparison]) -> str:
    """Return the page of comparisons that have rows, all of one dtype and number of threads."""
    colours = _colours(comparisons)
    threads = thread_count(comparisons[0].limits.threads)
    plots = [("How near to what this machine could do", _ROOFLINE, _roofline(comparisons, colours))]
    if any(comparison.cold for comparison in comparisons):
        plots.append(("Hot and cold", _COLD, _hot_and_cold(comparisons, colours)))
    for pass_ in PASSES:
        of_pass = [comparison for comparison in comparisons if comparison.case.pass_ == pass_]
        if of_pass:
            plots.append((f"Speed: {pass_}", _SPEED, _speed(of_pass, colours)))
    if any(row.peak_bytes is not None for comparison in comparisons for row in comparison.rows()):
        plots.append(("Memory", _MEMORY, _memory(comparisons, colours)))
    frame = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return frame.substitute(
        title=f"nhwconv: {len(comparisons)} comparisons, {comparisons[0].problem.dtype}, {threads}",
        answer="\n".join(f"<p>{html.escape(sentence)}</p>" for sentence in headline(comparisons)),
        standings=_standings(comparisons, colours),
        totals="\n".join(_total(total) for total in totals(comparisons)),
        winners=_winners(comparisons, colours),
        summary=html.escape(f"Times: geometric means, the fastest strategy is 1. {machine_line(comparisons[0])}."),
        library=get_plotlyjs(),
        plots="\n".join(_section(i, *plot) for i, plot in enumerate(plots)),
        head="".join(f'<th><button type="button">{html.escape(name)}</button></th>' for name, _, _ in _CELLS),
        body="\n".join(_table_row(row) for comparison in comparisons for row in comparison.rows()),
        notes="\n".join(f"<li>{html.escape(note)}</li>" for note in _notes(comparisons)),
        facts="\n".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts()),
    )


_ROOFLINE = (
    "Each point is one pass of a layer. The line is the roofline: memory bandwidth where a pass does little arithmetic "
    "a byte, the peak of multiply-adds elsewhere. Winograd multiplies less than a direct convolution, and arrays that "
    "stay in a cache move faster than memory, so points above the line are possible."
)
_SPEED = (
    "Longer is faster. Operations are those of a direct convolution. A whisker reaches down to the 80th percentile."
)
_COLD = (
    "Each point is one strategy on one pass of a layer. On the line a call with other arrays each time, as inside a "
    "network, takes as long as one whose arrays the call before left in the caches; above it, memory costs time."
)
_MEMORY = "Extra memory of a call beside its arguments and its result, as measured. Shorter is better."


def _colours(comparisons: Sequence[Comparison]) -> dict[str, str]:
    names = dict.fromkeys(row.strategy for comparison in comparisons for row in comparison.rows())
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


# ----------------------------------------------------------------------------------------------- answer


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """Return a table of cells that are HTML; each tells its column, for screens where columns do not fit."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "\n".join(
        "<tr>" + "".join(f'<td data-name="{html.escape(n)}">{c}</td>' for n, c in zip(head, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>\n{body}\n</tbody></table>'


def _chip(name: str, colours: dict[str, str]) -> str:
    return f'<b><i class="chip" style="background: {colours[name]}"></i>{html.escape(name)}</b>'


def _bar(ratio: float | None, colour: str) -> str:
    """Return how many times as long as the fastest; the bar is longer where that is shorter."""
    if ratio is None:
        return "-"
    width = min(100.0, 100 / ratio)
    return f'<span class="bar"><i style="width: {width:.0f}%; background: {colour}"></i></span> {ratio:.2f}'


def _standings(comparisons: Sequence[Comparison], colours: dict[str, str]) -> str:
    found = standings(comparisons)
    cold = any(standing.cold is not None for standing in found)
    head = ["strategy", "fastest on", "time", *(["cold"] if cold else []), "how"]
    rows = []
    for s in found:
        ratios = [s.hot, s.cold] if cold else [s.hot]
        bars = [_bar(ratio, colours[s.name]) for ratio in ratios]
        rows.append([_chip(s.name, colours), f"{s.wins} of {s.of}", *bars, html.escape(s.how or "another library")])
    return _table(head, rows, "standings")


def _total(total: Total) -> str:
    head = ["ms", *total.passes, "sum"]
    rows = [
        [html.escape(name), *(significant(1e3 * s) for s in (*(sums.seconds[p] for p in total.passes), sums.all))]
        for name, sums in total.whole.items()
    ]
    return f'<div><h2>{html.escape(total.title)}</h2><div class="scroll">{_table(head, rows, "totals")}</div></div>'


def _winners(comparisons: Sequence[Comparison], colours: dict[str, str]) -> str:
    found = verdicts(comparisons)
    cold = any(verdict.cold_winner for verdict in found)
    head = ["layer", "pass", "fastest", "ms", "lead", *(["fastest cold"] if cold else []), "why"]
    rows = []
    for v in found:
        after = "-" if v.second is None else f"{v.lead:.2f}x over {html.escape(v.second.strategy)}"
        colder = [_chip(v.cold_winner, colours) if v.cold_winner else "-"] if cold else []
        row = [html.escape(v.winner.layer), v.winner.pass_, _chip(v.winner.strategy, colours)]
        rows.append([*row, significant(1e3 * v.winner.seconds), after, *colder, html.escape(v.why)])
    return _table(head, rows, "winners")


# ------------------------------------------------------------------------------------------------ plots


def _figure(height: int, x: str, y: str, **axes: Any) -> go.Figure:
    layout = go.Layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"},
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={"title": x, "gridcolor": GREY, "zerolinecolor": GREY, "automargin": True},
        yaxis={"title": y, "gridcolor": GREY, "zerolinecolor": GREY, "automargin": True},
    )
    return go.Figure(layout=layout).update_layout(**axes)


def _roofline(comparisons: Sequence[Comparison], colours: dict[str, str]) -> go.Figure:
    limits = comparisons[0].limits
    figure = _figure(460, "FLOP / byte", "GFLOP/s", xaxis_type="log", yaxis_type="log")
    figure.update_xaxes(dtick=1).update_yaxes(dtick=1)
    intensity = [comparison.problem.flops / comparison.problem.bytes for comparison in comparisons]
    xs = np.geomspace(min(intensity) / 2, max(*intensity, limits.peak / limits.bandwidth) * 2, 64)
    roof = np.minimum(limits.peak, limits.bandwidth * xs) / 1e9
    figure.add_scatter(x=xs.tolist(), y=roof.tolist(), name="roofline", mode="lines", line_color="#888888")
    for name, colour in colours.items():
        points = [
            (flops, row)
            for flops, comparison in zip(intensity, comparisons, strict=True)
            for row in comparison.rows()
            if row.strategy == name
        ]
        figure.add_scatter(
            x=[flops for flops, _ in points],
            y=[row.gflops for _, row in points],
            name=name,
            mode="markers",
            marker={"color": colour, "size": 9, "symbol": [MARKERS[row.pass_] for _, row in points]},
            text=[f"{row.layer} {row.pass_}" for _, row in points],
            hovertemplate="%{text}<br>%{y:.4g} GFLOP/s, %{x:.3g} FLOP/byte",
        )
    return figure


def _speed(comparisons: Sequence[Comparison], colours: dict[str, str]) -> go.Figure:
    """Draw a group of bars for each layer, with a whisker to where the slow calls are."""

    def bar(row: Row) -> tuple[float, float]:
        slow = row.gflops * row.seconds / (row.seconds + row.spread)
        return row.gflops, row.gflops - slow

    rows = [row for comparison in comparisons for row in comparison.rows()]
    return _bars(rows, [row.layer for row in rows], colours, bar, "GFLOP/s", "%{y}<br>%{x:.4g} GFLOP/s")


def _hot_and_cold(comparisons: Sequence[Comparison], colours: dict[str, str]) -> go.Figure:
    figure = _figure(380, "hot ms", "cold ms", xaxis_type="log", yaxis_type="log")
    figure.update_xaxes(dtick=1).update_yaxes(dtick=1)
    timed = [(row, 1e3 * row.seconds, 1e3 * row.cold) for c in comparisons for row in c.rows() if row.cold is not None]
    ends = [f(f(hot, cold) for _, hot, cold in timed) for f in (min, max)] if timed else []
    figure.add_scatter(x=ends, y=ends, name="as long", mode="lines", line_color="#888888")
    for name, colour in colours.items():
        own = [(row, hot, cold) for row, hot, cold in timed if row.strategy == name]
        figure.add_scatter(
            x=[hot for _, hot, _ in own],
            y=[cold for _, _, cold in own],
            name=name,
            mode="markers",
            marker={"color": colour, "size": 9, "symbol": [MARKERS[row.pass_] for row, _, _ in own]},
            text=[f"{row.layer} {row.pass_}" for row, _, _ in own],
            hovertemplate="%{text}<br>%{x:.4g} ms hot, %{y:.4g} ms cold",
        )
    return figure


def _memory(comparisons: Sequence[Comparison], colours: dict[str, str]) -> go.Figure:
    rows = [row for comparison in comparisons for row in comparison.rows() if row.peak_bytes is not None]

    def bar(row: Row) -> tuple[float, float]:
        return (row.peak_bytes or 0) / 2**20, 0.0

    labels = [f"{row.layer} {row.pass_}" for row in rows]
    return _bars(rows, labels, colours, bar, "MiB", "%{y}<br>%{x:.3g} MiB")


def _bars(
    rows: Sequence[Row], labels: Sequence[str], colours: dict[str, str], bar: Any, unit: str, hover: str
) -> go.Figure:
    groups = list(dict.fromkeys(labels))
    layers = {"autorange": "reversed", "automargin": True, "categoryorder": "array", "categoryarray": groups}
    names = [name for name in colours if any(row.strategy == name for row in rows)]
    figure = _figure(
        AROUND + BAR * len(groups) * (len(names) + 1), unit, "",
        barmode="group", bargap=0.25, yaxis={**layers, "type": "category", "tickfont_size": 11},
    )  # fmt: skip
    for name in names:
        own = [(label, *bar(row)) for label, row in zip(labels, rows, strict=True) if row.strategy == name]
        figure.add_bar(
            y=[label for label, _, _ in own],
            x=[value for _, value, _ in own],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [0] * len(own),
                "arrayminus": [slower for _, _, slower in own],
                "color": "#888888",
                "thickness": 1,
                "width": 2,
            },
            name=name,
            marker_color=colours[name],
            orientation="h",
            hovertemplate=hover,
        )
    return figure


def _section(index: int, title: str, text: str, figure: go.Figure) -> str:
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{index}",
        default_width="100%",
        config={"responsive": True, "displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"]},
    )
    return f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{drawn}</section>"


# ------------------------------------------------------------------------------------------------ table


#: A column's name, what sorts it, and what is shown.
_CELLS: tuple[tuple[str, Any, Any], ...] = (
    ("layer", lambda row: row.layer, str),
    ("pass", lambda row: row.pass_, str),
    ("strategy", lambda row: row.strategy, str),
    ("ms", lambda row: 1e3 * row.seconds, significant),
    ("median ms", lambda row: 1e3 * row.median, significant),
    ("spread ms", lambda row: 1e3 * row.spread, significant),
    ("cold ms", lambda row: None if row.cold is None else 1e3 * row.cold, lambda ms: milliseconds(ms and ms / 1e3)),
    ("GFLOP/s", lambda row: row.gflops, significant),
    ("of peak", lambda row: row.peak_fraction, "{:.0%}".format),
    ("of roofline", lambda row: row.roofline_fraction, "{:.0%}".format),
    ("l2 error", lambda row: row.error, "{:.1e}".format),
    ("workspace MiB", lambda row: row.workspace_bytes, mebibytes),
    ("extra MiB", lambda row: row.peak_bytes, mebibytes),
    ("first call s", lambda row: row.compile_seconds, "{:.2f}".format),
    ("plan", lambda row: "auto" if row.chosen else "", str),
)


def _table_row(row: Row) -> str:
    cells = []
    for _, value_of, shown in _CELLS:
        value = value_of(row)
        kind = "" if isinstance(value, str) else ' class="number"'
        key = "-1" if value is None else value
        cells.append(f'<td{kind} data-key="{html.escape(str(key))}">{html.escape(shown(value))}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What the plots do not show: refusals, and differences that mean nothing."""
    notes = []
    for comparison in comparisons:
        name = comparison.case.name
        notes += [f"{name}: {strategy} refused, because {why}" for strategy, why in comparison.refusals.items()]
        if undecided := comparison.undecided():
            notes.append(f"{name}: which is faster is open, within the spread, of {', '.join(undecided)}")
    return notes
