"""The commands: compare, tune, info, clear-cache.

What the user typed is checked before anything runs; what is wrong with it is one line on standard error and exit
code 2.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from .. import _version, choices
from ..runtime.store import cache_folder, clear_cache
from .compare import compare
from .info import cache_size, facts, limits
from .options import stop
from .tune import tune

__all__ = ["app"]

app = typer.Typer(
    help="Batched NHWC convolution and every one of its gradients: compare strategies, look at this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nhwconv {_version.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Batched NHWC convolution and every one of its gradients: compare strategies, look at this machine."""


app.command()(compare)
app.command()(tune)


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
        stop(f"{left} of {kernels} kernels could not be deleted from {cache_folder()}", 1)
    typer.echo(f"deleted {kernels} kernels ({megabytes:.1f} MB) from {cache_folder()}")
    if tuning:
        entries = choices.count()
        choices.clear()
        if choices.folder().exists():
            stop(f"tuning could not be deleted from {choices.folder()}", 1)
        typer.echo(f"deleted {entries} tuned choices from {choices.folder()}")
