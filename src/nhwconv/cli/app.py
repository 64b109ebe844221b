"""The commands: compare, tune, info, clear-cache.

What the user typed is checked before anything runs; what is wrong with it is one line on standard error and exit
code 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NoReturn

import numba
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import _version, choices
from ..kernels.jit import cache_folder, clear_cache
from ..names import known
from ..planning import make_plan
from ..problem import PASSES, Pass
from ..strategies import REGISTRY
from ..tuning import Contest
from ..workloads import WORKLOADS, Layer, parse_layer, workload
from . import files
from .engines import PEERS, EngineProcess
from .info import cache_size, facts, limits
from .measure import Comparison
from .table import Tuned, machine_line, table, tuned_table

__all__ = ["app"]

#: What the arrays may be. (bfloat16 needs another package.)
DTYPES = ("float32", "float64", "float16")

#: Exit codes: what the user asked for makes no sense; the user pressed Ctrl-C (128 + SIGINT, as shells have it).
BAD_INPUT, INTERRUPTED = 2, 130


def _completion(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Complete a name, or the last of several with commas between them."""
    names = tuple(names)

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in names if name.startswith(last)]

    return complete


# Options that several commands have.
_Workloads = Annotated[
    list[str] | None,
    typer.Option(
        "--workload",
        metavar="NAME",
        help=f"A network's layers; repeatable: {', '.join(WORKLOADS)}.",
        autocompletion=_completion(WORKLOADS),
    ),
]
_Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="NOTATION",
        help="A layer by its numbers, such as n8h56w56c64d64k3s1p1; repeatable. n images, h rows, w columns, "
        "c channels, d output channels, k kernel; optional: s stride, p padding, l dilation, g groups. "
        "k3x5 is a pair.",
    ),
]
_Only = Annotated[str, typer.Option(metavar="SUBSTRING", help="Only the layers that have this in their names.")]
_PassNames = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        metavar="PASS",
        help=f"A pass; repeatable: {', '.join(PASSES)}. All by default.",
        autocompletion=_completion(PASSES),
    ),
]
_DType = Annotated[str, typer.Option(metavar="DTYPE", help=f"{', '.join(DTYPES)}.", autocompletion=_completion(DTYPES))]
_Threads = Annotated[int | None, typer.Option(metavar="N", help="How many threads; Numba's number by default.")]

app = typer.Typer(
    help="Batched NHWC convolution and every one of its gradients: compare strategies, look at this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _stop(message: object, code: int = BAD_INPUT) -> NoReturn:
    typer.echo(f"nhwconv: {message}", err=True)
    raise typer.Exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nhwconv {_version.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Batched NHWC convolution and every one of its gradients: compare strategies, look at this machine."""


@app.command()
def compare(
    workloads: _Workloads = None,
    layers: _Layers = None,
    only: _Only = "",
    passes: _PassNames = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help=f"Strategies: {', '.join(REGISTRY)}. All by default.",
            autocompletion=_completion(REGISTRY),
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help=f"Other libraries, each in a process of its own: {', '.join(PEERS)}.",
            autocompletion=_completion(PEERS),
        ),
    ] = None,
    dtype: _DType = "float32",
    threads: _Threads = None,
    seconds: Annotated[float, typer.Option(help="How long to time each strategy on each layer.")] = 0.3,
    cold: Annotated[
        bool, typer.Option("--cold", help="Make each first call in a new process with nothing compiled: slow.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows to a JSON file as well.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows to a CSV file as well.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML page with plots as well; it needs no network.")
    ] = None,
) -> None:
    """Time strategies on layers of real networks, and check each against float64.

    "ms" is the 20th percentile of the calls' times, the spread what the 80th lies above it; rounds alternate. "peak" is
    the part of this machine's multiply-adds, as measured, and "roof" that of its roofline, with its memory bandwidth.
    "work" is the workspace by plan in MiB, "extra" what a call held in fact. "1st s" is how many seconds the first call
    took longer than the next: what was compiled, or loaded where it had been compiled before.

    Ctrl-C keeps what has been measured. Without --workload and --layer, the layers are LeNet-5's.
    """
    try:
        chosen_layers = _layers(workloads or [], layers or [], only)
        chosen_passes = _passes(passes)
        names = _names("strategy", REGISTRY if strategies is None else strategies.split(","), REGISTRY)
        peers = {name: EngineProcess(PEERS[name].build) for name in _peers(against)}
        numpy_dtype = np.dtype(known("dtype", dtype, DTYPES))
        _check_seconds(seconds)
        _set_threads(threads)
        comparisons = [
            Comparison(layer, p, names, numpy_dtype, peers, cold) for layer in chosen_layers for p in chosen_passes
        ]
        outputs = files.outputs({"--json": json, "--csv": csv, "--report": report})
    except (ValueError, files.CannotWriteError) as error:
        _stop(error)
    with ExitStack() as running:
        for peer in peers.values():
            running.enter_context(peer)
        finished, problem = _run(comparisons, seconds)
    measured = [comparison for comparison in comparisons if comparison.rows()]
    if measured:
        try:
            for output in outputs:
                output.write(measured)
        except OSError as error:
            _stop(f"{error.filename}: {error.strerror}", 1)
    if problem:
        _stop(problem)
    if not finished:
        _stop("stopped: what is above was measured before", INTERRUPTED)


def _peers(against: str | None) -> tuple[str, ...]:
    names = _names("peer", () if against is None else against.split(","), PEERS)
    for name in names:
        if not PEERS[name].installed():
            raise ValueError(f"--against {name}: {PEERS[name].module} is not installed: pip install nhwconv[{name}]")
    return names


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    try:
        numba.set_num_threads(threads)
    except ValueError as error:
        raise ValueError(f"--threads is {threads}: {error}") from None


def _layers(workloads: list[str], notations: list[str], only: str) -> list[Layer]:
    if not workloads and not notations:
        workloads = ["lenet5"]
    found = [layer for name in workloads for layer in workload(name)] + [parse_layer(text) for text in notations]
    kept = [layer for layer in dict.fromkeys(found) if only in layer.name]
    if not kept:
        raise ValueError(
            f'no layer has "{only}" in its name, expected one of {", ".join(layer.name for layer in found)}'
        )
    return kept


def _passes(names: list[str] | None) -> list[Pass]:
    wanted = _names("pass", names or PASSES, PASSES)
    return [p for p in PASSES if p in wanted]


def _check_seconds(seconds: float) -> None:
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"--seconds is {seconds}, expected more than 0")


def _names(kind: str, names: Iterable[str], among: Iterable[str]) -> tuple[str, ...]:
    """Return the names, each once, if they are known."""
    among = tuple(among)
    return tuple(dict.fromkeys(known(kind, name.strip(), among) for name in names))


def _progress(console: Console) -> Progress:
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


def _run(comparisons: list[Comparison], seconds: float) -> tuple[bool, str]:
    """Measure and print one table after another; return False where Ctrl-C cut it short, and what went wrong."""
    console = Console(highlight=False)
    begun: Comparison | None = None
    with _progress(console) as progress:
        task = progress.add_task("", total=sum(comparison.step_count for comparison in comparisons))
        try:
            for comparison in comparisons:
                begun = comparison
                for step in comparison.steps(seconds):
                    what = f"{comparison.layer.name} {comparison.pass_} {step}"
                    progress.update(task, advance=1, description=what)
                console.print(table(comparison))
        except KeyboardInterrupt:
            if begun is not None and begun.rows():
                console.print(table(begun))
            return False, ""
        except MemoryError:
            assert begun is not None
            return False, f"layer {begun.layer.name} does not fit into memory"
    if begun is not None:
        console.print(machine_line(begun), style="dim")
    return True, ""


@app.command()
def tune(
    workloads: _Workloads = None,
    layers: _Layers = None,
    only: _Only = "",
    passes: _PassNames = None,
    dtype: _DType = "float32",
    seconds: Annotated[float, typer.Option(help="How long to time each candidate on each layer.")] = 0.2,
) -> None:
    """Measure which strategy is the fastest for layers, and remember it: "auto" takes it from now on.

    The gain is what the planner's own choice takes longer than the fastest.

    Ctrl-C keeps what has been measured. Without --workload and --layer, the layers are LeNet-5's.
    """
    try:
        chosen_layers = _layers(workloads or [], layers or [], only)
        chosen_passes = _passes(passes)
        numpy_dtype = np.dtype(known("dtype", dtype, DTYPES))
        _check_seconds(seconds)
        on_disk = choices.mode("tune")
        if on_disk == "write":
            choices.check_folder()
        plans = [
            (layer, make_plan("tune", layer.problem(numpy_dtype), p, "auto"))
            for layer in chosen_layers
            for p in chosen_passes
        ]
    except ValueError as error:
        _stop(error)
    except OSError as error:
        _stop(f"tuning cannot be kept in {choices.folder()}: {error.strerror or error}")
    console = Console(highlight=False)
    rows, finished = _tune([(layer, Contest(plan)) for layer, plan in plans], seconds, console)
    if rows:
        console.print(tuned_table(rows))
    kept = f"kept in {choices.folder()}" if on_disk == "write" else f"not kept, because {choices.VARIABLE} is {on_disk}"
    if not finished:
        _stop(f"stopped: what is above was measured before, and {kept}", INTERRUPTED)
    typer.echo(kept)


def _tune(contests: list[tuple[Layer, Contest]], seconds: float, console: Console) -> tuple[list[Tuned], bool]:
    """Measure and keep one winner after another; return what was measured, and False where Ctrl-C cut it short."""
    rows: list[Tuned] = []
    done, total = 0, sum(contest.step_count for _, contest in contests)
    with _progress(console) as progress:
        task = progress.add_task("", total=total)
        try:
            for layer, contest in contests:
                for step in contest.steps(seconds):
                    progress.update(task, advance=1, description=f"{layer.name} {contest.pass_} {step}")
                contest.keep()
                rows.append(Tuned(layer, contest))
                done += contest.step_count
                progress.update(task, completed=done)  # early losers took fewer steps
        except KeyboardInterrupt:
            return rows, False
        except MemoryError:
            if rows:
                console.print(tuned_table(rows))
            _stop(f"layer {layer.name} does not fit into memory")
    return rows, True


@app.command()
def info() -> None:
    """Print what nhwconv finds here: CPU, threads, versions, folders; and measure what this machine could do."""
    for name, value in facts():
        typer.echo(f"{name:<14}{value}")
    with Console(stderr=True).status("measuring"):
        for name, value in limits():
            typer.echo(f"{name:<14}{value}")


@app.command("clear-cache")
def clear(
    tuning: Annotated[bool, typer.Option("--tuning", help="Delete what was tuned, too.")] = False,
) -> None:
    """Delete the compiled kernels; the next call of each compiles it anew."""
    kernels, megabytes = cache_size()
    clear_cache()
    left, _ = cache_size()
    if left:
        _stop(f"{left} of {kernels} kernels could not be deleted from {cache_folder()}", 1)
    typer.echo(f"deleted {kernels} kernels ({megabytes:.1f} MB) from {cache_folder()}")
    if tuning:
        entries = choices.count()
        choices.clear()
        if choices.folder().exists():
            _stop(f"tuning could not be deleted from {choices.folder()}", 1)
        typer.echo(f"deleted {entries} tuned choices from {choices.folder()}")
