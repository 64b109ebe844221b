"""Rows as a JSON file: the place is checked before anything is measured, and the file appears whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .measure import Row

__all__ = ["check_place", "write_json"]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check_place(path: Path) -> Path:
    """Return the file's resolved path; raise an OSError where no file could be put there."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    temporary = _temporary(path)
    temporary.touch()
    temporary.unlink()
    return path


def write_json(path: Path, rows: list[Row]) -> None:
    """Write a list with an object for each row; readers see all of it or nothing."""
    temporary = _temporary(path)
    try:
        temporary.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
