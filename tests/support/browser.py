"""A headless Chromium for the tests of pages, and what a page must not do in it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

#: What the browser is called; without one of them, Playwright's own is asked for.
NAMES = ("chromium", "chromium-browser", "google-chrome")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser."""
    found = next(filter(None, map(shutil.which, NAMES)), None) or (str(MAC) if MAC.exists() else None)
    channel = "chrome" if sys.platform == "win32" else None
    with sync_playwright() as playwright:
        # As root, which continuous integration is, its sandbox refuses to start.
        browser = playwright.chromium.launch(executable_path=found, channel=channel, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


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
