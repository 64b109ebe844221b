"""Compiled code on disk: one file an entry, named by all that it depends on, checksummed and replaced atomically.

Numba's own file cache is not used (one index file for all kernels of a factory, and a race on it).

What is loaded is run, so only files that this user or root wrote are read, from folders that nobody else may write to.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import pickle
import pkgutil
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.serialize import dumps
from numba.misc import appdirs

from .._version import __version__
from .files import keep, mark_used, remove_unused, warn_once

__all__ = ["Store", "cache_folder", "clear_cache"]

#: The packages whose sources decide machine code.
_SOURCES = ("nhwconv.codegen", "nhwconv.runtime", "nhwconv.strategies")
#: Settings of Numba that say where and with how many threads code runs, and not what it is.
_HARMLESS = ("NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_THREADING_LAYER_PRIORITY", "NUMBA_CACHE_DIR")


def _modules(package: str) -> Iterator[str]:
    """Yield the names of a package and all of its modules."""
    spec = find_spec(package)
    yield package
    for module in pkgutil.iter_modules(spec.submodule_search_locations if spec else None, f"{package}."):
        if module.ispkg:
            yield from _modules(module.name)
        else:
            yield module.name


def _text(spec: ModuleSpec) -> bytes:
    """Return a module's source, or its bytecode where there is none (frozen programs, builds without sources)."""
    loader: Any = spec.loader
    try:
        return bytes(loader.get_data(spec.origin))
    except (AttributeError, OSError):
        return marshal.dumps(loader.get_code(spec.name))


@cache
def _version() -> str:
    """Return a hash of everything, other than an entry itself, that machine code depends on."""
    settings = sorted((k, v) for k, v in os.environ.items() if k.startswith("NUMBA_") and k not in _HARMLESS)
    versions = sys.version, numba.__version__, llvmlite.__version__, __version__, settings
    digest = hashlib.sha256(repr(versions).encode())
    for name in sorted({name for package in _SOURCES for name in _modules(package)} | _loaded()):
        if (spec := find_spec(name)) is not None:
            digest.update(name.encode() + _text(spec))
    return digest.hexdigest()[:16]


def _loaded() -> set[str]:
    """Return the modules of these packages that are in use: a frozen program cannot list its folders."""
    return {name for name in list(sys.modules) if name.startswith(_SOURCES)}


def cache_folder() -> Path:
    """Return the folder of compiled code: below NHWCONV_CACHE_DIR, NUMBA_CACHE_DIR or the user's cache folder."""
    root = os.environ.get("NHWCONV_CACHE_DIR") or os.environ.get("NUMBA_CACHE_DIR") or appdirs.user_cache_dir()
    if str(root).startswith("~"):  # there is no home
        root = os.path.join(tempfile.gettempdir(), f"nhwconv-{os.getuid() if hasattr(os, 'getuid') else 'cache'}")
    return Path(root) / "nhwconv" / "kernels"


def clear_cache() -> None:
    """Delete all compiled kernels, those of other versions too."""
    shutil.rmtree(cache_folder(), ignore_errors=True)


def _trusted(path: Path) -> bool:
    """Whether nobody but this user and root can have put code there."""
    if not hasattr(os, "geteuid"):
        return True
    found = path.stat()
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & stat.S_IWOTH


class Store:
    """The entries of one name. What cannot be read or trusted is a miss; what cannot be written is one warning."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name, self.options = name, options

    def _identity(self, key: object) -> bytes:
        """Return all that an entry depends on, other than the version, as one text."""
        return repr((self.name, sorted(self.options.items()), key)).encode()

    def _path(self, identity: bytes) -> Path:
        digest = hashlib.sha256(identity).hexdigest()
        return self._folder() / f"{self.name.split('.')[-1]}-{digest}.bin"

    @staticmethod
    def _folder() -> Path:
        return cache_folder() / _version()

    def load(self, key: object) -> Any:
        """Return what was saved under `key`, or None."""
        identity = self._identity(key)
        path = self._path(identity)
        try:
            for place in (path.parent, path):
                if not _trusted(place):
                    warn_once(path.parent, f"nhwconv does not read compiled code from {place}: others may write to it")
                    return None
            data = path.read_bytes()
        except OSError:
            return None
        mark_used(self._folder())
        # The checksum covers the identity too, so another entry's file under this name is a miss.
        checksum, payload = data[:32], data[32:]
        return pickle.loads(payload) if hashlib.sha256(identity + payload).digest() == checksum else None

    def save(self, key: object, data: object) -> None:
        """Keep `data`; readers see all of it or nothing."""
        identity, payload = self._identity(key), dumps(data)
        keep(
            self._path(identity),
            hashlib.sha256(identity + payload).digest() + payload,
            cache_folder(),
            "compiled kernels",
            "each process compiles them anew",
        )
        remove_unused(self._folder())

    def flush(self) -> None:
        """Nothing is buffered."""
