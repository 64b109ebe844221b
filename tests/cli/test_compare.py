"""The command line: what it prints, what it writes, how it ends."""

import csv
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import nhwconv as nc
import rigged
from nhwconv import choices, tuning
from nhwconv.cli import measure
from nhwconv.cli.__main__ import main
from nhwconv.cli.app import app
from nhwconv.cli.measure import Comparison
from nhwconv.problem import PASSES
from nhwconv.strategies import REGISTRY
from nhwconv.workloads import parse_layer

SMALL = "n2h9w8c4d6k3p1"
WIDE = "n2h12w12c64d64k3p1"  # rigged.X and rigged.W
KEYS = (
    "layer", "pass", "strategy", "dtype", "seconds", "spread", "median", "gflops", "peak_fraction", "roofline_fraction",
    "error", "workspace_bytes", "peak_bytes", "compile_seconds", "chosen",
)  # fmt: skip
BOUND = {"float32": 1e-5, "float64": 1e-13}  # the package's promise on standard-normal data


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nhwconv.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


# ------------------------------------------------------------------------------------------ compare


def test_every_strategy_and_pass_by_default(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    result = run("compare", "--layer", SMALL, "--seconds", "0.01", "--json", str(file))
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    problem = parse_layer(SMALL).problem()
    able = [(p, name) for p in PASSES for name, s in REGISTRY.items() if s.supports(problem, p) is None]
    assert [(row["pass"], row["strategy"]) for row in rows] == able
    for row in rows:
        assert tuple(row) == KEYS
        assert row["layer"] == SMALL
        assert row["dtype"] == "float32"
        assert 0 < row["seconds"] < 1
        assert row["spread"] >= 0
        assert row["gflops"] == pytest.approx(problem.flops / row["seconds"] / 1e9)
        assert 0 < row["error"] < BOUND["float32"]
        assert row["seconds"] <= row["median"] <= row["seconds"] + row["spread"]
        assert 0 < row["peak_fraction"] <= 1.1
        assert row["roofline_fraction"] >= 0.999 * row["peak_fraction"]  # the roofline is at most the peak
        assert row["workspace_bytes"] >= 0
        assert row["peak_bytes"] >= 0
        assert row["compile_seconds"] >= 0
    for pass_ in PASSES:
        chosen = [row["strategy"] for row in rows if row["pass"] == pass_ and row["chosen"]]
        assert chosen == [nc.plan(pass_, (2, 9, 8, 4), (6, 3, 3, 4), padding=1).strategy]
    assert os.listdir(tmp_path) == ["rows.json"]


def test_the_table_names_what_was_asked_for() -> None:
    result = run(
        "compare", "--workload", "article", "--layer", SMALL, "--pass", "weight_grad", "--strategies",
        "tensordot,loop", "--dtype", "float64", "--seconds", "0.01",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split()[:2] for line in lines if " x " in line] == [
        ["article.4x4", "weight_grad"],
        [SMALL, "weight_grad"],
    ]
    assert "float64" in result.output
    assert sum("GFLOP/s peak roof" in line for line in lines) == 2
    assert re.search(r"^100% is \d+ GFLOP/s of float64 and \d+ GB/s, measured with \d+ threads$", lines[-1])
    rows = [line.split() for line in lines if line.startswith((" tensordot", " loop"))]
    assert [row[0] for row in rows] == ["tensordot", "loop"] * 2
    assert all(float(row[7]) < BOUND["float64"] for row in rows)


def test_the_planners_choice_is_marked() -> None:
    result = run("compare", "--layer", SMALL, "--pass", "weight_grad", "--seconds", "0.01")
    assert result.exit_code == 0, result.output
    marked = [line.split()[0] for line in result.output.splitlines() if " auto" in line]
    assert marked == [nc.plan("weight_grad", (2, 9, 8, 4), (6, 3, 3, 4), padding=1).strategy]


def test_only_keeps_layers_by_their_names() -> None:
    result = run("compare", "--workload", "lenet5", "--workload", "article", "--only", "4x4", "--pass", "forward",
                 "--seconds", "0.01")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "article.4x4" in result.output
    assert "lenet5" not in result.output


def test_half_types_are_compared_with_the_numbers_they_hold(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    result = run("compare", "--layer", SMALL, "--dtype", "float16", "--seconds", "0.01", "--json", str(file))
    assert result.exit_code == 0, result.output
    eps = 2.0**-11  # results are rounded to float16 once
    assert all(0 < row["error"] < eps for row in json.loads(file.read_text()))


def test_a_strategy_that_refuses_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(REGISTRY["im2col"]), "supports", lambda *_: "it is Sunday")
    result = run("compare", "--layer", SMALL, "--pass", "forward", "--seconds", "0.01")
    assert result.exit_code == 0, result.output
    assert "\nim2col: it is Sunday\n" in result.output
    assert "\n im2col " not in result.output
    assert "\n loop " in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "resnet5"], 'there is no workload "resnet5", expected one of article, lenet5'),
        (["--workload", "resnet5"], 'did you mean "resnet50"?'),
        (["--layer", "n8h56"], 'layer "n8h56": "w" is missing; expected a form like n8h56w56c64d64k3s1p1'),
        (["--layer", "n1h3w3c1d1k5"], "the kernel spans 5 rows, but the padded input has only 3"),
        (["--pass", "weight-grad"], 'there is no pass "weight-grad", expected one of forward, weight_grad'),
        (["--strategies", "loop,tensordto"], 'did you mean "tensordot"?'),
        (["--strategies", ""], 'there is no strategy "", expected one of '),
        (["--dtype", "int8"], 'there is no dtype "int8", expected one of float32, float64, float16'),
        (["--seconds", "0"], "--seconds is 0.0, expected more than 0"),
        (["--seconds", "nan"], "--seconds is nan, expected more than 0"),
        (["--only", "zzz"], 'no layer has "zzz" in its name, expected one of lenet5.1, lenet5.2'),
        (["--against", "troch"], 'there is no peer "troch", expected one of torch, jax; did you mean "torch"?'),
        (["--threads", "0"], "--threads is 0: The number of threads must be between 1 and "),
        (["--csv", "no/such/folder/rows.csv"], "--csv no/such/folder/rows.csv: No such file or directory"),
        (["--report", "no/such/folder/r.html"], "--report no/such/folder/r.html: No such file or directory"),
        (["--json", "no/such/folder/rows.json"], "--json no/such/folder/rows.json: No such file or directory"),
        (["--json", "."], "is not a regular file"),
        (["--layer", "n1h4000000w4000000c1d1k1"], "would have 1.6e+13 elements, expected at most 1.0e+12"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("compare", "--json", "rows.json", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("nhwconv: ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout.strip()
    assert os.listdir(tmp_path) == []


def test_a_layer_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(measure, "make_data", no_room)
    result = run("compare", "--layer", SMALL, "--json", str(tmp_path / "rows.json"))
    assert result.exit_code == 2
    assert result.stderr == f"nhwconv: layer {SMALL} does not fit into memory\n"
    assert os.listdir(tmp_path) == []


def test_an_unknown_option_exits_with_2() -> None:
    result = run("compare", "--strategy", "loop")
    assert result.exit_code == 2
    assert "No such option" in result.stderr


def test_nothing_compiled_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that is slow in its first two calls, as a compiled one may be, is timed as a fast one."""
    calls = []

    def fake(*_: object) -> object:
        def call() -> np.ndarray:
            calls.append(1)
            time.sleep(0.2 if len(calls) <= 3 else 0)  # the reference's call is the first of them
            return np.ones(3)

        return call

    monkeypatch.setattr(measure, "public_call", fake)
    comparison = Comparison(parse_layer(SMALL), "forward", ("tensordot",), np.dtype(np.float32))
    assert len(list(comparison.steps(0.01))) == comparison.step_count
    assert comparison.rows()[0].seconds < 0.1
    assert comparison.rows()[0].spread < 0.1


def test_csv_has_the_rows_of_json(tmp_path: Path) -> None:
    files = {form: tmp_path / f"rows.{form}" for form in ("json", "csv")}
    outputs = [word for form, file in files.items() for word in (f"--{form}", str(file))]
    result = run("compare", "--layer", SMALL, "--pass", "forward", "--seconds", "0.01", *outputs)
    assert result.exit_code == 0, result.output
    with files["csv"].open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert rows == [{k: str(v) for k, v in row.items()} for row in json.loads(files["json"].read_text())]


def test_measured_memory_is_the_calls_own(tmp_path: Path) -> None:
    """The reference pads x and copies windows: at least the padded x, at most all that its plan tells, and a little."""
    file = tmp_path / "rows.json"
    layer = "n4h40w40c32d32k3p1"
    result = run("compare", "--layer", layer, "--strategies", "tensordot", "--pass", "forward", "--seconds", "0.01",
                 "--json", str(file))  # fmt: skip
    assert result.exit_code == 0, result.output
    (row,) = json.loads(file.read_text())
    assert 4 * 42 * 42 * 32 * 4 < row["peak_bytes"] < row["workspace_bytes"] + 2**16


def test_differences_within_the_spread_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three strategies of which two overlap, and one that is clear."""
    times = {"loop": [1.0, 1.0, 1.5, 1.5, 1.5], "im2col": [1.2] * 5, "tensordot": [9.0] * 5}
    comparison = Comparison(parse_layer(SMALL), "forward", tuple(times), np.dtype(np.float32))
    assert comparison.undecided() == []
    for _ in comparison.steps(0.01):
        pass
    comparison.times.update(times)
    assert comparison.undecided() == ["loop", "im2col"]
    comparison.times["im2col"] = [8.0] * 5
    assert comparison.undecided() == []


# ------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_keeps_the_rounds_that_were_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = 0

    def interrupted(call: object, seconds: float) -> list[float]:
        nonlocal timed
        timed += 1
        if timed == 2 * measure.ROUNDS + 2:  # the second pass: one strategy has a round, the other has not
            raise KeyboardInterrupt
        return [0.001]

    monkeypatch.setattr(measure, "time_calls", interrupted)
    file = tmp_path / "rows.json"
    result = run("compare", "--layer", SMALL, "--strategies", "loop,tensordot", "--json", str(file))
    assert result.exit_code == 130
    assert "stopped" in result.stderr
    done = [("forward", "loop"), ("forward", "tensordot"), ("weight_grad", "loop")]
    assert [(row["pass"], row["strategy"]) for row in json.loads(file.read_text())] == done
    assert "weight_grad" in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_in_a_process(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "nhwconv.cli", "compare", "--layer", SMALL, "--strategies", "tensordot"]
    with subprocess.Popen(
        [*command, "--seconds", "2", "--json", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Where tests run in the background of a shell, they ignore Ctrl-C, and a child would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stderr is not None
        assert "forward" in child.stdout.readline()  # the first of three tables is out
        child.send_signal(signal.SIGINT)
        rest, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert error == "nhwconv: stopped: what is above was measured before\n"
    assert "input_grad" not in rest
    assert json.loads(file.read_text())[0]["pass"] == "forward"


# ---------------------------------------------------------------------------------------- processes


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


@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_without_the_extra_one_line_says_what_to_install(missing: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None; from nhwconv.cli.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"nhwconv: the command line needs {missing}: pip install nhwconv[compare]\n"


# ------------------------------------------------------------------------------------------- tune


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for what is tuned, and nothing remembered, before and after."""
    monkeypatch.setattr(choices, "folder", lambda: tmp_path / "tuning")
    monkeypatch.setenv("NHWCONV_TUNING", "write")
    choices.forget()
    yield tmp_path / "tuning"
    choices.forget()
    nc.ops.forget_plans()


def cells(result: Result) -> list[list[str]]:
    """The rows of tune's table."""
    return [line.split() for line in result.stdout.splitlines() if line.startswith(" n")]


def test_tune_keeps_the_fastest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and files say the same, and the planner obeys, though it would have chosen the other."""
    predicted = nc.plan("forward", rigged.X, rigged.W, padding=1).strategy
    winner = "loop" if predicted == "winograd" else "winograd"
    rigged.rig(monkeypatch.setattr, **{winner: rigged.FAST, predicted: rigged.SLOW})
    arguments = ("tune", "--layer", WIDE, "--pass", "forward", "--seconds", "0.02")
    for _ in range(2):  # the second time, too, it is the untuned choice that the winner is compared with
        result = run(*arguments)
        assert (result.exit_code, result.stderr) == (0, "")
        (row,) = cells(result)
        assert row[:3] == [WIDE, "forward", winner]
        assert row[4] == predicted
        assert float(row[5].removesuffix("x")) > 1.5
        assert result.stdout.endswith(f"kept in {folder}\n")
    assert nc.plan("forward", rigged.X, rigged.W, padding=1).strategy == winner
    assert choices.count() == 1


def test_tune_measures_every_pass_of_every_layer(folder: Path) -> None:
    """Where only one strategy can do it, the table says so."""
    result = run("tune", "--layer", SMALL, "--layer", WIDE, "--only", "n2", "--dtype", "float64", "--seconds", "0.01")
    assert result.exit_code == 0, result.output
    assert [row[:2] for row in cells(result)] == [[layer, pass_] for layer in (SMALL, WIDE) for pass_ in PASSES]
    assert [row[2:] for row in cells(result)[:3]] == [["loop", "-", "no", "other", "-"]] * 3
    assert choices.count() == 3


def test_tune_without_the_disk_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NHWCONV_TUNING", "read")
    result = run("tune", "--layer", WIDE, "--pass", "forward", "--seconds", "0.01")
    assert result.exit_code == 0
    assert result.stdout.endswith("not kept, because NHWCONV_TUNING is read\n")
    assert not folder.exists()


def test_ctrl_c_keeps_what_was_tuned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = 0

    def interrupted(call: object, seconds: float) -> list[float]:
        nonlocal timed
        timed += 1
        if timed == 2 * measure.ROUNDS + 2:
            raise KeyboardInterrupt
        return [0.001]

    monkeypatch.setattr(tuning, "time_calls", interrupted)
    result = run("tune", "--layer", WIDE)
    assert result.exit_code == 130
    assert result.stderr == f"nhwconv: stopped: what is above was measured before, and kept in {folder}\n"
    assert [row[1] for row in cells(result)] == ["forward"]
    assert choices.count() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "resnet5"], 'did you mean "resnet50"?'),
        (["--layer", "n8h56"], '"w" is missing'),
        (["--pass", "weight-grad"], 'there is no pass "weight-grad"'),
        (["--dtype", "int8"], 'there is no dtype "int8"'),
        (["--seconds", "0"], "--seconds is 0.0, expected more than 0"),
        (["--only", "zzz"], 'no layer has "zzz" in its name'),
    ],
)
def test_bad_input_of_tune(arguments: list[str], message: str, folder: Path) -> None:
    result = run("tune", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.startswith("nhwconv: ")
    assert result.stderr.count("\n") == 1
    assert not folder.exists()


def test_tune_where_nothing_can_be_kept(tmp_path: Path) -> None:
    """It is told before anything is measured."""
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "below"
    done = process("tune", NHWCONV_CACHE_DIR=str(place), NHWCONV_TUNING="write")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"nhwconv: tuning cannot be kept in {place}/nhwconv/tuning: Not a directory\n"


@pytest.mark.parametrize("command", ["tune", "compare"])
def test_an_unknown_value_in_the_environment(command: str) -> None:
    done = process(command, NHWCONV_TUNING="raed")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'nhwconv: {command}: NHWCONV_TUNING is "raed", expected one of off, read, write\n'


def test_tune_and_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(tuning, "make_data", no_room)
    result = run("tune", "--layer", WIDE)
    assert result.exit_code == 2
    assert result.stderr == f"nhwconv: layer {WIDE} does not fit into memory\n"


# ------------------------------------------------------------------------------------ other commands


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


def test_clear_cache_deletes_what_was_tuned_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "nhwconv" / "tuning"
    folder.mkdir(parents=True)
    for name in ("a.json", "b.json", "c.damaged"):
        (folder / name).touch()
    where = {"NHWCONV_CACHE_DIR": str(tmp_path)}
    assert "tuning" not in process("clear-cache", **where).stdout
    assert f"tuning        {folder}: 2 entries, 0.0 MB\n" in process("info", **where).stdout
    done = process("clear-cache", "--tuning", **where)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"deleted 2 tuned choices from {folder}\n")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("compare --workload vg", ["vgg16"]),
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
