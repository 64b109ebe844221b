"""The ladder runs, checks its rungs, and refuses what its few lines cannot do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

LADDER = Path(__file__).parent.parent / "examples" / "ladder.py"


@pytest.fixture(scope="module")
def ladder() -> ModuleType:
    """Loaded once, so that its loops are compiled once."""
    spec = importlib.util.spec_from_file_location("ladder", LADDER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SECONDS = 0.01
    return module


def run(ladder: ModuleType, patch: pytest.MonkeyPatch, *arguments: str) -> None:
    patch.setattr(sys, "argv", [str(LADDER), *arguments])
    ladder.main()


@pytest.mark.parametrize(("layer", "winograd"), [("n2h9w8c5d7k3x2", 0), ("n1h8w8c16d16k3", 2)])
def test_every_rung_is_right_and_timed(
    layer: str,
    winograd: int,
    ladder: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture = tmp_path / "ladder.png"
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run(ladder, monkeypatch, "--layer", layer, "--out", str(picture))
    out, err = capsys.readouterr()
    assert err == ""
    for rung in ("article's tensordot", "plain loops", "parallel loops", "reordered loops", "im2col", "register tiles"):
        assert out.count(rung) == 2
    assert out.count("│ Winograd ") == winograd
    assert ("not for Winograd" in out) == (winograd == 0)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_rung_stops_it(ladder: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong answer never looks fast."""

    def wrong(x, w, b):
        return 2 * ladder.tensordot_forward(x, w, b)

    name = "im2col"
    monkeypatch.setitem(ladder.RUNGS, name, (wrong, ladder.RUNGS[name][1]))
    with pytest.raises(SystemExit, match=f"{name}: wrong, with an error of "):
        run(ladder, monkeypatch, "--layer", "n2h9w8c5d7k3x2")


@pytest.mark.parametrize(
    ("layer", "message"), [("n2h9w8c5d7k3s2", "leave s, p, l and g out"), ("n2h9", '"w" is missing')]
)
def test_what_it_cannot_do_is_told(
    layer: str,
    message: str,
    ladder: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(ladder, monkeypatch, "--layer", layer)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
