"""Run Python code in a process of its own, where it may crash, fork, or see another environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent

#: What would make a child behave otherwise than the test says.
_DROPPED = ("NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_CACHE_DIR")


def start(code: str, *arguments: object, **environment: object) -> subprocess.Popen[str]:
    """Start ``python -c code arguments`` with warnings as errors, tests/ importable, and these variables set."""
    env = {k: v for k, v in os.environ.items() if k not in _DROPPED}
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env |= {"PYTHONPATH": os.pathsep.join(paths)} | {k: str(v) for k, v in environment.items()}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str, str]:
    """Wait for a child; return its exit status (minus the signal that killed it), stdout and stderr."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the child ran longer than {timeout} s\n{out}\n{err}") from None
    return process.returncode, out, err


def run(code: str, *arguments: object, **environment: object) -> str:
    """Run a child that must succeed; return what it printed."""
    status, out, err = finish(start(code, *arguments, **environment))
    assert status == 0, f"the child ended with {status}\n{out}\n{err}"
    return out
