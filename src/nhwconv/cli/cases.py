"""What the user asked to run: layers of networks, layers by their numbers, or the calls of a log; pass by pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from .. import verbose
from ..names import known
from ..networks import network
from ..problem import PASSES, Pass
from ..workloads import Layer, parse_layer, workload

__all__ = ["Case", "Wanted", "names"]


@dataclass(frozen=True)
class Case:
    """One pass of a layer.

    Attributes
    ----------
    layer : Layer
    pass_ : {"forward", "weight_grad", "input_grad"}
    count : int
        How often it occurs in `network`.
    network : str
        The network, or the log, that it belongs to and is summed up with; empty where there is nothing to sum.
    """

    layer: Layer
    pass_: Pass
    count: int = 1
    network: str = ""

    @property
    def name(self) -> str:
        """What a line calls it."""
        return f"{self.layer.name} {self.pass_}"


@dataclass(frozen=True)
class Wanted:
    """What the options of a command name; LeNet-5's layers where none names any."""

    workloads: list[str] | None = None
    networks: list[str] | None = None
    layers: list[str] | None = None
    log: Path | None = None
    only: str = ""
    passes: list[str] | None = None

    def cases(self, dtype: str) -> list[Case]:
        """Return the cases, in the order of the options; a log's are those of a dtype.

        Raises
        ------
        ValueError
            Where a name is unknown, a notation is none, a log cannot be read, or nothing is left.
        """
        passes = [p for p in PASSES if p in names("pass", self.passes or PASSES, PASSES)]
        found = [case for case in self._found(dtype) if case.pass_ in passes]
        kept = [self._labelled(case) for case in dict.fromkeys(found) if self.only in case.layer.name]
        if not kept:
            layers = dict.fromkeys(case.layer.name for case in found)
            raise ValueError(f'no layer has "{self.only}" in its name, expected one of {", ".join(layers)}')
        return kept

    def _labelled(self, case: Case) -> Case:
        """Let a network that is not whole say so."""
        partial = case.network and self.only
        return replace(case, network=f'{case.network} ("{self.only}" only)') if partial else case

    def _found(self, dtype: str) -> list[Case]:
        workloads = self.workloads or []
        if not (self.workloads or self.networks or self.layers or self.log):
            workloads = ["lenet5"]
        layers = [layer for name in workloads for layer in workload(name)]
        layers += [parse_layer(notation) for notation in self.layers or []]
        found = [Case(layer, pass_) for layer in layers for pass_ in PASSES]
        found += [case for name in self.networks or [] for case in _network(name)]
        return found + ([] if self.log is None else _log(self.log, dtype))


def _network(name: str) -> Iterable[Case]:
    """A training step's passes: its images need no gradient."""
    for index, part in enumerate(network(name)):
        for pass_ in PASSES if index else PASSES[:2]:
            yield Case(part.layer, pass_, part.count, name)


def _log(file: Path, dtype: str) -> list[Case]:
    """Return each pass of each layer once, with the number of its calls."""
    try:
        calls = verbose.read(file)
    except OSError as error:
        raise ValueError(f"--layers-from {file}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--layers-from {file}: {error}") from None
    if not calls:
        raise ValueError(f"--layers-from {file}: it has no line of a call; NHWCONV_VERBOSE=1 writes them")
    counts = Counter((call.layer, pass_) for call in calls if call.dtype == dtype for pass_ in call.passes)
    if not counts:
        others = ", ".join(dict.fromkeys(call.dtype for call in calls))
        raise ValueError(f"--layers-from {file}: it has no call in {dtype}, only in {others}; see --dtype")
    return [Case(layer, pass_, count, file.name) for (layer, pass_), count in counts.items()]


def names(kind: str, given: Iterable[str], among: Iterable[str]) -> tuple[str, ...]:
    """Return the names, each once, if they are known."""
    among = tuple(among)
    return tuple(dict.fromkeys(known(kind, name.strip(), among) for name in given))
