"""The asv suite and its tools: written-out networks, what counts as noise, and the table of a comparison."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from asv.config import Config

from nhwconv.networks import network

ROOT = Path(__file__).parents[1]
RECORDED = ("d1fab6bf", "87c0eea5")


def load(path: str) -> ModuleType:
    """Import a file that is in no package here; the suite's files import one another."""
    spec = importlib.util.spec_from_file_location(path.removesuffix(".py").replace("/", "."), ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the suite importable; what it sets before Numba is imported is taken back."""
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    monkeypatch.setenv("NHWCONV_TUNING", "off")
    monkeypatch.syspath_prepend(ROOT)


def test_written_out_networks_are_the_packages(suite: None) -> None:
    module = importlib.import_module("benchmarks.networks")
    for name, written in module.NETWORKS.items():
        expected = [
            (p.h, p.c, p.d, p.kh, p.stride[0], p.padding[0], p.groups, part.count)
            for part in network(name)
            for p in [part.layer]
        ]
        assert sorted(written) == sorted(expected)
        assert written[0] == expected[0]  # the images, whose gradient nobody needs


def test_a_step_calls_every_convolution_and_the_first_without_an_input_gradient(
    suite: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("benchmarks.networks")
    monkeypatch.setattr(module, "IMAGES", 1)
    step = module._Step()
    step.prepare("convnext", None)
    convolutions = sum(part.count for part in network("convnext"))
    assert [y.shape for y in step.forward()] == [convolution.dy.shape for convolution in step.convolutions]
    gradients = step.backward()
    assert len(gradients) == convolutions
    assert [g.dx is None for g in gradients] == [False] * (convolutions - 1) + [True]
    assert len({id(c.w) for c in step.convolutions}) == convolutions


@pytest.mark.parametrize("door", ["function", "backward"])
def test_doors_open(suite: None, door: str) -> None:
    doors = importlib.import_module("benchmarks.overhead").Doors()
    doors.setup(door)
    doors.time_call(door)


def test_a_door_that_is_not_there_is_skipped(suite: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    doors = importlib.import_module("benchmarks.overhead").Doors()
    for door in ("torch", "torch forward and backward"):
        with pytest.raises(NotImplementedError):
            doors.setup(door)


def test_thresholds_are_the_largest_differences_by_class() -> None:
    noise = load("tools/noise.py")
    first = {("layers.Time.time_a", 0): 1.0, ("layers.Time.time_a", 1): 2.0, ("overhead.Doors.time_call", 0): 1.0}
    second = {("layers.Time.time_a", 0): 1.1, ("layers.Time.time_b", 0): 9.0, ("overhead.Doors.time_call", 0): 1.01}
    third = {**first, ("layers.Time.time_a", 0): 0.9}
    found = noise.thresholds([first, second, third])
    assert found == {r"^layers\.Time\.": 0.23, r"^overhead\.Doors\.": noise.LEAST}
    assert all(
        re.search(pattern, key) for pattern, key in zip(found, ("layers.Time.x", "overhead.Doors.x"), strict=True)
    )


def test_values_are_read_from_asvs_files() -> None:
    """Those that are recorded here: every machine's, every commit's last."""
    found = load("tools/noise.py").values(ROOT / "benchmarks" / "results")
    assert all(value > 0 for (name, _), value in found.items() if ".time_" in name)
    assert ("layers.Time.time_forward", 0) in found


TEXT = """
All benchmarks:

| Change   | Before [d1fab6bf] <a>   | After [87c0eea5] <b>   | Ratio   | Benchmark (Parameter)                  |
|----------|-------------------------|------------------------|---------|----------------------------------------|
| +        | 4.37±0.03ms             | 5.86±0.5ms             | 1.34    | layers.Time.time_forward('a', 'auto')  |
|          | 1.33±0.05ms             | 1.74±0.1ms             | ~1.32   | layers.Time.time_forward('b', 'auto')  |
| -        | 2.00±0.05ms             | 1.00±0.1ms             | 0.50    | layers.Time.time_forward('c', 'auto')  |
| !        | 2.00±0.05ms             | failed                 | n/a     | layers.Time.time_forward('d', 'auto')  |
"""


def test_a_table_says_what_changed_beyond_noise() -> None:
    tool = load("tools/bench_table.py")
    found = tool.rows(TEXT)
    assert [row.mark for row in found] == ["+", "", "-", "!"]
    text = tool.markdown(found, "d1fab6bf", "87c0eea5", 1.25)
    assert text.startswith("### Benchmarks: 1 fails now, 1 slower, 1 faster\n")
    assert "`87c0eea5` against `d1fab6bf`, 4 benchmarks; changes by more than 1.25 times" in text
    assert "| 1.34 | 4.37±0.03ms | 5.86±0.5ms | `layers.Time.time_forward('a', 'auto')` |" in text
    assert "('b', " not in text
    assert text.index("#### Fails now") < text.index("#### Slower") < text.index("#### Faster")
    assert tool.markdown(found[1:2], "a", "b", 1.1).startswith("### Benchmarks: nothing changed\n")


def test_recorded_commits_can_be_compared() -> None:
    """From asv's own output, so that a change of its form is noticed."""
    command = [sys.executable, str(ROOT / "tools" / "bench_table.py"), "--machine", "emerald-rapids-2cores"]
    done = subprocess.run([*command, *RECORDED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^### Benchmarks: .*\d+ faster", done.stdout)
    assert re.search(r"^\| 0\.\d+ \| .*ms \| .*ms \| `layers\.Time\.", done.stdout, re.MULTILINE)


def test_the_configuration_pins_what_benchmarks_run_on() -> None:
    conf = Config.load(str(ROOT / "asv.conf.json"))
    assert {name: len(versions) for name, versions in conf.matrix["req"].items()} == {"numpy": 1, "numba": 1}
    names = [
        name for name in json.loads((ROOT / "benchmarks" / "results" / "benchmarks.json").read_text()) if "." in name
    ]
    assert any(re.search(pattern, name) for pattern in conf.regressions_thresholds for name in names)
    assert conf.show_commit_url.startswith(conf.project_url)


def test_a_machine_is_kept_with_all_that_asv_finds_out_and_stays_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = load("tools/machine.py")
    kept = tmp_path / ".asv-machine.json"
    monkeypatch.setattr("asv.machine.MachineCollection.get_machine_file_path", lambda: str(kept))
    monkeypatch.setattr("sys.argv", ["machine.py", "abacus-2cores"])
    module.main()
    written = json.loads(kept.read_text(encoding="utf-8"))
    assert set(written["abacus-2cores"]) == {"machine", "os", "num_cpu", "arch", "cpu", "ram"}
    assert written["abacus-2cores"]["machine"] == "abacus-2cores"
    written["abacus-2cores"]["cpu"] = "beads"
    kept.write_text(json.dumps(written), encoding="utf-8")
    module.main()
    assert json.loads(kept.read_text(encoding="utf-8")) == written
