"""The mutants fit the sources: each mistake is about a text that is there exactly once, and names tests that exist."""

import shlex
from pathlib import Path

import pytest

import mutate


@pytest.mark.parametrize("mutant", mutate.MUTANTS, ids=lambda m: m.name)
def test_a_mutant_is_one_change(mutant, tmp_path):
    mutate.copy(mutant, tmp_path)
    mine = tmp_path / "nhwconv"
    changed = [p for p in mine.rglob("*.py") if p.read_text() != (mutate.PACKAGE / p.relative_to(mine)).read_text()]
    assert changed == [mine / mutant.file]
    compile(changed[0].read_text(), mutant.file, "exec")
    files = [a for a in shlex.split(mutant.tests) if a.startswith("tests/")]
    assert files
    assert all((mutate.ROOT / f).is_file() for f in files)


def test_a_mutant_whose_text_is_gone_is_told(tmp_path):
    """A change of the sources must not turn a mutant into the package itself."""
    with pytest.raises(SystemExit, match=r"^gone: the text is 0 times in files\.py"):
        mutate.copy(mutate.Mutant("gone", "files.py", "no such text", "", ""), Path(tmp_path))
