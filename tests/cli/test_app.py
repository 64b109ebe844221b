"""The command line as a whole: processes, and the commands that measure no layers."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import nhwconv as nc
from command import process, run
from nhwconv.cli.__main__ import main
from nhwconv.cli.app import app
from nhwconv.problem import PASSES

SMALL = "n2h9w8c4d6k3p1"


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = process(
        "compare", "--layer", SMALL, "--strategies", "tensordot", "--seconds", "0.01", "--json", str(file),
        PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(file.read_text())) == len(PASSES)
    bad = process("compare", "--workload", "vgg")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.endswith('did you mean "vgg16"?\n')


def test_the_script_is_the_modules_main() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="nhwconv")
    assert script.load() is main


@pytest.mark.parametrize("missing", ["rich", "threadpoolctl", "typer"])
def test_without_the_extra_one_line_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; from nhwconv.cli.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"nhwconv: the command line needs {missing}: pip install nhwconv[compare]\n"


def test_info_tells_about_this_machine(tmp_path: Path) -> None:
    done = process("info", NHWCONV_CACHE_DIR=str(tmp_path), NUMBA_NUM_THREADS="1")
    assert (done.returncode, done.stderr) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in done.stdout.replace("kernel cache", "kernel-cache").splitlines())
    assert facts["nhwconv"] == nc.__version__
    assert facts["NumPy"].startswith(np.__version__)
    assert facts["threads"].startswith("1, layer ")
    assert "float32" in facts["vectors"]
    assert all(name in facts["strategies"] for name in nc.strategies())
    assert re.search(r"^peak +\d+ GFLOP/s, \d+ GB/s: float32, 1 thread, measured$", done.stdout, re.MULTILINE)
    assert re.search(r"^peak +\d+ GFLOP/s, \d+ GB/s: float64, 1 thread, measured$", done.stdout, re.MULTILINE)
    assert sys.platform != "linux" or re.search(r"L1 \d+K, L2 \d+K", facts["caches"])
    assert facts["kernel-cache"].startswith(str(tmp_path))
    assert facts["tuning"] == f"{tmp_path}/nhwconv/tuning: 0 entries, 0.0 MB"


def test_clear_cache_deletes_the_kernels_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "nhwconv" / "kernels"
    (folder / "another version").mkdir(parents=True)
    (folder / "another version" / "kernel.bin").write_bytes(b"x" * 2_000_000)
    (tmp_path / "other.txt").touch()
    done = process("clear-cache", NHWCONV_CACHE_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"deleted 1 kernels (2.0 MB) from {folder}\n"
    assert not folder.exists()
    assert (tmp_path / "other.txt").exists()
    again = process("clear-cache", NHWCONV_CACHE_DIR=str(tmp_path))
    assert (again.returncode, again.stdout) == (0, f"deleted 0 kernels (0.0 MB) from {folder}\n")


def test_clear_cache_deletes_what_was_tuned_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "nhwconv" / "tuning"
    folder.mkdir(parents=True)
    for name in ("a.json", "b.json", "c.damaged"):
        (folder / name).touch()
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path))
    assert "tuning" not in run("clear-cache").output
    assert f"tuning        {folder}: 2 entries, 0.0 MB\n" in run("info").output
    done = run("clear-cache", "--tuning")
    assert done.exit_code == 0
    assert done.output.endswith(f"deleted 2 tuned choices from {folder}\n")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("compare --workload vg", ["vgg16"]),
        ("tune --network resnet", ["resnet18", "resnet50"]),
        ("compare --strategies loop,wi", ["loop,winograd"]),
        ("compare --against t", ["torch"]),
        ("tune --pass in", ["input_grad"]),
        ("com", ["compare"]),
    ],
)
def test_a_shell_completes_commands_and_names(typed: str, completed: list[str]) -> None:
    words = f"nhwconv {typed}"
    result = CliRunner().invoke(
        app,
        prog_name="nhwconv",
        env={"_NHWCONV_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))},
    )
    assert result.output.split() == completed


def test_a_mistyped_command_suggests_the_nearest() -> None:
    result = run("compar")
    assert result.exit_code == 2
    assert "Did you mean 'compare'?" in result.stderr


def test_version_and_help() -> None:
    assert run("--version").output == f"nhwconv {nc.__version__}\n"
    assert run("--help").exit_code == 0
    for command in ("compare", "tune", "info", "clear-cache"):
        assert run(command, "--help").exit_code == 0
