"""The lines that calls write with ``NHWCONV_VERBOSE=1``, one a call, and their reading.

::

    nhwconv,<pass>,<layer>,<dtype>,<strategy>,<microseconds>
    nhwconv,forward,n8h56w56c64d64k3p1,float32,winograd,612.4
    nhwconv,weight_grad+input_grad,n8h56w56c64d64k3p1,float32,winograd+loop,1498.0

The layer is in the notation of `nhwconv.workloads`. A call that computes several passes at once is one line, with ``+``
between the passes, and between their strategies in the same order. Lines that begin otherwise are other programs'
output, so what a process wrote to standard error can be read as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from .names import known
from .problem import PASSES, ConvProblem, Pass
from .workloads import Layer, notation, parse_layer

__all__ = ["Call", "line", "read"]

_START = "nhwconv,"
_FORM = "nhwconv,pass,layer,dtype,strategy,microseconds"


@dataclass(frozen=True)
class Call:
    """One call: its passes, its layer, the dtype's name, a strategy for each pass, and how long all of it took."""

    passes: tuple[Pass, ...]
    layer: Layer
    dtype: str
    strategies: tuple[str, ...]
    microseconds: float


def line(ran: Mapping[Pass, str], problem: ConvProblem, seconds: float) -> str:
    """Return the line of a call.

    Parameters
    ----------
    ran : mapping
        The strategy of each pass that it computed.
    problem : ConvProblem
        The convolution.
    seconds : float
        How long it took.

    Returns
    -------
    str
        Without a line's end.

    Examples
    --------
    >>> from nhwconv import verbose
    >>> from nhwconv.workloads import parse_layer
    >>> verbose.line({"forward": "loop"}, parse_layer("n2h8w8c4d4k3").problem(), 12.5e-6)
    'nhwconv,forward,n2h8w8c4d4k3,float32,loop,12.5'
    """
    passes, strategies = "+".join(ran), "+".join(ran.values())
    return f"{_START}{passes},{notation(problem)},{problem.dtype_name},{strategies},{seconds * 1e6:.1f}"


def read(file: Path) -> list[Call]:
    """Return the calls that a file tells of, in its order.

    Parameters
    ----------
    file : Path
        What a process wrote.

    Returns
    -------
    list of Call

    Raises
    ------
    ValueError
        Where a line begins as one of a call and is none; the message has its number.
    OSError
        Where the file cannot be read.
    """
    calls = []
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if text.startswith(_START):
            try:
                calls.append(_call(text))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return calls


def _call(text: str) -> Call:
    fields = text.removeprefix(_START).split(",")
    if len(fields) != 5:
        raise ValueError(f'"{text}" is not of the form {_FORM}')
    passes = tuple(cast(Pass, known("pass", name, PASSES)) for name in fields[0].split("+"))
    strategies = tuple(fields[3].split("+"))
    if len(strategies) != len(passes):
        raise ValueError(f"{len(passes)} passes, but {len(strategies)} strategies")
    return Call(passes, parse_layer(fields[1]), fields[2], strategies, float(fields[4]))
