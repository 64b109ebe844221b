"""The report in a browser: plots are drawn, tables sort, no network is asked, and phones and the dark are fine."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page

from browser import Visit
from command import run
from nhwconv.problem import ConvProblem
from pretend import LIMITS, pretend

LAYERS = ("n2h9w8c4d6k3p1", "n8h28w28c64d64k3p1")
PLOTS = 6
PHONE = 360


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of layers and of a network, whose calls take as long as they are told."""

    def seconds(problem: ConvProblem, pass_: str, strategy: str, cold: bool) -> float:
        factor = {"winograd": 0.5, "loop": 1.1, "im2col": 1.9}.get(strategy, 7) * (1.3 if cold else 1)
        return 4e-6 + factor * LIMITS.seconds(problem)

    file = tmp_path_factory.mktemp("report") / "report.html"
    layers = [word for layer in LAYERS for word in ("--layer", layer)]
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch.setattr, seconds)
        result = run("compare", *layers, "--network", "lenet5", "--cold", "--seconds", "0.01", "--report", str(file))
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
    """The roofline with its points, hot and cold, bars for each of three passes, and memory."""
    page = visit(browser, report).page
    assert page.locator(".js-plotly-plot").count() == PLOTS
    assert page.locator("#plot-0 .scatterlayer .lines path.js-line").count() == 1
    points = page.locator("#plot-0 .scatterlayer .points path").count()
    assert points == page.locator("#rows tbody tr").count() > 20
    assert page.locator("#plot-1 .scatterlayer .points path").count() == points
    for index in range(2, PLOTS):
        assert page.locator(f"#plot-{index} .barlayer .point path").count() >= 7  # strategies of two layers
        box = page.locator(f"#plot-{index} .main-svg").first.bounding_box()
        assert box is not None
        assert box["width"] > 600
    ticks = page.locator("#plot-2 .ytick text").all()
    from_the_top = sorted(ticks, key=lambda tick: (tick.bounding_box() or {"y": 0.0})["y"])
    assert [tick.text_content() for tick in from_the_top][: len(LAYERS)] == list(LAYERS)


@pytest.mark.parametrize("width", [PHONE, 1200])
def test_the_first_screen_says_who_wins_by_how_much_and_why(browser: Browser, report: Path, width: int) -> None:
    """Without scrolling: sentences, and strategies by their wins; a layer's winner, lead and reason on a desk."""
    page = visit(browser, report, width=width).page
    answer = page.locator(".answer")
    assert (
        "loop is the fastest on 8 of 11 passes, 1.1 to 1.7 times as fast as the next; winograd on 3."
        in answer.inner_text()
    )
    assert "The planner chose the fastest strategy on " in answer.inner_text()
    seen = [row for row in page.locator(".standings tbody tr").all() if bottom(row) < 900]
    assert [row.locator("b").inner_text() for row in seen][:2] == ["loop", "winograd"]
    winner = page.locator(".winners tbody tr", has_text=LAYERS[1]).first
    assert [winner.locator("b").nth(i).inner_text() for i in range(2)] == ["winograd", "winograd"]  # hot and cold
    assert re.search(r"2\.\d+x over loop", winner.inner_text())
    assert "fewer multiplications: as fast as " in winner.inner_text()
    assert width == PHONE or bottom(page.locator(".winners tbody tr").first) < 900


def bottom(element: Locator) -> float:
    box = element.bounding_box()
    assert box is not None
    return box["y"] + box["height"]


def test_sums_of_a_network_stand_before_its_layers(browser: Browser, report: Path) -> None:
    page = visit(browser, report).page
    assert page.locator(".sums h2").all_inner_texts() == ["lenet5 altogether", "lenet5 altogether, cold"]
    for sums in page.locator(".sums table").all():
        numbers = sums.locator("tbody tr", has_text="auto").locator("td").all_inner_texts()[1:]
        assert float(numbers[-1]) == pytest.approx(sum(map(float, numbers[:-1])), rel=1e-3)


def number(page: Page, name: str) -> int:
    """The number of a column, from one, as CSS counts."""
    return page.locator("#rows th").all_inner_texts().index(name) + 1


def cells(page: Page, column: int) -> list[str]:
    return page.locator(f"#rows tbody td:nth-child({column})").all_inner_texts()


@pytest.mark.parametrize("name", ["ms", "cold ms", "GFLOP/s"])
def test_a_click_sorts_numbers_and_another_turns_them_around(browser: Browser, report: Path, name: str) -> None:
    there = visit(browser, report)
    column = number(there.page, name)
    head = there.page.locator(f"#rows th:nth-child({column})")
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
    rows = sorted(page.locator("#rows tbody tr").all_inner_texts())
    column = number(page, "strategy")
    page.locator("#rows").get_by_role("button", name="strategy").click()
    names = cells(page, column)
    assert names == sorted(names)
    assert len(set(names)) > 3
    assert sorted(page.locator("#rows tbody tr").all_inner_texts()) == rows


@pytest.mark.parametrize("width", [PHONE, 768])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Browser, report: Path, width: int) -> None:
    page = visit(browser, report, width=width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for index in range(PLOTS):
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
    page.wait_for_function("document.querySelector('#plot-5').layout.font?.color")
    inks = page.evaluate(
        """['#plot-0 .xtick text', '#plot-2 .ytick text', '#plot-5 .legendtext'].map(
             name => getComputedStyle(document.querySelector(name)).fill)
           .concat(['.answer p', '.note', '.winners td:last-child', 'td', 'dd'].map(
             name => getComputedStyle(document.querySelector(name)).color))"""
    )
    for ink in inks:
        lighter, darker = sorted((luminance(ink), luminance(back)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > 4.5, f"{ink} on {back}"  # WCAG 2, level AA
