"""The command tune: what it measures, what it keeps, how it ends."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import Result

import nhwconv as nc
import rigged
from command import process, run
from nhwconv import choices, tuning
from nhwconv.cli import measure
from nhwconv.problem import PASSES

SMALL = "n2h9w8c4d6k3p1"
WIDE = "n2h12w12c64d64k3p1"  # rigged.X and rigged.W


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
        assert float(row[5].removesuffix("x")) >= 1
        assert result.stdout.endswith(f"kept in {folder}\n")
    assert nc.plan("forward", rigged.X, rigged.W, padding=1).strategy == winner
    assert choices.count() == 1


def test_tune_measures_every_pass_of_every_layer(folder: Path) -> None:
    """Where only one strategy can do it, the table says so."""
    layers = "n2h9w8c4d1k3p1", WIDE  # one channel of y is too few for winograd, however short vectors are
    words = [word for layer in layers for word in ("--layer", layer)]
    result = run("tune", *words, "--only", "n2", "--dtype", "float64", "--seconds", "0.01")
    assert result.exit_code == 0, result.output
    assert [row[:2] for row in cells(result)] == [[layer, pass_] for layer in layers for pass_ in PASSES]
    assert [row[2:] for row in cells(result)[:3]] == [["loop", "-", "no", "other", "-"]] * 3
    assert choices.count() == 3


def test_tune_takes_the_layers_of_networks_and_of_logs(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "net.log"
    log.write_text(f"nhwconv,input_grad,{SMALL},float64,loop,3.5\n")
    result = run("tune", "--layers-from", str(log), "--dtype", "float64", "--seconds", "0.01")
    assert result.exit_code == 0, result.output
    assert [row[:2] for row in cells(result)] == [[SMALL, "input_grad"]]
    result = run("tune", "--network", "lenet5", "--only", "1-6", "--seconds", "0.01")
    assert result.exit_code == 0, result.output
    lines = [line.split()[:2] for line in result.stdout.splitlines() if line.startswith(" lenet5")]
    assert lines == [["lenet5.5x5.1-6@28", pass_] for pass_ in ("forward", "weight_grad")]


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
