"""What the protections cost."""

import overhead


def test_each_protection_is_in_the_table(capsys, monkeypatch):
    """In nanoseconds; how many is for whoever measures."""
    monkeypatch.setattr(overhead, "ROUNDS", 2)
    monkeypatch.setattr(overhead, "CALLS", 2)
    overhead.main()
    assert len(capsys.readouterr().out.splitlines()) == len(overhead.protections())
