"""What `nhwconv.tune` measured to be the fastest: in memory for this process, on disk for later ones.

On disk there is one small JSON file for each pass of a problem, named by a hash of all that its choice depends on, with
a checksum inside. It is written beside its place and then moved there, so any number of processes may tune at once:
a reader finds a whole file or none, and of several writers the last one stays.

A process looks for a file once; what another process tunes later does not change its choices, nor its bits.
`NHWCONV_TUNING` says what may happen on disk:

===========  ==================  =========================
value        plans read files    `nhwconv.tune` writes one
===========  ==================  =========================
``off``      no                  no, this process remembers
``read``     yes                 no, this process remembers
``write``    yes                 yes
===========  ==================  =========================

Unset, it is ``write``: nothing but `nhwconv.tune` writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numba

from ._version import __version__
from .checks import fail
from .problem import ConvProblem, Pass
from .runtime import machine
from .runtime.files import keep as keep_file
from .runtime.store import cache_folder
from .strategies import AUTO

__all__ = ["VARIABLE", "check_folder", "clear", "count", "folder", "forget", "keep", "lookup", "mode"]

VARIABLE = "NHWCONV_TUNING"
MODES = ("off", "read", "write")

#: What was tuned in this process.
_tuned: dict[tuple[Pass, ConvProblem], str] = {}


def mode() -> str:
    """Return "off", "read" or "write": what NHWCONV_TUNING says may happen on disk."""
    value = os.environ.get(VARIABLE) or "write"
    if value not in MODES:
        fail(f'{VARIABLE} is "{value}", expected one of {", ".join(MODES)}')
    return value


def folder() -> Path:
    """Return the folder of tuned choices, beside that of the compiled kernels."""
    return cache_folder().parent / "tuning"


def lookup(pass_: Pass, problem: ConvProblem) -> str | None:
    """Return the name of the strategy that was measured to be the fastest on this machine, None where none was."""
    on_disk = mode() != "off"
    tuned = _tuned.get((pass_, problem))
    return _read(folder(), pass_, problem) if tuned is None and on_disk else tuned


def keep(pass_: Pass, problem: ConvProblem, strategy: str, seconds: dict[str, float]) -> None:
    """Remember a choice, and what each candidate took; on disk too where NHWCONV_TUNING lets it."""
    _tuned[pass_, problem] = strategy
    if mode() == "write":
        _write(_key(pass_, problem), strategy, seconds)


def count() -> int:
    """Return how many choices are on disk, those for other CPUs and versions too."""
    return sum(1 for _ in folder().glob("*.json"))


def clear() -> None:
    """Delete all choices, on disk and in memory."""
    shutil.rmtree(folder(), ignore_errors=True)
    forget()


def forget() -> None:
    """Forget what this process tuned or read."""
    _tuned.clear()
    _read.cache_clear()


def check_folder() -> None:
    """Make the folder; raise an OSError where no file can be put there."""
    folder().mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder()).close()


# ---------------------------------------------------------------------------------------------- files


@cache
def _here() -> dict[str, Any]:
    """Return what a choice depends on besides the problem."""
    return {
        "nhwconv": __version__,
        "numba": numba.__version__,
        "cpu": machine.cpu_model(),
        "target": list(machine.target()),
    }


def _key(pass_: Pass, problem: ConvProblem) -> dict[str, Any]:
    return {**_here(), "pass": pass_, "problem": str(problem)}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _path(key: dict[str, Any]) -> Path:
    return folder() / f"{_hash(key)}.json"


def _write(key: dict[str, Any], strategy: str, seconds: dict[str, float]) -> None:
    record = {"key": key, "strategy": strategy, "seconds": seconds}
    data = json.dumps({**record, "sha256": _hash(record)}, indent=1).encode()
    keep_file(_path(key), data, folder(), "what was tuned", "only this process knows it")


@lru_cache(maxsize=4096)
def _read(place: Path, pass_: Pass, problem: ConvProblem) -> str | None:
    """Return the choice in a problem's file below `place`; None without one, or where it cannot be read."""
    if not place.is_dir():  # most people never tune
        return None
    key = _key(pass_, problem)
    path = _path(key)
    try:
        data = path.read_bytes()
    except OSError:
        return None
    try:
        return _strategy(data, key)
    except (ValueError, RecursionError) as error:
        _set_aside(path, str(error))
        return None


def _strategy(data: bytes, key: dict[str, Any]) -> str:
    """Return the strategy that a file's contents name, or raise a ValueError that says what is wrong with them."""
    record = json.loads(data)
    if not isinstance(record, dict) or record.pop("sha256", None) != _hash(record):
        raise ValueError("its checksum does not fit")
    if record.get("key") != key:
        raise ValueError("it belongs to another problem or machine")
    if record.get("strategy") not in AUTO:
        raise ValueError(f"it names the strategy {record.get('strategy')!r}")
    return str(record["strategy"])


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_suffix(".damaged")
    try:
        os.replace(path, aside)
    except OSError:
        moved = "it is ignored"
    else:
        moved = f"it is now {aside.name}"
    warnings.warn(f"nhwconv found a damaged file of tuning, {path} ({why}); {moved}", RuntimeWarning, stacklevel=2)
