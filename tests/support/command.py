"""The command line as tests call it: in this process, and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys

from typer.testing import CliRunner, Result

from nhwconv.cli.app import app

__all__ = ["process", "run"]


def run(*arguments: str) -> Result:
    """Run a command here."""
    return CliRunner().invoke(app, list(arguments))


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "nhwconv.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
