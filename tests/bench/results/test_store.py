"""The folder of results: what a crash, another setting, a damaged file and a full disk leave."""

import errno
import json
import os
from typing import Any

import pytest

from vestige import InputError
from vestige.bench.results import store as stores
from vestige.bench.results.store import Store, check_folder

ARM = {"policy": "snapkv", "share": "head", "memory": "none", "budget": "0.25", "peer": None}
BOOKS = {"model": "tiny", "split": "dev", "chunk": None, "seed": 0}


def record(index: int, **changes: Any) -> dict[str, Any]:
    return {"task": "lamps", "length": 100, "index": index, "arm": ARM, "score": 1.0} | changes


@pytest.fixture
def folder(tmp_path):
    """Return a folder with three records."""
    store = Store(tmp_path / "deep" / "out", BOOKS)
    for index in range(3):
        store.append(record(index))
    store.close()
    return store.folder


def reopened(folder, books=BOOKS) -> Store:
    store = Store(folder, books, resume=True)
    store.close()
    return store


def test_records_are_there_again(folder):
    store = reopened(folder)
    assert list(store.records.values()) == [record(i) for i in range(3)]
    assert store.find("lamps", 100, 1, ARM) == record(1)
    assert store.find("lamps", 100, 3, ARM) is None


@pytest.mark.parametrize("name", sorted(ARM))
def test_every_part_of_an_arm_tells_records_apart(folder, name):
    assert reopened(folder).find("lamps", 100, 1, ARM | {name: "other"}) is None


def test_task_and_length_tell_records_apart(folder):
    store = reopened(folder)
    assert store.find("lamp", 100, 1, ARM) is store.find("lamps", 1001, 1, ARM) is None


def test_a_record_is_one_line_on_disk_at_once(tmp_path):
    store = Store(tmp_path / "out", BOOKS)
    odd = record(0, prediction="a\nb\r\u2028\x85Ω\U0001f642")
    store.append(odd)
    lines = (store.folder / "samples.jsonl").read_bytes().split(b"\n")
    assert json.loads(lines[0]) == odd and lines[1:] == [b""]
    store.close()
    assert list(reopened(store.folder).records.values()) == [odd]


def test_a_line_cut_short_is_dropped_and_what_follows_begins_a_line(folder):
    path = folder / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"task": "lamps", "len')
    store = Store(folder, BOOKS, resume=True)
    assert len(store.records) == 3 and path.read_bytes() == whole
    store.append(record(3))
    store.close()
    assert len(reopened(folder).records) == 4


def test_a_last_line_without_its_end_is_done_again(folder):
    path = folder / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    assert len(reopened(folder).records) == 2


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", "7", "null", '{"task": "lamps"}', '{"task": 1, "arm": 3}', ""])
def test_a_malformed_line_is_refused_with_its_number_and_left_alone(folder, line):
    path = folder / "samples.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = line
    damaged = "\n".join(lines) + "\n"
    path.write_text(damaged)
    with pytest.raises(InputError, match=r"samples.jsonl is damaged: line 2 is not a record"):
        Store(folder, BOOKS, resume=True)
    assert path.read_text() == damaged


def test_other_settings_are_refused_by_name(folder):
    for name, value in (("split", "test"), ("seed", 1), ("chunk", 64), ("model", "other")):
        with pytest.raises(InputError, match=f"was begun with {name} {BOOKS[name]!r}, not {value!r}; name a new --out"):
            Store(folder, BOOKS | {name: value}, resume=True)
    assert json.loads((folder / "bench.json").read_text()) == BOOKS


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00"])
def test_damaged_settings_are_refused(folder, text):
    (folder / "bench.json").write_text(text)
    with pytest.raises(InputError, match="bench.json is damaged"):
        Store(folder, BOOKS, resume=True)


def test_a_folder_that_holds_something_needs_resume(folder):
    before = (folder / "samples.jsonl").read_bytes()
    for call in (lambda: Store(folder, BOOKS), lambda: check_folder(folder, resume=False)):
        with pytest.raises(InputError, match="exists and is not empty; .*--out, or go on with --resume"):
            call()
    assert (folder / "samples.jsonl").read_bytes() == before


def test_an_empty_or_new_folder_needs_nothing(tmp_path):
    for resume in (False, True):
        check_folder(tmp_path, resume=resume)
        check_folder(tmp_path / "new", resume=resume)
    reopened(tmp_path / "fresh")


def test_a_folder_without_results_cannot_be_gone_on_with(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    for call in (lambda: Store(tmp_path, BOOKS, resume=True), lambda: check_folder(tmp_path, resume=True)):
        with pytest.raises(InputError, match="has no results to go on with: no bench.json"):
            call()
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_or_on_its_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file; name a folder for --out"):
        Store(tmp_path / "file", BOOKS)
    with pytest.raises(InputError, match="cannot write results to .*Not a directory"):
        Store(tmp_path / "file" / "below", BOOKS)


def test_a_path_that_cannot_be_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        check_folder(tmp_path / ("n" * 300), resume=False)


class FullDisk:
    """A file on a disk that has room for so many more bytes of the next line."""

    def __init__(self, file, room: int, short: bool) -> None:
        self.file, self.room, self.short = file, room, short

    def write(self, line: bytes) -> int:
        written = self.file.write(line[: self.room])
        if not self.short:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("room", [0, 1, 20])
def test_a_full_disk_leaves_finished_lines_and_no_half_one(folder, room, short):
    before = (folder / "samples.jsonl").read_bytes()
    store = Store(folder, BOOKS, resume=True)
    store.file = FullDisk(store.file, room, short)
    with pytest.raises(InputError, match="No space left on device; 3 finished samples are kept, go on with --resume"):
        store.append(record(3))
    store.close()
    assert (folder / "samples.jsonl").read_bytes() == before
    assert store.find("lamps", 100, 3, ARM) is None
    assert len(reopened(folder).records) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_device_that_is_always_full_is_one_error(folder):
    (folder / "samples.jsonl").unlink()
    (folder / "samples.jsonl").symlink_to("/dev/full")
    store = Store.__new__(Store)
    store.folder, store.records = folder, {}
    with open("/dev/full", "ab", buffering=0) as store.file, pytest.raises(InputError, match="No space left on device"):
        store.append(record(0))


def test_rows_are_written_completely_or_not_at_all(folder, monkeypatch):
    store = Store(folder, BOOKS, resume=True)
    store.finish([{"task": "lamps", "score": 1.0}])
    before = (folder / "rows.json").read_bytes()
    assert json.loads(before) == {"rows": [{"task": "lamps", "score": 1.0}]}

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stores.os, "replace", full)
    with pytest.raises(InputError, match="cannot write .*rows.json: No space left on device"):
        store.finish([])
    store.close()
    assert (folder / "rows.json").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["bench.json", "rows.json", "samples.jsonl"]


def test_a_disk_full_from_the_start_is_refused(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stores.os, "replace", full)
    with pytest.raises(InputError, match="cannot write results to .*: No space left on device"):
        Store(tmp_path / "out", BOOKS)
