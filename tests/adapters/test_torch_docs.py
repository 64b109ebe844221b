"""What the pages about PyTorch say runs: a page's blocks in order, in one interpreter."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

import child

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^ *```python torch\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["pytorch.md", "networks.md"])
def test_blocks_run(page: str) -> None:
    blocks = [textwrap.dedent(block) for block in BLOCK.findall((DOCS / page).read_text("utf-8"))]
    assert len(blocks) > 2
    # PyTorch's transforms script something of their own, which is deprecated.
    ignore = "import warnings; warnings.filterwarnings('ignore', message='.*torch.jit', category=DeprecationWarning)"
    child.run("\n".join([ignore, *blocks]))
