"""The command compare: what was asked for is checked, measured, printed and written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from ..names import known
from ..strategies import REGISTRY
from . import files, options
from .cases import Wanted, names
from .engines import PEERS, EngineProcess
from .measure import Comparison
from .options import stop
from .table import machine_line, table, total_table
from .threads import threads
from .totals import totals

__all__ = ["compare"]

StrategyNames = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help=f"Strategies: {', '.join(REGISTRY)}. All by default.",
        autocompletion=options.completion(REGISTRY),
    ),
]
PeerNames = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...",
        help=f"Other libraries, each in a process of its own: {', '.join(PEERS)}.",
        autocompletion=options.completion(PEERS),
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", help="How many threads, BLAS's too; Numba's number by default."),
]
Cold = Annotated[
    bool, typer.Option("--cold", help="Time calls as a network makes them, too: other arrays, and weights, each time.")
]
FirstCall = Annotated[
    bool, typer.Option("--first-call", help="Make each first call in a new process with nothing compiled: slow.")
]
Report = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write an HTML page with plots as well; it needs no network.")
]


def compare(
    workloads: options.Workloads = None,
    networks: options.Networks = None,
    layers: options.Layers = None,
    layers_from: options.LayersFrom = None,
    only: options.Only = "",
    passes: options.PassNames = None,
    strategies: StrategyNames = None,
    against: PeerNames = None,
    dtype: options.DType = "float32",
    number: Threads = None,
    seconds: Annotated[float, typer.Option(help="How long to time each strategy on each layer.")] = 0.3,
    cold: Cold = False,
    first_call: FirstCall = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows to a JSON file as well.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows to a CSV file as well.")] = None,
    report: Report = None,
) -> None:
    """Time strategies on layers of real networks, and check each against float64.

    "ms" is the 20th percentile of the calls' times, the spread what the 80th lies above it; rounds alternate. "cold" is
    the median of calls that find nothing in the caches. "peak" is the part of this machine's multiply-adds, as
    measured, and "roof" that of its roofline, with its memory bandwidth. "work" is the workspace by plan in MiB,
    "extra" what a call held in fact. "1st s" is how many seconds the first call took longer than the next: what was
    compiled, or loaded where it had been compiled before.

    Ctrl-C keeps what has been measured. Where no option names layers, they are LeNet-5's.
    """
    with ExitStack() as running:
        try:
            numpy_dtype = np.dtype(known("dtype", dtype, options.DTYPES))
            cases = Wanted(workloads, networks, layers, layers_from, only, passes).cases(dtype)
            chosen = names("strategy", REGISTRY if strategies is None else strategies.split(","), REGISTRY)
            peers = {name: EngineProcess(PEERS[name].build) for name in _peers(against)}
            options.check_seconds(seconds)
            try:
                running.enter_context(threads(number))
            except ValueError as error:
                raise ValueError(f"--threads is {number}: {error}") from None
            comparisons = [Comparison(case, chosen, numpy_dtype, peers, cold, first_call) for case in cases]
            outputs = files.outputs({"--json": json, "--csv": csv, "--report": report})
        except (ValueError, files.CannotWriteError) as error:
            stop(error)
        for peer in peers.values():
            running.enter_context(peer)
        finished, problem = _run(comparisons, seconds)
        _write(outputs, [comparison for comparison in comparisons if comparison.rows()])
    if problem:
        stop(problem)
    if not finished:
        stop("stopped: what is above was measured before", options.INTERRUPTED)


def _peers(against: str | None) -> tuple[str, ...]:
    chosen = names("peer", () if against is None else against.split(","), PEERS)
    for name in chosen:
        if not PEERS[name].installed():
            raise ValueError(f"--against {name}: {PEERS[name].module} is not installed: pip install nhwconv[{name}]")
    return chosen


def _run(comparisons: list[Comparison], seconds: float) -> tuple[bool, str]:
    """Measure and print one table after another; return False where Ctrl-C cut it short, and what went wrong."""
    console = Console(highlight=False)
    begun = comparisons[0]
    with options.progress(console) as progress:
        task = progress.add_task("", total=sum(comparison.step_count for comparison in comparisons))

        def tell(what: str) -> None:
            progress.update(task, advance=1, description=what)

        try:
            for begun in comparisons:
                _measure(begun, seconds, tell)
                console.print(table(begun))
        except KeyboardInterrupt:
            if begun.rows():
                console.print(table(begun))
            return False, ""
        except MemoryError:
            return False, f"layer {begun.case.layer.name} does not fit into memory"
    for total in totals(comparisons):
        console.print(total_table(total))
    console.print(machine_line(begun), style="dim")
    return True, ""


def _measure(comparison: Comparison, seconds: float, tell: Callable[[str], None]) -> None:
    for step in comparison.steps(seconds):
        tell(f"{comparison.case.name} {step}")


def _write(outputs: list[files.Output], measured: list[Comparison]) -> None:
    try:
        for output in outputs if measured else []:
            output.write(measured)
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}", 1)
