"""Files that several processes read and write at once, in folders that may be full, read-only or swept under them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = ["keep", "mark_used", "remove_unused", "warn_once", "write_whole"]

_DAY = 24 * 3600.0
#: Seconds after which a temporary file is one that a killed process left, and a folder one that nothing uses any more.
ABANDONED, UNUSED = _DAY, 30 * _DAY

#: Another process may sweep a folder between any two steps of a write, which then starts again: so often at most.
_ATTEMPTS = 5


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there, so that readers see all of it or nothing; folders are made."""
    for attempt in range(_ATTEMPTS):
        try:
            # Whatever the umask: a folder of code that anybody may write to is not read.
            path.parent.mkdir(0o755, parents=True, exist_ok=True)
            _remove_abandoned(path.parent)
            _write_and_move(path, data)
        except FileNotFoundError:
            if attempt == _ATTEMPTS - 1:
                raise
        else:
            return


def _write_and_move(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too leaves nothing behind
        with suppress(OSError):
            os.unlink(temporary)
        raise


#: The places that were warned of.
_told: set[Path] = set()


def warn_once(place: Path, message: str) -> None:
    """Warn, once a process for each place."""
    if place not in _told:
        _told.add(place)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def keep(path: Path, data: bytes, place: Path, what: str, otherwise: str) -> None:
    """Write a file whole; where that cannot be, warn, once for each `place`, that `what` isn't kept, so `otherwise`."""
    try:
        write_whole(path, data)
    except OSError as error:
        # Without the file's name, which is a random one where the disk is full.
        why = error.strerror or type(error).__name__
        warn_once(
            place,
            f"nhwconv cannot keep {what} in {place} ({why}), so {otherwise}; "
            "set NHWCONV_CACHE_DIR to a folder that can be written",
        )


def _older(path: Path, seconds: float) -> bool:
    return time.time() - path.stat().st_mtime > seconds


@cache
def _remove_abandoned(folder: Path) -> None:
    """Remove, once a process, the temporary files that killed processes left in a folder."""
    for path in folder.glob("*.tmp"):
        with suppress(OSError):  # another process was faster
            if _older(path, ABANDONED):
                path.unlink()


@cache
def mark_used(folder: Path) -> None:
    """Say, once a process, that a folder is in use: `remove_unused` goes by its time of change."""
    with suppress(OSError):  # it is not there yet, or not ours
        os.utime(folder)


@cache
def remove_unused(folder: Path) -> None:
    """Remove, once a process, the folders beside `folder` that no process has used for 30 days.

    Each is moved away first, so a process that wants it at this moment finds all of it or nothing, and makes it anew.
    """
    with suppress(OSError):
        for other in list(folder.parent.iterdir()):
            with suppress(OSError):
                if other != folder and other.is_dir() and _older(other, UNUSED):
                    doomed = other.with_name(f"{other.name}.{os.getpid()}.old")
                    os.replace(other, doomed)
                    shutil.rmtree(doomed, ignore_errors=True)
