"""Files that several processes share: whole or absent, and one warning where they cannot be written.

What happens in the middle of a write, and to what others left, is in the tests of faults.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import faults
from nhwconv.runtime import files


@pytest.fixture(autouse=True)
def _as_a_new_process(monkeypatch):
    monkeypatch.setattr(files, "_told", set())
    for once in (files._remove_abandoned, files.remove_unused, files.mark_used):
        once.cache_clear()


def test_a_file_is_written_whole(tmp_path):
    """Folders are made, what was there is replaced, and nothing else remains."""
    path = tmp_path / "a" / "b" / "file"
    for data in (b"first", b"", bytes(10**6)):
        files.write_whole(path, data)
        assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


def test_readers_see_all_or_nothing(tmp_path):
    """While four threads write files of one letter each, every look finds one letter alone."""
    path, stop, seen = tmp_path / "file", threading.Event(), set()

    def read():
        while not stop.is_set():
            if path.exists():
                data = path.read_bytes()
                seen.add((len(data), len(set(data))))

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: files.write_whole(path, bytes([i % 4]) * 10**5), range(200)))
    stop.set()
    reader.join()
    assert seen <= {(10**5, 1)}
    assert list(tmp_path.iterdir()) == [path]


def test_one_warning_for_each_place(tmp_path):
    """However often it is told."""
    told = faults.caught(lambda: [files.warn_once(tmp_path / "a", "first") for _ in range(3)])
    told += faults.caught(lambda: files.warn_once(tmp_path / "b", "second"))
    assert told == ["first", "second"]


def test_what_cannot_be_kept_is_told(tmp_path):
    """What, where, why, what follows and what to do; without the name of a temporary file."""
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "below"
    (told,) = faults.caught(lambda: [files.keep(place / n, b"", place, "things", "so be it") for n in "abc"])
    assert told == (
        f"nhwconv cannot keep things in {place} (Not a directory), so so be it; set NHWCONV_CACHE_DIR to a folder that "
        "can be written"
    )


def test_what_is_kept_is_not_told(tmp_path):
    """Silently."""
    assert faults.caught(lambda: files.keep(tmp_path / "file", b"data", tmp_path, "things", "so be it")) == []
    assert (tmp_path / "file").read_bytes() == b"data"
