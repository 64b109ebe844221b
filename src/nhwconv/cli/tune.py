"""The command tune: the fastest strategy of each layer is measured, told and remembered."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from .. import choices
from ..checks import words_of
from ..names import known
from ..planning import make_plan
from ..tuning import Contest
from . import options
from .cases import Wanted
from .options import stop
from .table import Tuned, tuned_table

__all__ = ["tune"]


def tune(
    workloads: options.Workloads = None,
    networks: options.Networks = None,
    layers: options.Layers = None,
    layers_from: options.LayersFrom = None,
    only: options.Only = "",
    passes: options.PassNames = None,
    dtype: options.DType = "float32",
    seconds: Annotated[float, typer.Option(help="How long to time each candidate on each layer.")] = 0.2,
) -> None:
    """Measure which strategy is the fastest for layers, and remember it: "auto" takes it from now on.

    The gain is what the planner's own choice takes longer than the fastest.

    Ctrl-C keeps what has been measured. Where no option names layers, they are LeNet-5's.
    """
    try:
        numpy_dtype = np.dtype(known("dtype", dtype, options.DTYPES))
        cases = Wanted(workloads, networks, layers, layers_from, only, passes).cases(dtype)
        options.check_seconds(seconds)
        with words_of("tune"):
            on_disk = choices.mode()
        if on_disk == "write":
            choices.check_folder()
        with words_of("tune"):
            plans = [make_plan(case.layer.problem(numpy_dtype), case.pass_, "auto") for case in cases]
    except ValueError as error:
        stop(error)
    except OSError as error:
        stop(f"tuning cannot be kept in {choices.folder()}: {error.strerror or error}")
    console = Console(highlight=False)
    runs = [Tuned(case.layer, Contest(plan)) for case, plan in zip(cases, plans, strict=True)]
    rows, finished = _tune(runs, seconds, console)
    if rows:
        console.print(tuned_table(rows))
    kept = f"kept in {choices.folder()}" if on_disk == "write" else f"not kept, because {choices.VARIABLE} is {on_disk}"
    if not finished:
        stop(f"stopped: what is above was measured before, and {kept}", options.INTERRUPTED)
    typer.echo(kept)


def _tune(runs: list[Tuned], seconds: float, console: Console) -> tuple[list[Tuned], bool]:
    """Measure and keep one winner after another; return what was measured, and False where Ctrl-C cut it short."""
    rows: list[Tuned] = []
    begun, done = runs[0], 0
    with options.progress(console) as progress:
        task = progress.add_task("", total=sum(run.contest.step_count for run in runs))
        try:
            for begun in runs:
                for step in begun.contest.steps(seconds):
                    progress.update(task, advance=1, description=f"{begun.layer.name} {begun.contest.pass_} {step}")
                begun.contest.keep()
                rows.append(begun)
                done += begun.contest.step_count
                progress.update(task, completed=done)  # early losers took fewer steps
        except KeyboardInterrupt:
            return rows, False
        except MemoryError:
            if rows:
                console.print(tuned_table(rows))
            stop(f"layer {begun.layer.name} does not fit into memory")
    return rows, True
