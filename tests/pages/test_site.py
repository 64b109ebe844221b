"""The documentation's site: built without warnings and without the network, and read in a browser that has none."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from playwright.sync_api import Browser

from browser import Visit

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.stem for page in (ROOT / "docs").glob("*.md"))
PHONE, DESK = 375, 1200

#: What reaches past the right edge of the screen, and is in nothing of the article that scrolls by itself.
CUT_OFF = """() => {
    const auto = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
    const scrolls = e => e.tagName != "ARTICLE" && (auto(e) || scrolls(e.parentElement));
    const past = e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
    return Array.from(document.querySelectorAll("article *")).filter(e => past(e) && !scrolls(e)).map(e => e.outerHTML);
}"""


class Quiet(SimpleHTTPRequestHandler):
    """Serve files and say nothing."""

    def log_message(self, *_: object) -> None:
        """Keep it to oneself."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    # A proxy that nobody answers: what the build wanted from the network, it would not get.
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-d", str(out / ".doctrees")]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **nowhere},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(params=[(PHONE, "light"), (DESK, "dark")], ids=["phone", "dark"])
def there(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    visit = Visit(browser, *request.param)
    failed: list[str] = []
    visit.page.on("response", lambda answer: failed.append(answer.url) if answer.status >= 400 else None)
    yield visit
    assert failed == []
    assert visit.errors == []
    assert all(url.startswith(address) for url in visit.requests)
    visit.page.context.close()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_and_fits_the_screen(there: Visit, address: str, page: str) -> None:
    there.page.goto(f"{address}{page}.html")
    assert there.page.locator("article h1").count() == 1
    wide, screen = there.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= screen, "the page scrolls sideways"
    assert there.page.evaluate(CUT_OFF) == []
    assert there.page.evaluate("Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)")


def _brightness(colour: str) -> float:
    return sum(float(part) for part in re.findall(r"[\d.]+", colour)[:3]) / (3 * 255)


def test_the_dark_is_dark_and_the_light_is_light(there: Visit, address: str) -> None:
    there.page.goto(f"{address}index.html")
    style = "getComputedStyle(document.querySelector('article p'))"
    ink = _brightness(there.page.evaluate(f"{style}.color"))
    paper = _brightness(there.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    dark = there.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (paper < 0.2) == dark
    assert abs(ink - paper) > 0.5


def test_formulas_are_drawn(there: Visit, address: str) -> None:
    """As many as the page has, each with an extent, none as its source."""
    source = (ROOT / "docs" / "derivation.md").read_text(encoding="utf-8")
    there.page.goto(f"{address}derivation.html")
    blocks = there.page.locator("div.formula math")
    assert blocks.count() == source.count("```math")
    boxes = there.page.evaluate(
        "Array.from(document.querySelectorAll('math')).map(m => m.getBoundingClientRect().width)"
    )
    assert min(boxes) > 4
    fraction = there.page.locator("div.formula mfrac").first.bounding_box()
    assert fraction
    assert fraction["height"] > 25  # a numerator above a denominator
    text = there.page.locator("article").inner_text()
    assert not re.search(r"\\(sum|frac|text|partial)", text)


def test_the_search_finds(there: Visit, address: str) -> None:
    there.page.goto(f"{address}search.html?q=workqueue")
    hits = there.page.locator("#search-results li a")
    hits.first.wait_for()
    assert any("threads" in (hit.get_attribute("href") or "") for hit in hits.all())


def test_the_search_needs_no_server(browser: Browser, site: Path) -> None:
    visit = Visit(browser)
    visit.page.goto(f"{(site / 'search.html').as_uri()}?q=winograd")
    visit.page.locator("#search-results li a").first.wait_for()
    visit.page.context.close()


def public(module: str) -> set[str]:
    """Return the names in a module's ``__all__``, without importing it: PyTorch, JAX and Dask need not be there."""
    places = (ROOT / "src" / "nhwconv" / end for end in (f"{module}.py", f"{module}/__init__.py"))
    tree = ast.parse(next(place for place in places if place.exists()).read_text(encoding="utf-8"))
    (names,) = [s.value for s in tree.body if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "__all__"]
    prefix = "nhwconv" if module == "__init__" else f"nhwconv.{module}"
    return {f"{prefix}.{name}" for name in ast.literal_eval(names) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("page", "modules"), [("reference", ["__init__"]), ("adapters", ["torch", "jax", "dask"])], ids=lambda of: str(of)
)
def test_the_reference_has_every_public_name(there: Visit, address: str, page: str, modules: list[str]) -> None:
    there.page.goto(f"{address}{page}.html")
    ids = set(there.page.evaluate("Array.from(document.querySelectorAll('dt.sig')).map(e => e.id)"))
    assert set().union(*map(public, modules)) <= ids


def test_an_entry_of_the_reference_has_what_its_docstring_has(there: Visit, address: str) -> None:
    there.page.goto(f"{address}reference.html")
    entry = there.page.locator("dl.py.function", has=there.page.locator("[id='nhwconv.conv2d']"))
    for title in ("Parameters", "Returns", "Raises", "Examples"):
        assert entry.locator("dt, p.rubric", has_text=title).count() >= 1
    assert entry.locator("div.doctest").count() == 1
    assert entry.locator("a[href='#nhwconv.strategies']").count() >= 1  # a name in its text is a link


class _Links(HTMLParser):
    """The addresses that a page names, and the ids that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids.add(found.get("id") or "")
        self.links.update(filter(None, (found.get("href"), found.get("src"))))


def test_every_link_within_the_site_leads_somewhere(site: Path) -> None:
    pages = {page.name: _Links(page.read_text(encoding="utf-8")) for page in site.glob("*.html")}
    assert {f"{name}.html" for name in PAGES} <= set(pages)
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"(https?|mailto|data):", link):
                continue
            path, anchor = urldefrag(unquote(link))
            target = path.split("?")[0] or name
            assert (site / target).exists(), f"{name} links to {link}"
            if anchor and target in pages:
                assert anchor in pages[target].ids, f"{name} links to {link}"


def test_files_that_are_no_pages_are_shown_by_the_repository(site: Path) -> None:
    links = _Links((site / "ladder.html").read_text(encoding="utf-8")).links
    assert any(link.endswith("/blob/main/examples/ladder.py") for link in links)
    assert "architecture.html#one-micro-kernel-three-passes" in links
