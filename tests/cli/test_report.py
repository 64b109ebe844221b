"""The report in a browser: plots are drawn, tables sort, no network is asked, and phones and the dark are fine."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Page
from typer.testing import CliRunner

from browser import Visit, chromium
from nhwconv.cli.app import app

LAYERS = ("n2h9w8c4d6k3p1", "n1h12w12c16d16k3p1")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    layers = [word for layer in LAYERS for word in ("--layer", layer)]
    arguments = ["compare", *layers, "--seconds", "0.02", "--report", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return file


def visit(browser: Browser, report: Path, **how: object) -> Visit:
    """Open the report and wait for its plots; it must be one file, without an error."""
    there = Visit(browser, **how)  # type: ignore[arg-type]
    there.page.goto(report.as_uri())
    there.page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
    assert there.errors == []
    assert there.requests == [report.as_uri()]
    return there


def test_the_plots_are_drawn(browser: Browser, report: Path) -> None:
    """The roofline with its points, bars for each of three passes, and memory."""
    page = visit(browser, report).page
    assert page.locator(".js-plotly-plot").count() == 5
    assert page.locator("#plot-0 .scatterlayer .lines path.js-line").count() == 1
    points = page.locator("#plot-0 .scatterlayer .points path").count()
    assert points == page.locator("tbody tr").count() > 20
    for index in range(1, 5):
        assert page.locator(f"#plot-{index} .barlayer .point path").count() >= 7  # strategies of two layers
        box = page.locator(f"#plot-{index} .main-svg").first.bounding_box()
        assert box is not None
        assert box["width"] > 600
    ticks = page.locator("#plot-1 .ytick text").all()
    from_the_top = sorted(ticks, key=lambda tick: (tick.bounding_box() or {"y": 0.0})["y"])
    assert [tick.text_content() for tick in from_the_top] == list(LAYERS)


def number(page: Page, name: str) -> int:
    """The number of a column, from one, as CSS counts."""
    return page.locator("th").all_inner_texts().index(name) + 1


def cells(page: Page, column: int) -> list[str]:
    return page.locator(f"tbody td:nth-child({column})").all_inner_texts()


@pytest.mark.parametrize("name", ["ms", "GFLOP/s", "l2 error"])
def test_a_click_sorts_numbers_and_another_turns_them_around(browser: Browser, report: Path, name: str) -> None:
    there = visit(browser, report)
    column = number(there.page, name)
    head = there.page.locator(f"th:nth-child({column})")
    before = [float(text) for text in cells(there.page, column)]
    assert before != sorted(before)
    head.click()
    assert [float(text) for text in cells(there.page, column)] == sorted(before)
    assert head.get_attribute("aria-sort") == "ascending"
    head.click()
    assert [float(text) for text in cells(there.page, column)] == sorted(before, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    assert there.errors == []


def test_a_click_sorts_words_and_rows_stay_whole(browser: Browser, report: Path) -> None:
    page = visit(browser, report).page
    rows = sorted(page.locator("tbody tr").all_inner_texts())
    column = number(page, "strategy")
    page.get_by_role("button", name="strategy").click()
    names = cells(page, column)
    assert names == sorted(names)
    assert len(set(names)) > 3
    assert sorted(page.locator("tbody tr").all_inner_texts()) == rows


@pytest.mark.parametrize("width", [360, 768])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Browser, report: Path, width: int) -> None:
    page = visit(browser, report, width=width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for index in range(5):
        box = page.locator(f"#plot-{index} .main-svg").first.bounding_box()
        assert box is not None
        assert width / 2 < box["width"] <= width


def luminance(colour: str) -> float:
    """Relative luminance of an rgb() colour, as WCAG 2 defines it."""
    channels = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_the_light_and_in_the_dark(browser: Browser, report: Path, scheme: str) -> None:
    page = visit(browser, report, scheme=scheme).page
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(back) < 0.2) == (scheme == "dark")
    page.wait_for_function("document.querySelector('#plot-4').layout.font?.color")
    inks = page.evaluate(
        """['#plot-0 .xtick text', '#plot-1 .ytick text', '#plot-4 .legendtext'].map(
             name => getComputedStyle(document.querySelector(name)).fill)
           .concat(['p', 'td', 'dd'].map(name => getComputedStyle(document.querySelector(name)).color))"""
    )
    for ink in inks:
        lighter, darker = sorted((luminance(ink), luminance(back)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > 4.5, f"{ink} on {back}"  # WCAG 2, level AA


def test_the_page_says_what_it_is_about(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "<title>nhwconv: 6 comparisons, float32, " in text
    assert text.startswith("<!doctype html>")
    assert 'name="viewport"' in text
    assert "winograd refused, because it needs 16 channels" in text


def test_without_plotly_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else found(name))
    result = CliRunner().invoke(app, ["compare", "--report", str(tmp_path / "report.html")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "nhwconv: --report needs plotly: pip install nhwconv[compare]\n"
    assert list(tmp_path.iterdir()) == []
