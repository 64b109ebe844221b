"""The soak finds what is wrong, reduces it, keeps it, and runs it again."""

import pytest

import fresh
import soak
from nhwconv.program import Program, calls
from nhwconv.strategies import REGISTRY


def test_a_short_soak(monkeypatch):
    """One batch, and what it says: the seed first, so that a crash is not without it."""
    monkeypatch.setattr(soak, "BATCH", 20)
    said = []
    assert soak.main(["--seconds", "0", "--seed", "7"], said.append) == 0
    assert said[0] == "seed 7"
    problems, _, results = said[-1].split()[:3]
    assert int(problems) >= 10
    assert int(results) > 9 * int(problems)
    again = []
    soak.main(["--seconds", "0", "--seed", "7"], again.append)
    assert again == said


def test_a_failing_problem_is_reduced_and_kept(tmp_path):
    """A strategy that is wrong where there are two images and more."""
    ordinary = REGISTRY["loop"].program

    def spoil(x, w, y, b=None):
        y[-1] += 100

    def wrong(problem, pass_, wanted):
        made = ordinary(problem, pass_, wanted)
        if pass_ == "forward" and problem.n >= 2:
            return Program.joined([made, calls(spoil, problem, pass_, wanted.bias, 0, 0)])
        return made

    said = []
    with fresh.patched((REGISTRY["loop"], "program", wrong)):
        assert soak.main(["--seconds", "0", "--seed", "3", "--folder", str(tmp_path)], said.append) == 1
        kept = tmp_path / "soak-3.txt"
        assert str(kept) in said[-1]
        assert "loop, float" in said[-1]
        case = eval(kept.read_text(), vars(soak)).case
        assert (case.n, case.kh, case.kw, case.stride, case.dilation) == (2, 1, 1, (1, 1), (1, 1))
        with pytest.raises(AssertionError, match="elements are wrong"):
            soak.main(["--again", str(kept)], said.append)
    assert soak.main(["--again", str(kept)], said.append) == 0
    assert said[-1] == "it is right now"
