"""Peers in processes of their own: what they answer, and what is said where they do not."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numba
import numpy as np
import pytest
from typer.testing import CliRunner, Result

import peer
from nhwconv.cli import engines
from nhwconv.cli.app import app
from nhwconv.cli.engines import PEERS, Engine, EngineError, EngineProcess, first_call_in_new_process
from nhwconv.problem import PASSES, Pass
from nhwconv.timing import public_call
from nhwconv.workloads import make_data, parse_layer

LAYER = "n2h9w8c4d6k3s2p1"
GROUPED = "n2h9w8c4d6k3x2p1x0l2x1g2"
PROBLEM = parse_layer(LAYER).problem()

#: Those of the real peers that are here; the stand-in always is.
HERE = [*(name for name, engine in PEERS.items() if engine.installed()), "honest"]


def compare(monkeypatch: pytest.MonkeyPatch, build: Callable[..., object], *arguments: str) -> Result:
    monkeypatch.setitem(engines.PEERS, "honest", Engine("numpy", "honest", build))
    return CliRunner().invoke(
        app, ["compare", "--layer", LAYER, "--strategies", "loop", "--seconds", "0.02", *arguments]
    )


@pytest.fixture(scope="module", params=HERE)
def engine(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    """Each of them, in one process for all that it is asked here."""
    build = peer.honest if request.param == "honest" else PEERS[request.param].build
    with EngineProcess(build) as process:
        yield process


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pass_", PASSES)
def test_a_peer_computes_what_the_package_computes(engine: EngineProcess, pass_: Pass, dtype: type) -> None:
    """On the same numbers, with every option: a layer, and a grouped and dilated one."""
    for notation in (LAYER, GROUPED):
        problem = parse_layer(notation).problem(dtype)
        result, compiling = engine.begin(problem, pass_)
        exact = public_call(problem, pass_, make_data(problem), "tensordot")()
        assert (result.shape, result.dtype) == (exact.shape, exact.dtype)
        # sums of at most 80 terms, each side's rounding a random walk
        assert np.linalg.norm(result - exact) < 2 * 9 * np.finfo(dtype).eps * np.linalg.norm(exact)
        assert compiling >= 0
    for times in (engine.time(0.02), engine.time_cold(0.02)):
        assert len(times) > 0
        assert all(seconds > 0 for seconds in times)


def test_the_first_call_and_cold_calls_are_told_apart() -> None:
    """By a clock in the peer's process that only its calls move."""
    with EngineProcess(peer.honest) as engine:
        assert engine.begin(PROBLEM, "forward")[1] == pytest.approx(peer.FIRST - peer.LATER)
        assert engine.time(0.02) == pytest.approx([peer.LATER] * 19)  # and one before, not counted
        assert engine.time_cold(0.2) == pytest.approx([2 * peer.LATER] * 100)


def test_a_peer_computes_with_our_number_of_threads_and_so_does_its_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.machine, "threads", lambda: 1)
    with EngineProcess(peer.thread_counts) as engine:
        assert set(engine.begin(PROBLEM, "forward")[0].tolist()) == {1}


def test_a_peer_has_one_process_of_its_own_and_our_number_of_threads() -> None:
    with EngineProcess(peer.process_id) as engine:
        (process, threads), _ = engine.begin(PROBLEM, "forward")
        assert process != os.getpid()
        assert threads == numba.get_num_threads()
        assert engine.begin(PROBLEM, "weight_grad")[0] == (process, threads)


def test_what_a_peer_cannot_do_is_one_line_and_the_next_problem_goes_on() -> None:
    with EngineProcess(peer.refusing) as engine:
        with pytest.raises(EngineError, match=r"^no gradients here$"):
            engine.begin(PROBLEM, "weight_grad")
        assert engine.begin(PROBLEM, "forward")[0].shape == PROBLEM.y_shape


def test_a_peer_that_dies_says_how() -> None:
    with EngineProcess(peer.dying) as engine:
        for _ in range(2):
            with pytest.raises(EngineError, match="its process ended with exit code 7"):
                engine.begin(PROBLEM, "forward")


def test_a_first_call_with_nothing_compiled_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a folder of its own, whatever this machine's cache holds: the reference compiles nothing, the loop does."""
    problem = parse_layer("n1h8w8c8d8k3").problem()
    for strategy in ("tensordot", "loop"):
        folder = tmp_path / strategy
        folder.mkdir()
        monkeypatch.setattr(engines.tempfile, "TemporaryDirectory", lambda folder=folder: nullcontext(str(folder)))
        assert first_call_in_new_process(problem, "forward", strategy) >= 0
        kernels = [file for file in folder.rglob("*") if file.is_file()]
        assert bool(kernels) == (strategy == "loop")


# ------------------------------------------------------------------------------------- on the command line


def test_a_peer_gets_rows_like_a_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    result = compare(monkeypatch, peer.honest, "--against", "honest", "--json", str(file))
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    assert [(row["pass"], row["strategy"]) for row in rows] == [(p, n) for p in PASSES for n in ("loop", "honest")]
    for row in rows[1::2]:
        assert row["seconds"] > 0
        assert 0 < row["error"] < 1e-6
        assert row["compile_seconds"] == pytest.approx(peer.FIRST - peer.LATER)
        assert (row["workspace_bytes"], row["peak_bytes"], row["chosen"]) == (None, None, False)
    assert "\nhonest" in result.stdout.replace("\n honest", "\nhonest")


def test_a_peer_without_room_for_cold_calls_is_a_line_below_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the row of its hot calls."""
    result = compare(monkeypatch, peer.forgetful, "--against", "honest", "--pass", "forward", "--cold")
    assert result.exit_code == 0, result.output
    assert "\nhonest: no room\n" in result.stdout
    assert "\n honest " in result.stdout


@pytest.mark.parametrize(
    ("build", "why"), [(peer.refusing, "no gradients here"), (peer.dying, "its process ended with exit code 7")]
)
def test_a_peer_that_fails_is_a_line_below_the_table(
    build: Callable[..., object], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = compare(monkeypatch, build, "--against", "honest", "--pass", "weight_grad")
    assert result.exit_code == 0, result.output
    assert f"\nhonest: {why}\n" in result.stdout
    assert "\n loop " in result.stdout


def test_a_missing_peer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.PEERS, "jax", Engine("no_such_module", "jax", peer.honest))
    result = compare(monkeypatch, peer.honest, "--against", "honest,jax", "--json", str(tmp_path / "rows.json"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "nhwconv: --against jax: no_such_module is not installed: pip install nhwconv[jax]\n"
    assert os.listdir(tmp_path) == []


def test_an_unknown_peer_suggests_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare(monkeypatch, peer.honest, "--against", "troch")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith('did you mean "torch"?\n')
