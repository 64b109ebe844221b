"""A headless Chromium for the tests of pages, and what a page must not do in it.

python tests/browser.py    # see that there is one, bring Playwright's own where there is none, or say what helps
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Error, Page, sync_playwright

#: What the browser is called.
NAMES = ("chromium", "chromium-browser", "google-chrome")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def installed() -> str | None:
    """Return a browser of this machine; without one, Playwright's own is taken."""
    return next(filter(None, map(shutil.which, NAMES)), None) or (str(MAC) if MAC.exists() else None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser."""
    found = installed()
    channel = "chrome" if sys.platform == "win32" and found is None else None
    with sync_playwright() as playwright:
        # As root, which continuous integration is, its sandbox refuses to start.
        browser = playwright.chromium.launch(executable_path=found, channel=channel, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def bring() -> int:
    """Find a browser that starts, or bring one; return 1 where neither is possible, after saying what helps."""
    try:
        with chromium():
            return 0
    except Error:
        command = [sys.executable, "-m", "playwright", "install", "chromium"]
        if installed() is None and subprocess.run(command, check=False).returncode == 0:
            return 0
    print(
        "The tests of pages need Chromium or Chrome: apt-get install chromium, dnf install chromium, "
        "brew install --cask chromium, or any other way that puts one of these on the PATH: " + ", ".join(NAMES),
        file=sys.stderr,
    )
    return 1


class Visit:
    """A page, with the errors that it reported and the addresses that it asked for."""

    def __init__(self, browser: Browser, width: int = 1200, scheme: str = "light") -> None:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        self.page: Page = context.new_page()
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda request: self.requests.append(request.url))


if __name__ == "__main__":
    raise SystemExit(bring())
