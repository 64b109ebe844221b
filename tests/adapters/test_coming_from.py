"""What the page on coming from other code says of frameworks runs, each framework in an interpreter of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import child

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from.md").read_text("utf-8")


@pytest.mark.parametrize("framework", ["autograd", "jax", "mygrad", "torch"])
def test_blocks_run(framework: str) -> None:
    blocks = re.findall(rf"^```python {framework}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert blocks
    child.run("\n".join(blocks))
