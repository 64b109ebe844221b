"""Options that several commands have, and how a command stops where what was typed makes no sense."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..networks import NETWORKS
from ..problem import PASSES
from ..workloads import WORKLOADS

__all__ = [
    "BAD_INPUT", "DTYPES", "INTERRUPTED", "DType", "Layers", "LayersFrom", "Networks", "Only", "PassNames", "Workloads",
    "check_seconds", "completion", "progress", "stop",
]  # fmt: skip

#: What the arrays may be. (bfloat16 needs another package.)
DTYPES = ("float32", "float64", "float16")

#: Exit codes: what the user asked for makes no sense; the user pressed Ctrl-C (128 + SIGINT, as shells have it).
BAD_INPUT, INTERRUPTED = 2, 130


def completion(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Complete a name, or the last of several with commas between them."""
    names = tuple(names)

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in names if name.startswith(last)]

    return complete


Workloads = Annotated[
    list[str] | None,
    typer.Option(
        "--workload",
        metavar="NAME",
        help=f"A few telling layers of a network; repeatable: {', '.join(WORKLOADS)}.",
        autocompletion=completion(WORKLOADS),
    ),
]
Networks = Annotated[
    list[str] | None,
    typer.Option(
        "--network",
        metavar="NAME",
        help="All convolutions of a network, and their sum, each as often as it occurs; repeatable: "
        f"{', '.join(NETWORKS)}.",
        autocompletion=completion(NETWORKS),
    ),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="NOTATION",
        help="A layer by its numbers, such as n8h56w56c64d64k3s1p1; repeatable. n images, h rows, w columns, "
        "c channels, d output channels, k kernel; optional: s stride, p padding, l dilation, g groups. "
        "k3x5 is a pair, p0x1x0x1 top, bottom, left and right.",
    ),
]
LayersFrom = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The calls that a program logged with NHWCONV_VERBOSE=1 2>FILE, and their sum."),
]
Only = Annotated[str, typer.Option(metavar="SUBSTRING", help="Only the layers that have this in their names.")]
PassNames = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        metavar="PASS",
        help=f"A pass; repeatable: {', '.join(PASSES)}. All by default.",
        autocompletion=completion(PASSES),
    ),
]
DType = Annotated[str, typer.Option(metavar="DTYPE", help=f"{', '.join(DTYPES)}.", autocompletion=completion(DTYPES))]


def check_seconds(seconds: float) -> None:
    """Raise a ValueError where nothing can be timed for so long."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"--seconds is {seconds}, expected more than 0")


def stop(message: object, code: int = BAD_INPUT) -> NoReturn:
    """End the command with one line on standard error."""
    typer.echo(f"nhwconv: {message}", err=True)
    raise typer.Exit(code)


def progress(console: Console) -> Progress:
    """Return the line that moves while something is measured."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
