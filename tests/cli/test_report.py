"""The report as a file: what it says. (What a browser makes of it is tested in pages/.)"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from command import run
from nhwconv.runtime import machine
from pretend import pretend

#: The first has too few channels for winograd, however short vectors are.
LAYERS = ("n2h9w8c4d1k3p1", "n1h12w12c16d16k3p1")


def test_the_page_says_what_it_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch.setattr, lambda problem, pass_, strategy, cold: {"loop": 1e-3}.get(strategy, 2e-3))
    file = tmp_path / "report.html"
    layers = [word for layer in LAYERS for word in ("--layer", layer)]
    result = run("compare", *layers, "--seconds", "0.01", "--report", str(file))
    assert result.exit_code == 0, result.output
    text = file.read_text(encoding="utf-8")
    assert "<title>nhwconv: 6 comparisons, float32, 2 threads</title>" in text
    assert text.startswith("<!doctype html>")
    assert 'name="viewport"' in text
    assert "<p>loop is the fastest on 6 of 6 passes, 2 times as fast as the next.</p>" in text
    assert f"winograd refused, because it needs {machine.lanes(4)} channels" in text
    assert "Hot and cold" not in text


def test_without_plotly_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else found(name))
    result = run("compare", "--report", str(tmp_path / "report.html"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "nhwconv: --report needs plotly: pip install nhwconv[compare]\n"
    assert list(tmp_path.iterdir()) == []
