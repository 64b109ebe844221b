"""Tuned choices on disk: what was kept is found by every process, and whatever happens to the files is a miss."""

import json
import shutil

import numba
import pytest

import child
import nhwconv as nc
from nhwconv import choices
from nhwconv.runtime import files, machine
from rigged import W, X

PROBLEM = nc.plan("forward", X, W, padding=1).problem
OTHERS = [
    ("weight_grad", PROBLEM),
    ("forward", nc.plan("forward", X, W).problem),
    ("forward", nc.plan("forward", X, W, padding=1, dtype="float64").problem),
    ("forward", nc.plan("forward", (3, *X[1:]), W, padding=1).problem),
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty cache folder, nothing remembered, before and after."""
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NHWCONV_TUNING", "write")
    choices.forget()
    files._told.clear()
    yield tmp_path / "nhwconv" / "tuning"
    choices.forget()
    files._told.clear()


def keep(strategy="loop", pass_="forward", problem=PROBLEM):
    choices.keep(pass_, problem, strategy, {"loop": 0.25, "winograd": 0.5})


def found(pass_="forward", problem=PROBLEM):
    """Look as a new process would."""
    choices.forget()
    return choices.lookup(pass_, problem)


def only_file(folder):
    (file,) = folder.iterdir()
    return file


def test_round_trip(place):
    """What was kept is found, by its pass and problem alone; the last one stays, and nothing temporary remains."""
    assert found() is None
    assert not place.exists()
    keep("loop")
    assert found() == "loop"
    keep("winograd")
    assert found() == "winograd"
    assert [found(*other) for other in OTHERS] == [None] * 4
    assert only_file(place).suffix == ".json"
    record = json.loads(only_file(place).read_text())
    assert record["seconds"] == {"loop": 0.25, "winograd": 0.5}
    assert record["key"]["problem"] == str(PROBLEM)


def test_each_pass_and_problem_has_its_own_file(place):
    for pass_, problem in OTHERS:
        keep("winograd", pass_, problem)
    keep("loop")
    assert [found(*other) for other in OTHERS] == ["winograd"] * 4
    assert found() == "loop"
    assert choices.count() == len(list(place.iterdir())) == 5


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (choices, "__version__", "99.0"),
        (numba, "__version__", "99.0"),
        (machine, "cpu_model", lambda: "another"),
        (machine, "target", lambda: ("another",)),
    ],
)
def test_another_machine_or_version_is_another_file(module, name, value, monkeypatch):
    keep()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            choices._here.cache_clear()
            assert found() is None
    finally:
        choices._here.cache_clear()
    assert found() == "loop"


def test_a_process_looks_once(place):
    """What another process tunes later changes no choice, and so no bits, of a running one."""
    assert found() is None
    keep()
    choices._tuned.clear()  # so it is another's
    assert choices.lookup("forward", PROBLEM) is None
    assert found() == "loop"
    shutil.rmtree(place)
    assert choices.lookup("forward", PROBLEM) == "loop"


def test_modes(place, monkeypatch):
    """off neither reads nor writes, read does not write; both remember what this process tuned."""
    for mode in ("off", "read"):
        monkeypatch.setenv("NHWCONV_TUNING", mode)
        keep()
        assert choices.lookup("forward", PROBLEM) == "loop"
        assert found() is None
        assert not place.exists()
    for usual in ("write", ""):
        monkeypatch.setenv("NHWCONV_TUNING", usual)
        keep("winograd")
        assert found() == "winograd"
    monkeypatch.delenv("NHWCONV_TUNING")
    keep()
    for mode, expected in (("read", "loop"), ("off", None), ("write", "loop")):
        monkeypatch.setenv("NHWCONV_TUNING", mode)
        assert found() == expected


def test_an_unknown_mode_is_refused_by_name(monkeypatch):
    """By everything that would look, before any work; what needs no choice works on."""
    monkeypatch.setenv("NHWCONV_TUNING", "raed")
    nc.ops.forget_plans()
    message = 'NHWCONV_TUNING is "raed", expected one of off, read, write'
    with pytest.raises(ValueError, match=f"plan: {message}"):
        nc.plan("forward", X, W)
    with pytest.raises(ValueError, match=f"plan: {message}"):
        nc.plan("forward", X, W, strategy=("loop", "winograd"))
    with pytest.raises(ValueError, match=f"tune: {message}"):
        nc.tune("forward", X, W)
    assert nc.plan("forward", X, W, strategy="loop").strategy == "loop"


def record(**changes):
    """A sound file for the problem, but for these changes."""
    body = {"key": choices._key("forward", PROBLEM), "strategy": "loop", "seconds": {}, **changes}
    return json.dumps({**body, "sha256": choices._hash(body)}).encode()


DAMAGE = {
    "emptied": lambda data: b"",
    "truncated to one byte": lambda data: data[:1],
    "truncated by half": lambda data: data[: len(data) // 2],
    "truncated by the last byte": lambda data: data[:-1],
    "longer": lambda data: data + b"}",
    "another winner": lambda data: data.replace(b'"loop"', b'"winograd"'),
    "a digit of the times": lambda data: data.replace(b"0.25", b"0.26"),
    "no checksum": lambda data: b'{"strategy": "loop"}',
    "binary": lambda data: bytes(range(256)),
    "foreign JSON": lambda data: b"[1, 2, 3]",
    "foreign text": lambda data: b"hello\n",
    "deep": lambda data: b"[" * 100_000,
    "another problem's": lambda data: record(key=choices._key("weight_grad", PROBLEM)),
    "not for auto": lambda data: record(strategy="tensordot"),
    "no name": lambda data: record(strategy=["loop"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_set_aside_with_one_warning(damage, place):
    """Nothing raises; the planner goes on untuned, and tuning anew repairs it."""
    keep()
    file = only_file(place)
    damaged = DAMAGE[damage](file.read_bytes())
    file.write_bytes(damaged)
    with pytest.warns(RuntimeWarning, match=r"damaged file of tuning.*it is now .*\.damaged") as caught:
        assert found() is None
    assert len(caught) == 1
    assert only_file(place) == file.with_suffix(".damaged")
    assert only_file(place).read_bytes() == damaged
    assert choices.count() == 0
    assert found() is None  # without a warning
    keep("winograd")
    assert found() == "winograd"


def test_a_sound_record_is_what_the_damaged_ones_are_compared_with(place):
    keep()
    only_file(place).write_bytes(record())
    assert found() == "loop"


def test_a_folder_in_the_place_of_a_file_is_a_miss(place):
    """Reading fails, and so does writing: one warning, and this process remembers."""
    keep()
    file = only_file(place)
    file.unlink()
    file.mkdir()
    assert found() is None
    with pytest.warns(RuntimeWarning, match="cannot keep what was tuned"):
        keep("winograd")
    assert choices.lookup("forward", PROBLEM) == "winograd"
    assert list(place.iterdir()) == [file]  # nothing temporary remains


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
    """Below a regular file no folder can be made, by root neither."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert found() is None
    with pytest.warns(RuntimeWarning, match="set NHWCONV_CACHE_DIR") as caught:
        keep()
    assert len(caught) == 1
    keep("winograd", "weight_grad")  # a second warning would be an error
    assert choices.lookup("forward", PROBLEM) == "loop"
    assert choices.lookup("weight_grad", PROBLEM) == "winograd"
    with pytest.raises(OSError, match="Not a directory"):
        choices.check_folder()


def test_clear(place):
    """Everything goes, damaged files too, and the choices in memory."""
    keep()
    (place / "x.damaged").touch()
    choices.clear()
    assert not place.exists()
    assert choices.lookup("forward", PROBLEM) is None
    choices.clear()


def test_another_process_finds_it(place, tmp_path):
    """And plans by it; under off it does not."""
    keep("loop")
    code = f"import nhwconv as nc; print(nc.plan('forward', {X}, {W}, padding=1).reason)"
    where = {"NHWCONV_CACHE_DIR": tmp_path}
    measured = "it was measured to be the fastest here by nhwconv.tune\n"
    assert child.run(code, **where, NHWCONV_TUNING="read") == measured
    assert child.run(code, **where, NHWCONV_TUNING="") == measured
    assert child.run(code, **where, NHWCONV_TUNING="off") != measured


def test_eight_processes_tune_at_once(place, tmp_path):
    """Four winners each for the same problems: files are whole at any time, and each names one of the winners."""
    code = (
        "import sys, rigged\n"
        "for images in (1, 2, 3):\n"
        "    for _ in range(5):\n"
        "        assert rigged.race(sys.argv[1], images) == sys.argv[1]\n"
    )
    where = {"NHWCONV_CACHE_DIR": tmp_path, "NHWCONV_TUNING": "write"}
    running = [child.start(code, ("loop", "winograd")[i % 2], **where) for i in range(8)]
    results = [child.finish(process) for process in running]
    assert results == [(0, "", "")] * 8  # a damaged file would be a warning, and so an error
    assert sorted(file.suffix for file in place.iterdir()) == [".json"] * 3
    for images in (1, 2, 3):
        problem = nc.plan("forward", (images, *X[1:]), W, padding=1).problem
        assert found("forward", problem) in ("loop", "winograd")
