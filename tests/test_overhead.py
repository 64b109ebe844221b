"""What the protections cost."""

import overhead


def test_no_protection_costs_a_microsecond(capsys):
    """And each is in the table."""
    assert overhead.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == len(overhead.protections())
