"""Compiled code on disk: what was saved is loaded, and whatever happens to the files is a miss, never wrong code."""

import compileall
import os
import pickle
import re
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

import child
import faults
import nhwconv
from nhwconv.runtime import files
from nhwconv.runtime import store as module
from nhwconv.runtime.store import Store, cache_folder, clear_cache

DATA = {"machine code": bytes(range(256)) * 40}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store in a folder of its own."""
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(files, "_told", set())
    return Store("nhwconv.some.body", {"parallel": True})


def only_file(folder):
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) == 1
    return files[0]


def test_round_trip(store, tmp_path):
    """What was saved is loaded, by its key alone; nothing temporary remains."""
    assert store.load(("signature", "cpu")) is None
    store.save(("signature", "cpu"), DATA)
    assert store.load(("signature", "cpu")) == DATA
    assert store.load(("signature", "another cpu")) is None
    store.save(("signature", "cpu"), "newer")
    assert store.load(("signature", "cpu")) == "newer"
    assert only_file(tmp_path).suffix == ".bin"


def test_name_and_options_are_part_of_the_key(store):
    """The serial form does not load the parallel one, nor one body another's."""
    store.save("key", DATA)
    assert Store(store.name, {"parallel": True}).load("key") == DATA
    assert Store(store.name, {}).load("key") is None
    assert Store(store.name, {"parallel": True, "fastmath": True}).load("key") is None
    assert Store("nhwconv.another.body", {"parallel": True}).load("key") is None


def test_version_is_part_of_the_path(store, monkeypatch):
    """Other sources, or another Python, Numba or llvmlite, means another folder."""
    monkeypatch.setattr(module, "_version", module._version.__wrapped__)  # computed each time
    store.save("key", DATA)
    for of, name in ((module.numba, "__version__"), (module.llvmlite, "__version__"), (module.sys, "version")):
        with monkeypatch.context() as patch:
            patch.setattr(of, name, "99.0")
            assert store.load("key") is None
    assert store.load("key") == DATA


def test_version_covers_all_that_decides_machine_code(monkeypatch):
    """Every module of codegen/, runtime/ and strategies/: a change of any of them is another version."""
    package = Path(nhwconv.__file__).parent
    paths = [p for folder in ("codegen", "runtime", "strategies") for p in (package / folder).rglob("*.py")]
    modules = {".".join(("nhwconv", *p.relative_to(package).with_suffix("").parts)) for p in paths}
    modules = {name.removesuffix(".__init__") for name in modules}
    assert len(modules) > 30
    ordinary, version = module._text, module._version.__wrapped__
    seen = []
    monkeypatch.setattr(module, "_text", lambda spec: seen.append(spec.name) or ordinary(spec))
    before = version()
    assert sorted(seen) == sorted(modules)
    assert version() == before
    for name in modules:
        monkeypatch.setattr(module, "_text", lambda spec, name=name: ordinary(spec) + b"#" * (spec.name == name))
        assert version() != before, name


def test_settings_of_the_compiler_are_part_of_the_version(monkeypatch):
    """What Numba is told by the environment decides code, too; where and on how many threads it runs does not."""
    version = module._version.__wrapped__
    before = version()
    for name, value in (("NUMBA_OPT", "1"), ("NUMBA_CPU_NAME", "generic"), ("NUMBA_SLP_VECTORIZE", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert version() != before, name
    for name, value in (("NUMBA_NUM_THREADS", "3"), ("NUMBA_THREADING_LAYER", "omp"), ("NUMBA_CACHE_DIR", "/tmp")):
        monkeypatch.setenv(name, value)
    assert version() == before


def test_a_module_without_its_source_counts_by_its_code():
    """Where a loader has no data, as in a frozen program, its code object is taken."""

    class Frozen:
        def __init__(self, source):
            self.source = source

        def get_code(self, name):
            return compile(self.source, name, "exec")

    def text(source):
        return module._text(ModuleSpec("frozen", Frozen(source), origin="frozen"))

    assert text("a = 1") == text("a = 1") != text("a = 2")


DAMAGE = {
    "emptied": lambda data: b"",
    "truncated to one byte": lambda data: data[:1],
    "truncated within the checksum": lambda data: data[:31],
    "truncated to the checksum": lambda data: data[:32],
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "a bit of the checksum": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "a bit of the data": lambda data: data[:2000] + bytes([data[2000] ^ 128]) + data[2001:],
    "the last bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "foreign": lambda data: b"MZ" + bytes(1000),
    "a foreign pickle": lambda data: pickle.dumps("not code"),
    "text": lambda data: b"hello\n" * 100,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_miss_and_is_replaced(damage, store, tmp_path):
    """No damage raises or loads; the next save repairs it."""
    store.save("key", DATA)
    file = only_file(tmp_path)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert store.load("key") is None
    store.save("key", DATA)
    assert store.load("key") == DATA


def test_another_entrys_file_under_this_name_is_a_miss(store, tmp_path):
    """A whole and sound file, but of another key: a checksum of the contents alone would not notice."""
    store.save("another key", "another body's machine code")
    other = only_file(tmp_path)
    sound = other.read_bytes()
    other.unlink()
    store.save("key", DATA)
    only_file(tmp_path).write_bytes(sound)
    assert store.load("key") is None


def test_a_folder_in_the_place_of_a_file_is_a_miss(store, tmp_path):
    """Reading fails, and so does writing: one warning, no error."""
    store.save("key", DATA)
    file = only_file(tmp_path)
    file.unlink()
    file.mkdir()
    assert store.load("key") is None
    with pytest.warns(RuntimeWarning, match="cannot keep compiled kernels"):
        store.save("key", DATA)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []  # nothing temporary remains


def test_cache_folder_and_clear_cache(tmp_path, monkeypatch):
    """NHWCONV_CACHE_DIR comes before NUMBA_CACHE_DIR, and that before the user's folder; clearing needs no folder."""
    for name in ("NHWCONV_CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    home = cache_folder()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    assert cache_folder() == tmp_path / "numba" / "nhwconv" / "kernels" != home
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "nhwconv" / "kernels"
    clear_cache()
    store = Store("name", {})
    store.save("key", DATA)
    clear_cache()
    assert store.load("key") is None
    assert not cache_folder().exists()


# ---------------------------------------------------------------------------------------------- who wrote it


def _belongs_to_another(path, monkeypatch):
    if os.geteuid() == 0:
        os.chown(path, 54321, -1)
    else:
        another = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: another)


UNTRUSTED = {
    "a file that anybody may write to": lambda folder, file, patch: file.chmod(0o646),
    "a folder that anybody may write to": lambda folder, file, patch: folder.chmod(0o777),
    "somebody else's file": lambda folder, file, patch: _belongs_to_another(file, patch),
    "somebody else's folder": lambda folder, file, patch: _belongs_to_another(folder, patch),
}


@pytest.mark.parametrize("change", UNTRUSTED)
def test_what_others_may_have_written_is_not_read(change, store, tmp_path, monkeypatch):
    """It is code, and would be run: one warning says so, however many entries there are; then compiling goes on."""
    store.save("key", DATA)
    file = only_file(tmp_path)
    UNTRUSTED[change](file.parent, file, monkeypatch)
    found = faults.caught(lambda: [store.load("key") for _ in range(3)])
    assert len(found) == 1
    assert re.fullmatch(r"nhwconv does not read compiled code from .*: others may write to it", found[0])
    assert str(file.parent) in found[0]
    monkeypatch.undo()
    if change.startswith("a file"):
        file.chmod(0o644)
    elif change.startswith("a folder"):
        file.parent.chmod(0o755)
    elif os.geteuid() == 0:
        for path in (file, file.parent):
            os.chown(path, 0, -1)
    monkeypatch.setenv("NHWCONV_CACHE_DIR", str(tmp_path))
    assert store.load("key") == DATA


def test_a_generous_umask_costs_nothing(store):
    """Folders and files are this user's alone to write to, whatever is usual where it runs."""
    before = os.umask(0)
    try:
        store.save("key", DATA)
    finally:
        os.umask(before)
    assert store.load("key") == DATA  # a warning would be an error


def test_without_a_home_nothing_is_called_tilde(tmp_path, monkeypatch):
    """Where nobody knows this user's home, the folder is below the system's temporary one, and this user's own."""
    pwd = pytest.importorskip("pwd")

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "NHWCONV_CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    folder = cache_folder()
    assert folder.is_absolute()
    assert "~" not in str(folder)
    assert folder.is_relative_to(tmp_path / "temporary")
    assert str(os.getuid()) in str(folder.relative_to(tmp_path / "temporary"))
    Store("name", {}).save("key", DATA)
    assert [p.name for p in tmp_path.iterdir()] == ["temporary"]


# --------------------------------------------------------------------------------------- whole processes

FORWARD = "import threaded; threaded.forward_small()"


def numbas(files):
    """Of the cache's files those that Numba compiled; the others are micro-kernels."""
    return [p for p in files if not p.name.startswith("native-")]


def statistics(out):
    """Return (loaded, compiled) and the warnings that `threaded.forward_small` printed."""
    first, *rest = out.splitlines()
    return tuple(map(int, first.split())), rest


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """A cache folder after a process that compiled, and how much it did."""
    folder = tmp_path_factory.mktemp("cache")
    (loaded, compiled), warnings = statistics(child.run(FORWARD, NHWCONV_CACHE_DIR=folder))
    assert (loaded, warnings) == (0, [])
    assert compiled > 0
    return folder, compiled


@pytest.fixture
def filled(compiled_once, tmp_path):
    """A copy of it, and how much was compiled."""
    folder, compiled = compiled_once
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path, compiled


def test_a_second_process_compiles_nothing_and_damage_is_repaired(filled):
    """Compiled once, then loaded; after damage to every file compiled again, with right results, then loaded again."""
    tmp_path, compiled = filled
    where = {"NHWCONV_CACHE_DIR": tmp_path}
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    written = [p.stat().st_mtime_ns for p in files]
    assert len(numbas(files)) == compiled
    assert statistics(child.run(FORWARD, **where)) == ((compiled, 0), [])
    assert [p.stat().st_mtime_ns for p in files] == written

    kinds = list(DAMAGE.values())
    for i, file in enumerate(files):
        file.write_bytes(kinds[i % len(kinds)](file.read_bytes()))
    assert statistics(child.run(FORWARD, **where)) == ((0, compiled), [])
    assert statistics(child.run(FORWARD, **where)) == ((compiled, 0), [])
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == files


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path):
    """Below a regular file no folder can be made, by root neither: results are right, and one warning says why."""
    (tmp_path / "file").write_text("")
    (loaded, compiled), warnings = statistics(child.run(FORWARD, NHWCONV_CACHE_DIR=tmp_path / "file" / "below"))
    assert loaded == 0
    assert compiled > 1
    assert len(warnings) == 1
    folder = re.escape(str(tmp_path / "file" / "below" / "nhwconv" / "kernels"))
    assert re.fullmatch(
        rf"RuntimeWarning nhwconv cannot keep compiled kernels in {folder} \(.*Not a directory.*\), so each process "
        r"compiles them anew; set NHWCONV_CACHE_DIR to a folder that can be written",
        warnings[0],
    )


def test_sixteen_cold_processes_at_once(tmp_path):
    """Sixteen compile and save at once, some the same bodies and some others; then four load all of them, and a
    hundred calls each are right.

    With Numba's own cache one kernel was handed another's machine code here.
    """

    def at_once(processes, jobs, calls):
        code = "import sys, threaded; threaded.small_bodies(*sys.argv[1:])"
        running = [child.start(code, first, jobs, calls, NHWCONV_CACHE_DIR=tmp_path) for first in range(processes)]
        results = [child.finish(process) for process in running]
        assert [(status, err) for status, _, err in results] == [(0, "")] * processes
        return [tuple(map(int, out.split())) for _, out, _ in results]

    assert all(loaded + compiled >= 1 for loaded, compiled in at_once(16, jobs=1, calls=3))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".bin"}  # nothing temporary remains
    assert len(files) == 6
    assert at_once(4, jobs=6, calls=100) == [(6, 0)] * 4


def test_without_sources_code_is_kept_and_versions_differ(tmp_path):
    """A program that ships bytecode alone: a second process compiles nothing, an upgraded one does not load the old."""
    package = tmp_path / "program" / "nhwconv"
    shutil.copytree(Path(nhwconv.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def build():
        assert compileall.compile_dir(package, quiet=1, legacy=True, force=True)
        sources = {p: p.read_text() for p in package.rglob("*.py")}
        for path in sources:
            path.unlink()
        return sources

    where = {
        "NHWCONV_CACHE_DIR": tmp_path / "cache",
        "PYTHONPATH": os.pathsep.join(map(str, (child.TESTS, package.parent))),
    }
    sources = build()
    (loaded, compiled), warnings = statistics(child.run(FORWARD, **where))
    assert (loaded, warnings) == (0, [])
    assert statistics(child.run(FORWARD, **where)) == ((compiled, 0), [])
    for path, text in sources.items():
        path.write_text(text + "\nUPGRADED = True\n" * (path.name == "machine.py"))
    build()
    assert statistics(child.run(FORWARD, **where)) == ((0, compiled), [])


def test_files_that_others_may_write_to_cost_compiling_alone(filled):
    """Results are right, everything is compiled anew, and one warning says why."""
    tmp_path, compiled = filled
    (folder,) = {p.parent for p in tmp_path.rglob("*.bin")}
    for path in folder.iterdir():
        path.chmod(0o666)
    statistics_of, warnings = statistics(child.run(FORWARD, NHWCONV_CACHE_DIR=tmp_path))
    assert statistics_of == (0, compiled)
    assert len(warnings) == 1
    assert f"does not read compiled code from {folder}" in warnings[0]
