"""Comparisons as files: places are checked before anything is measured, and a file appears whole or not at all."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .measure import Comparison, Row

__all__ = ["CannotWriteError", "Output", "outputs"]

#: Makes a file's text of comparisons.
Form = Callable[[Sequence[Comparison]], str]


class CannotWriteError(Exception):
    """A file cannot be written, and why."""


@dataclass(frozen=True)
class Output:
    """A file that will be written: its resolved path, and what makes its text."""

    path: Path
    form: Form

    def write(self, comparisons: Sequence[Comparison]) -> None:
        """Write the file; readers see all of it or nothing."""
        temporary = _temporary(self.path)
        try:
            temporary.write_text(self.form(comparisons), encoding="utf-8", newline="")
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


def outputs(places: Mapping[str, Path | None]) -> list[Output]:
    """Return an output for each option that was given; raise a `CannotWriteError` where no file could be put."""
    return [_output(option, path) for option, path in places.items() if path is not None]


def _output(option: str, path: Path) -> Output:
    if option == "--report" and importlib.util.find_spec("plotly") is None:
        raise CannotWriteError("--report needs plotly: pip install nhwconv[compare]")
    place = path.resolve()
    if place.exists() and not place.is_file():
        raise CannotWriteError(f"{option} {path} is not a regular file")
    temporary = _temporary(place)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise CannotWriteError(f"{option} {path}: {error.strerror}") from None
    return Output(place, _FORMS[option])


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _rows(comparisons: Sequence[Comparison]) -> list[Row]:
    return [row for comparison in comparisons for row in comparison.rows()]


def _json(comparisons: Sequence[Comparison]) -> str:
    """Return a list with an object for each row."""
    return json.dumps([row.as_json() for row in _rows(comparisons)], indent=1) + "\n"


def _csv(comparisons: Sequence[Comparison]) -> str:
    """Return a line for each row, below one of names; what a row does not have is empty."""
    rows = [row.as_json() for row in _rows(comparisons)]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _html(comparisons: Sequence[Comparison]) -> str:
    from .report import page  # plotly takes a second to load

    return page(comparisons)


_FORMS: dict[str, Form] = {"--json": _json, "--csv": _csv, "--report": _html}
