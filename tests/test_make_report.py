"""`make report`: the tables and the chart say what was measured, and go where they belong."""

from __future__ import annotations

import importlib.util
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", ROOT / "tools" / "report.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(kind: str, name: str, pass_: str, dtype: str, **seconds: float) -> dict[str, Any]:
    return {"kind": kind, "name": name, "pass": pass_, "dtype": dtype, "seconds": seconds}


FOUND = {
    "machine": {"CPU": "a slide rule", "PyTorch": "2.13"},
    "command": "make report",
    "images": [8, 224],
    "rows": [
        row("network", "torch:resnet18", "step", "float32", torch=0.3, nhwconv=0.2),
        row("network", "jax:resnet18", "step", "float32", jax=0.5, nhwconv=0.25),
        row("layer", "vgg16.1_1", "forward", "float32", nhwconv=0.001, torch=0.002, jax=0.016),
        row("layer", "vgg16.1_1", "weight_grad", "float32", nhwconv=0.001, torch=0.008),
        row("layer", "lenet5.1", "forward", "float32", nhwconv=0.001, torch=0.0005, jax=0.004),
        row("layer", "lenet5.1", "forward", "float64", nhwconv=0.001, torch=0.004, jax=0.001),
    ],
}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_have_times_and_ratios(report: ModuleType) -> None:
    lines = [cells(line) for line in report.tables(FOUND).splitlines() if line.startswith("|")]
    assert ["resnet18 in PyTorch", "float32", "300", "200", "1.50"] in lines
    assert ["resnet18 in JAX", "float32", "500", "250", "2.00"] in lines
    assert ["vgg16.1_1", "forward, float32", "1", "2", "16", "2.00", "16"] in lines
    assert ["vgg16.1_1", "weight gradient, float32", "1", "8", "-", "8.00", "-"] in lines  # JAX refused


def test_means_are_geometric_and_of_one_dtype(report: ModuleType) -> None:
    lines = [cells(line) for line in report.tables(FOUND).splitlines() if line.startswith("|")]
    assert ["forward", "float32", "1.00", "8.00"] in lines  # of 2 and 1/2; of 16 and 4
    assert ["forward", "float64", "4.00", "1.00"] in lines
    assert ["weight gradient", "float32", "8.00", "-"] in lines


def test_the_report_says_where_it_was_measured(report: ModuleType) -> None:
    assert "by `make report` **on:** CPU a slide rule; PyTorch 2.13." in report.tables(FOUND)


def test_the_chart_puts_each_dot_at_its_ratio(report: ModuleType) -> None:
    svg = ET.fromstring(report.draw(FOUND["rows"]))
    names = [text.text for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    assert names == ["resnet18 in PyTorch", "resnet18 in JAX", "layers of vgg16", "layers of lenet5"]
    ticks = {
        float(text.text or ""): float(text.get("x") or "")
        for text in svg.iter(f"{SVG}text")
        if text.get("text-anchor") == "middle"
    }
    dots = [(dot.get("class"), float(dot.get("cx") or "")) for dot in svg.iter(f"{SVG}circle")]
    assert ("torch", ticks[4]) in dots  # vgg16, the mean of 2 and 8
    assert ("jax", ticks[16]) in dots
    assert ("torch float64", ticks[4]) in dots
    assert ("torch", ticks[0.5]) in dots  # lenet5, slower than PyTorch: shown as well
    assert len(dots) == 3 + 1 + 1 + 2 + 4  # the key, and one for each line, library and dtype that has a time
    spans = [tuple(float(line.get(end) or "") for end in ("x1", "x2")) for line in svg.iter(f"{SVG}line")]
    assert (ticks[2], ticks[8]) in spans  # vgg16's passes, from the least gain to the largest


def test_a_short_report_takes_less_and_says_so(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(report, "machine", dict)
    monkeypatch.setattr(report, "network", lambda name, dtype, given: asked.append((name, dtype)) or {})
    monkeypatch.setattr(report, "layers", lambda workloads, dtype, seconds: asked.append((dtype, seconds)) or [])
    given = report.arguments(["--short", "--networks", "jax:resnet18"])
    found = list(report.measure(given))[-1]
    assert asked == [("jax:resnet18", "float32"), ("float32", report.SHORT["seconds"])]
    assert found["command"] == 'make report ARGS="--short --networks jax:resnet18"'


def test_a_chart_of_nothing_says_how_to_fill_it(report: ModuleType) -> None:
    assert "make report" in report.draw([])


def test_the_readme_gets_the_networks_in_pytorch(report: ModuleType) -> None:
    names, _, gains = report.summary(FOUND["rows"]).splitlines()
    assert cells(names)[1:] == ["resnet18"]
    assert cells(gains)[1:] == ["1.50"]


def test_the_pages_say_what_was_measured_last(report: ModuleType) -> None:
    """Nobody has changed a figure by hand, or one page without the other."""
    found = json.loads((ROOT / "docs" / "report.json").read_text(encoding="utf-8"))
    assert report.summary(found["rows"]) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.tables(found) in (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert report.draw(found["rows"]) == (ROOT / "docs" / "report.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["docs/performance.md", "README.md"])
def test_the_page_keeps_all_but_its_place(report: ModuleType, tmp_path: Path, name: str) -> None:
    page = tmp_path / "page.md"
    page.write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    before = page.read_text(encoding="utf-8")
    report.fill(page, "| a |")
    once = page.read_text(encoding="utf-8")
    report.fill(page, "| a |")
    assert page.read_text(encoding="utf-8") == once
    place = re.compile(r"(?<=begin -->\n).*(?=<!-- make report: end)", re.DOTALL)
    assert place.sub("", once) == place.sub("", before)
    assert "\n| a |\n" in once


def test_a_page_without_a_place_is_an_error(report: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Nothing\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="no place"):
        report.fill(page, "")
    assert page.read_text(encoding="utf-8") == "# Nothing\n"


def test_what_was_measured_is_written_again(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.json").write_text(json.dumps(FOUND), encoding="utf-8")
    (tmp_path / "performance.md").write_text(
        "<!-- make report: begin -->\n<!-- make report: end -->\n", encoding="utf-8"
    )
    monkeypatch.setattr("sys.argv", ["report.py", "--from", str(tmp_path / "report.json"), "--out", str(tmp_path)])
    report.main()
    assert capsys.readouterr().out.strip() in (tmp_path / "performance.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.svg").read_text(encoding="utf-8") == report.draw(FOUND["rows"])
