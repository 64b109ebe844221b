"""The ladder runs, checks its rungs, and refuses what its few lines cannot do."""

import subprocess
import sys
from pathlib import Path

import pytest

LADDER = Path(__file__).parent.parent / "examples" / "ladder.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LADDER), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("layer", "winograd"), [("n2h9w8c5d7k3x2", 0), ("n1h8w8c16d16k3", 2)])
def test_every_rung_is_right_and_timed(layer: str, winograd: int, tmp_path: Path) -> None:
    picture = tmp_path / "ladder.png"
    done = run("--layer", layer, "--out", str(picture))
    assert (done.returncode, done.stderr) == (0, "")
    for rung in ("article's tensordot", "plain loops", "parallel loops", "reordered loops", "im2col", "register tiles"):
        assert done.stdout.count(rung) == 2
    assert done.stdout.count("│ Winograd ") == winograd
    assert ("not for Winograd" in done.stdout) == (winograd == 0)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("layer", "message"), [("n2h9w8c5d7k3s2", "leave s, p, l and g out"), ("n2h9", '"w" is missing')]
)
def test_what_it_cannot_do_is_told(layer: str, message: str) -> None:
    done = run("--layer", layer)
    assert done.returncode == 2
    assert message in done.stderr
