"""The command compare: what it prints, what it writes, how it ends."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

import nhwconv as nc
from clock import Clock
from command import run
from nhwconv.cli import measure
from nhwconv.cli.cases import Case
from nhwconv.cli.measure import Comparison
from nhwconv.cli.roofline import Roofline
from nhwconv.networks import network
from nhwconv.problem import PASSES
from nhwconv.runtime import machine
from nhwconv.strategies import REGISTRY
from nhwconv.workloads import parse_layer
from pretend import pretend

SMALL = "n2h9w8c4d6k3p1"
KEYS = (
    "layer", "pass", "strategy", "dtype", "network", "count", "seconds", "spread", "median", "cold", "gflops",
    "peak_fraction", "roofline_fraction", "error", "workspace_bytes", "peak_bytes", "compile_seconds", "chosen",
)  # fmt: skip
BOUND = {"float32": 1e-5, "float64": 1e-13}  # the package's promise on standard-normal data


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
        assert (row["network"], row["count"], row["cold"]) == ("", 1, None)
        assert row["seconds"] > 0
        assert row["spread"] >= 0
        assert row["gflops"] == pytest.approx(problem.flops / row["seconds"] / 1e9)
        assert 0 < row["error"] < BOUND["float32"]
        assert row["seconds"] <= row["median"] <= row["seconds"] + row["spread"]
        assert row["peak_fraction"] > 0
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
    assert re.search(r"^100% is \d+ GFLOP/s of float64 and \d+ GB/s, measured with \d+ threads?$", lines[-1])
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
        (["--network", "resnet81"], 'there is no network "resnet81", expected one of lenet5'),
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time that passes only where a test says so, on a machine whose limits are known."""
    monkeypatch.setattr(measure.roofline, "measure", lambda dtype: Roofline(1, 1e9, 1e9))
    return Clock(monkeypatch.setattr)


def test_nothing_compiled_is_timed(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """A function that is slow in its first two calls, as a compiled one may be, is timed as a fast one."""
    calls = []

    def fake(*_: object) -> object:
        def call() -> np.ndarray:
            calls.append(1)
            clock.pass_(0.2 if len(calls) <= 3 else 0.001)  # the reference's call is the first of them
            return np.ones(3)

        return call

    monkeypatch.setattr(measure, "public_call", fake)
    comparison = Comparison(Case(parse_layer(SMALL), "forward"), ("tensordot",), np.dtype(np.float32))
    assert len(list(comparison.steps(0.01))) == comparison.step_count
    (row,) = comparison.rows()
    assert (row.seconds, row.spread) == (pytest.approx(0.001), pytest.approx(0))


def test_cold_calls_have_other_arrays_and_keep_their_results(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """A call is cold where other arrays were used since; how long either takes is told apart."""
    used: list[int] = []
    alive: list[int] = []

    class Result(np.ndarray):
        def __del__(self) -> None:
            alive.append(-1)

    def fake(problem: object, pass_: object, data: measure.Data, strategy: str) -> object:
        def call() -> np.ndarray:
            cold = id(data.w) not in used[-1:]
            clock.pass_(0.003 if cold else 0.001)
            used.append(id(data.w))
            alive.append(1)
            return np.ones(3).view(Result)

        return call

    monkeypatch.setattr(measure, "public_call", fake)
    monkeypatch.setattr(measure, "other_data", lambda data: [measure.Data(*(a.copy() for a in data)) for _ in range(5)])
    comparison = Comparison(Case(parse_layer(SMALL), "forward"), ("tensordot",), np.dtype(np.float32), cold=True)
    assert len(list(comparison.steps(0.01))) == comparison.step_count
    (row,) = comparison.rows()
    assert (row.seconds, row.cold) == (pytest.approx(0.001), pytest.approx(0.003))
    assert max(np.cumsum(alive)) >= 5


def test_cold_times_stand_in_the_table_and_in_files(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ("compare", "--layer", SMALL, "--strategies", "loop,tensordot", "--pass", "forward", "--cold")
    result = run(*arguments, "--seconds", "0.01", "--json", str(file))
    assert result.exit_code == 0, result.output
    head = next(line.split() for line in result.stdout.splitlines() if line.startswith(" strategy"))
    assert head[:5] == ["strategy", "ms", "spread", "cold", "GFLOP/s"]
    assert all(row["cold"] > 0 for row in json.loads(file.read_text()))
    for row in json.loads(file.read_text()):
        line = next(line.split() for line in result.stdout.splitlines() if line.startswith(f" {row['strategy']}"))
        assert float(line[3]) == pytest.approx(1e3 * row["cold"], rel=1e-3, abs=1e-4)


def test_csv_has_the_rows_of_json(tmp_path: Path) -> None:
    files = {form: tmp_path / f"rows.{form}" for form in ("json", "csv")}
    outputs = [word for form, file in files.items() for word in (f"--{form}", str(file))]
    result = run("compare", "--layer", SMALL, "--pass", "forward", "--seconds", "0.01", *outputs)
    assert result.exit_code == 0, result.output
    with files["csv"].open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert rows == [
        {k: "" if v is None else str(v) for k, v in row.items()} for row in json.loads(files["json"].read_text())
    ]


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
    comparison = Comparison(Case(parse_layer(SMALL), "forward"), tuple(times), np.dtype(np.float32))
    assert comparison.undecided() == []
    for _ in comparison.steps(0.01):
        pass
    comparison.times.update(times)
    assert comparison.undecided() == ["loop", "im2col"]
    comparison.times["im2col"] = [8.0] * 5
    assert comparison.undecided() == []


# ------------------------------------------------------------------------------------------ threads


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize("arguments", [("--threads", "1"), ()])
def test_blas_has_as_many_threads_as_numba(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """While strategies run, and no longer."""
    found: set[tuple[int, ...]] = set()
    public_call = measure.public_call

    def asking(*arguments: object) -> object:
        call = public_call(*arguments)  # type: ignore[arg-type]

        def asked() -> object:
            found.add((machine.threads(), *blas_threads()))
            return call()

        return asked

    monkeypatch.setattr(measure, "public_call", asking)
    before = machine.threads(), blas_threads()
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        result = run("compare", "--layer", SMALL, "--strategies", "loop,im2col", "--seconds", "0.01", *arguments)
        assert blas_threads() <= {3}
    assert result.exit_code == 0, result.output
    wanted = 1 if arguments else before[0]
    assert found <= {(wanted, wanted), (wanted,)}  # macOS's BLAS tells nothing
    assert (machine.threads(), blas_threads()) == before


# ------------------------------------------------------------------------------------------ networks


def sums(output: str, title: str) -> dict[str, list[float]]:
    """The rows of the table with a network's sums."""
    lines = output[output.index(f"\n{title}\n") :].splitlines()[5:]  # below the rule
    rows = [line.split() for line in takewhile(str.strip, lines)]
    return {name: [float(number) for number in numbers] for name, *numbers in rows}


def test_a_network_is_the_sum_of_its_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each as often as it occurs; the first without an input gradient; cold calls by themselves."""
    hot = {"tensordot": 0.001, "loop": 0.002, "winograd": 0.0005}
    pretend(monkeypatch.setattr, lambda problem, pass_, strategy, cold: hot[strategy] * (3 if cold else 1))
    file = tmp_path / "rows.json"
    result = run("compare", "--network", "resnet18", "--strategies", "loop,tensordot,winograd", "--cold", "--seconds",
                 "0.01", "--json", str(file))  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    assert {row["network"] for row in rows} == {"resnet18"}
    occurring = {part.layer.name: part.count for part in network("resnet18")}
    assert {row["layer"]: row["count"] for row in rows} == occurring
    assert sum(occurring.values()) == 20
    done = sum(row["count"] for row in rows if row["strategy"] == "winograd")
    assert 0 < done < 59
    for title, factor in (("resnet18 altogether", 1), ("resnet18 altogether, cold", 3)):
        table = sums(result.stdout, title)
        assert table["loop"] == pytest.approx([40 * factor, 40 * factor, 38 * factor, 118 * factor], rel=1e-3)
        assert table["tensordot"] == pytest.approx([20 * factor, 20 * factor, 19 * factor, 59 * factor], rel=1e-3)
        assert table["fastest"][3] == pytest.approx(factor * (0.5 * done + 1 * (59 - done)), rel=1e-3)
    lacking = sum(len(PASSES) - (i == 0) for i in range(len(occurring))) - sum(
        r["strategy"] == "winograd" for r in rows
    )
    assert f"those missing in brackets: winograd ({lacking})" in " ".join(result.stdout.split())


LOG = f"""something else
nhwconv,forward,{SMALL},float32,loop,12.5
nhwconv,weight_grad+input_grad,{SMALL},float32,loop+loop,30.0
nhwconv,forward,{SMALL},float32,loop,11.5
nhwconv,forward,n1h5w5c1d1k3p0x1x0x1,float64,loop,2.5
"""


def test_the_calls_of_a_log_are_compared_and_summed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch.setattr, lambda problem, pass_, strategy, cold: 0.002)
    log = tmp_path / "net.log"
    log.write_text(LOG)
    file = tmp_path / "rows.json"
    result = run("compare", "--layers-from", str(log), "--strategies", "loop", "--seconds", "0.01", "--json", str(file))
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    assert [(row["layer"], row["pass"], row["count"]) for row in rows] == [
        (SMALL, "forward", 2), (SMALL, "weight_grad", 1), (SMALL, "input_grad", 1),
    ]  # fmt: skip
    assert sums(result.stdout, "net.log altogether")["loop"] == pytest.approx([4, 2, 2, 8])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("hello\n", "it has no line of a call; NHWCONV_VERBOSE=1 writes them"),
        (LOG, "it has no call in float16, only in float32, float64; see --dtype"),
        ("\nnhwconv,forward,n1\n", 'line 2: "nhwconv,forward,n1" is not of the form nhwconv,pass,layer,dtype,'),
    ],
)
def test_logs_that_cannot_be_used(text: str | None, message: str, tmp_path: Path) -> None:
    log = tmp_path / "net.log"
    if text is not None:
        log.write_text(text)
    for command in ("compare", "tune"):
        result = run(command, "--layers-from", str(log), "--dtype", "float16")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"nhwconv: --layers-from {log}: {message}")
        assert result.stderr.count("\n") == 1


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
