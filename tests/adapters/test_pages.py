"""What the README, the docstrings and the examples say of the adapters runs, each in an interpreter of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import child

ROOT = Path(__file__).parents[2]
BLOCK = r"^```python {}\n(.*?)^```$"


@pytest.mark.parametrize("framework", ["torch", "jax", "dask"])
def test_the_readmes_block_runs(framework: str) -> None:
    (code,) = re.findall(BLOCK.format(framework), (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    check = {
        "torch": "assert names == ['0', '2']; assert all(p.grad is not None for p in model.parameters())",
        "jax": "assert dw.shape == w.shape",
        "dask": "assert dw.shape == w.shape",
    }
    child.run(f"{code}\n{check[framework]}")


@pytest.mark.parametrize("framework", ["torch", "jax", "dask"])
def test_examples_in_docstrings(framework: str) -> None:
    code = "import doctest, importlib, sys; print(doctest.testmod(importlib.import_module(sys.argv[1])))"
    found = re.fullmatch(r"TestResults\(failed=0, attempted=(\d+)\)\n", child.run(code, f"nhwconv.{framework}"))
    assert found
    assert int(found[1]) > 3


def run(name: str, *arguments: object) -> str:
    """Run an example as its reader does; return what it prints."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_resnet18_races() -> None:
    lines = run("resnet18.py", "--batch", 2, "--size", 64, "--steps", 2, "--layers").splitlines()
    assert "nhwconv runs 20 convolutions" in lines
    assert sum(" x" in line for line in lines) == 11  # its distinct convolutions
    for name in ("PyTorch", "nhwconv"):
        assert any(re.match(rf" +{name}: +\d+\.\d ms a step", line) for line in lines)


def test_resnet18_trains_alike() -> None:
    """One step of stochastic gradient descent in float64 leaves the same losses, but for rounding."""
    code = """
import copy, sys
sys.path.insert(0, sys.argv[1])
import torch
from resnet18 import Trainer, resnet18
from nhwconv.torch import replace_conv2d
torch.manual_seed(0)
stock = resnet18(10).double().to(memory_format=torch.channels_last)
assert sum(p.numel() for p in resnet18().parameters()) == 11_689_512
ours = copy.deepcopy(stock)
replace_conv2d(ours)
images, labels = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.randint(10, (4,))
trainers = Trainer(stock), Trainer(ours)
for trainer in trainers:
    for _ in range(3):
        trainer.step(images, labels)
torch.testing.assert_close(*(torch.tensor(t.losses) for t in trainers), rtol=1e-9, atol=0)
"""
    child.run(code, ROOT / "examples")


def test_cluster_shows_its_dashboard_and_progress() -> None:
    out = run("cluster.py", "--samples", 64, "--block", 16)
    assert re.search(r"^dashboard: http://\S+/status$", out, re.MULTILINE)
    assert "100% Completed" in out
    assert "MiB of images and gradients in" in out
