"""Links that are right in the repository are right in the site: to pages, and to files that are no pages.

The pages are written to be read in the repository as well, so they link to files by relative paths. Here such a link is
turned into one to the page that shows the file, or to the repository, where no page does.
"""

from __future__ import annotations

import posixpath
import re
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

ROOT = Path(__file__).resolve().parents[2]

#: Files outside docs/ that a page includes.
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}

_LINK = re.compile(r"(\]\()(?!\w+:|#|<)([^)#\s]+)")


def _target(folder: PurePosixPath, url: str, link: re.Match[str]) -> str:
    """Return a link of a file that lies in `folder`, as a page in docs/ has to write it."""
    path = posixpath.normpath(folder / link[2])
    if not (ROOT / path).exists():
        raise ExtensionError(f"a page links to {path}, which does not exist")
    if path in PAGES:
        return link[1] + PAGES[path]
    if path.startswith("docs/"):
        return link[1] + path.removeprefix("docs/")
    return f"{link[1]}{url}/blob/main/{path}"


def _resolve(app: Sphinx, folder: PurePosixPath, content: list[str]) -> None:
    content[0] = _LINK.sub(partial(_target, folder, app.config.repository_url), content[0])


def _of_page(app: Sphinx, name: str, content: list[str]) -> None:
    _resolve(app, PurePosixPath("docs"), content)


def _of_included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    inside = Path(app.srcdir, path).resolve().relative_to(ROOT)
    _resolve(app, PurePosixPath(inside.parent.as_posix()), content)


def setup(app: Sphinx) -> dict[str, Any]:
    """Listen to what is read."""
    app.add_config_value("repository_url", "", "env", str)
    app.connect("source-read", _of_page)
    app.connect("include-read", _of_included)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
