"""How much the tests try: a short form for `make test`, and with NHWCONV_TESTS=nightly a long one."""

from __future__ import annotations

import os

FORMS = ("short", "nightly")
FORM = os.environ.get("NHWCONV_TESTS") or "short"
if FORM not in FORMS:
    raise ValueError(f"NHWCONV_TESTS is {FORM!r}, expected one of {', '.join(FORMS)}")


def amount(short: int, nightly: int) -> int:
    """Return how many of something to try."""
    return nightly if FORM == "nightly" else short
