"""The dashboard of what is recorded, published and opened in a browser that has no network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from browser import Visit

ROOT = Path(__file__).parents[2]


class Quiet(SimpleHTTPRequestHandler):
    """Serve files and say nothing."""

    def log_message(self, *_: object) -> None:
        """Keep it to oneself."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dashboard")
    command = [sys.executable, str(ROOT / "tools" / "dashboard.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def there(browser: Browser, address: str) -> Iterator[Visit]:
    visit = Visit(browser)
    missing: list[str] = []
    visit.page.on("response", lambda response: missing.append(response.url) if response.status >= 400 else None)
    yield visit
    # asv asks for the graph of each combination, also of those that nobody recorded.
    assert [url for url in missing if not url.startswith(f"{address}graphs/")] == []
    assert [error for error in visit.errors if not error.startswith("Failed to load resource")] == []
    assert all(url.startswith(address) for url in visit.requests)
    visit.page.context.close()


def index(site: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((site / "index.json").read_text())
    return found


def shown(there: Visit) -> list[Any]:
    """The series of the graph on the page: its points that have a value, as [commit, value]."""
    script = "() => $('#main-graph').data('plot').getData().map(s => s.data.filter(p => p[1] !== null))"
    there.page.wait_for_function("window.$ && $('#main-graph').data('plot')?.getData().length > 0")
    return list(there.page.evaluate(script))


def test_the_grid_lists_the_benchmarks(there: Visit, address: str, site: Path) -> None:
    there.page.goto(address)
    there.page.wait_for_selector("#summarygrid-display .benchmark-container")
    text = there.page.locator("#summarygrid-display").inner_text()
    names = index(site)["benchmarks"]
    assert len(names) > 10
    for name in ("layers.Time.time_forward", "layers.Time.time_backward", "layers.Track.track_roofline"):
        assert name in names
        assert name.removeprefix("layers.") in text


def test_a_graph_draws_its_series_over_commits_in_their_order(there: Visit, address: str, site: Path) -> None:
    there.page.goto(f"{address}#layers.Time.time_forward")
    series = shown(there)
    longest = max(series, key=len)
    assert len(longest) >= 2
    commits = [point[0] for point in longest]
    assert commits == sorted(commits)
    assert all(0 < seconds < 1 for _, seconds in longest)
    log = subprocess.run(
        ["git", "log", "--first-parent", "--reverse", "--format=%H"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    recorded = {int(r): sha for r, sha in index(site)["revision_to_hash"].items() if int(r) in commits}
    assert sorted(recorded.values(), key=log.index) == [recorded[r] for r in sorted(recorded)]
    assert there.page.locator("#main-graph canvas.flot-base").count() == 1


def changed(there: Visit, before: list[Any]) -> list[Any]:
    """Return what is drawn once it differs from before and stays the same: asv draws some time after a click."""
    last = before
    for _ in range(100):
        there.page.wait_for_timeout(100)
        picture = shown(there)
        if picture == last != before:
            return picture
        last = picture
    raise AssertionError("a click changed nothing")


@pytest.mark.parametrize("axis", ["layer", "strategy", "threads"])
def test_an_axis_can_be_toggled(there: Visit, address: str, axis: str) -> None:
    """Each click on a value of an axis switches its series, and every second one gives the same picture."""
    page = there.page
    page.goto(f"{address}#layers.Time.time_forward")
    shown(there)
    panels = page.locator("#graphdisplay-navigation-params .panel")
    panel = panels.filter(has=page.locator(".panel-heading", has_text=re.compile(f"^{axis}$")))
    off = panel.locator("a.btn:not(.active)")  # asv starts with a few lines, not with all
    name = (off if off.count() else panel.locator("a.btn")).last.inner_text()
    pictures = [changed(there, [])]
    for _ in range(4):
        panel.locator("a.btn", has_text=re.compile(f"^{re.escape(name)}$")).click()
        page.wait_for_load_state("networkidle")
        pictures.append(changed(there, pictures[-1]))
    assert pictures[1:3] == pictures[3:]
    assert pictures[1] != pictures[2]


def test_the_regressions_page_loads(there: Visit, address: str) -> None:
    there.page.goto(f"{address}#/regressions")
    there.page.wait_for_selector("#regressions-body")
    there.page.wait_for_function("document.querySelector('#regressions-body').innerText.length > 0")
