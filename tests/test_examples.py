"""The examples run as a reader runs them, and do what they say."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

import nhwconv as nc

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*arguments: object) -> str:
    """Run an example in an interpreter of its own, where a warning is an error too; return what it prints."""
    warnings = "error::RuntimeWarning,error::UserWarning"
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONUTF8": "1", "PYTHONWARNINGS": warnings}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stream_adds_up_what_does_not_fit() -> None:
    out = run(EXAMPLES / "stream.py", "--samples", 1024, "--batch", 32, "--memory", 100)
    assert out.startswith("128 MiB of images, 100 MiB of memory\n")
    assert ("the file does not fit" in out) == (sys.platform == "linux")
    images = np.random.default_rng(0)
    w = np.random.default_rng(1).standard_normal((16, 3, 3, 8)).astype(np.float32)
    dw, db = np.zeros(w.shape), np.zeros(16)
    for _ in range(32):
        x = images.standard_normal((32, 64, 64, 8), np.float32).astype(np.float64)
        y = nc.conv2d(x, w, padding=1)
        dw += nc.conv2d_weight_grad(x, y, 3, padding=1)
        db += y.sum((0, 1, 2))
    printed = [float(number.rstrip(",")) for number in re.findall(r"\| = (\S+)", out)]
    np.testing.assert_allclose(printed, [np.linalg.norm(dw), np.linalg.norm(db)], rtol=1e-5)


def test_digits_learns_to_read_and_draws(tmp_path: Path) -> None:
    figure = tmp_path / "digits.png"
    lines = run(EXAMPLES / "digits.py", "--epochs", 8, "--out", figure).strip().splitlines()

    last = re.fullmatch(r"test accuracy: (\d+\.\d)%", lines[-1])
    assert last, lines[-1]
    assert float(last[1]) >= 96  # under half of the epochs; the whole run reaches 97.5 and more

    header = figure.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", header[16:24])
    assert width > 1000
    assert height > 700


def test_simulation_finds_the_kernel_and_draws(tmp_path: Path) -> None:
    figure = tmp_path / "simulation.png"
    out = run(EXAMPLES / "simulation.py", "--out", figure)
    losses = re.search(r"loss: (\S+) at first, (\S+) at last", out)
    assert losses, out
    assert float(losses[2]) < 1e-3**2  # what the noise alone leaves is half of its square
    assert float(losses[1]) > 1e-3
    off = re.search(r"the kernel is off by (\S+)%", out)
    assert off, out
    assert float(off[1]) < 1
    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
