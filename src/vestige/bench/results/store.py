"""A folder of results: every finished sample is a line on disk before the next one begins.

``bench.json`` has the settings, ``samples.jsonl`` the records, ``rows.json`` the rows. An interrupted run resumes where
it stopped; a line that a crash cut short is dropped, and its sample runs again.
"""

import contextlib
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vestige.bench.results.aggregate import Record, Row
from vestige.errors import InputError
from vestige.utils.files import write_atomically

BOOKS, SAMPLES, ROWS, SPEED = "bench.json", "samples.jsonl", "rows.json", "speed.json"


class Store:
    """Records of one run.

    Args:
        folder: Made if it does not exist.
        settings: JSON values that a resumed run may not change: model, split, seed, ...
        resume: Continue in a folder that has records.

    Raises:
        InputError: The folder is not empty and ``resume`` is false, was begun with other settings, is damaged, or
            cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.folder = folder
        self.records: dict[str, Record] = {}
        check_folder(folder, resume=resume)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / BOOKS).exists():
                self._check_settings(dict(settings))
            write_atomically(folder / BOOKS, json.dumps(settings, indent=1) + "\n")
            self._read()
            self.file = (folder / SAMPLES).open("ab", buffering=0)  # a full disk must be known at once
        except OSError as error:
            raise InputError(f"cannot write results to {folder}: {error.strerror}") from None

    def find(
        self,
        task: str,
        length: int,
        index: int,
        arm: Mapping[str, Any],
        digest: str | None = None,
        weights: str = "",
    ) -> Record | None:
        """Return the record of a sample and method, or None if it is missing.

        Raises:
            InputError: It was made from data with another digest, or with other trained weights.
        """
        record = self.records.get(_make_key(task, length, index, arm))
        if record is None or digest is None:
            return record
        if record["digest"] != digest:
            raise InputError(
                f"sample {index} of {task} in {self.folder} was made from another text "
                "or other answers; the data have changed: name a new --out"
            )
        if record.get("trained", weights) != weights:
            raise InputError(
                f"sample {index} of {task} in {self.folder} was made with other trained weights of {arm['policy']}; "
                "name a new --out"
            )
        return record

    def append(self, record: Record) -> None:
        """Write a record completely or not at all.

        Raises:
            InputError: The disk is full or cannot be written. Earlier records stay.
        """
        line, end = (json.dumps(record, ensure_ascii=False) + "\n").encode(), self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):  # a device cannot be truncated
                self.file.truncate(end)
            raise InputError(
                f"cannot write results to {self.folder}: {error.strerror}; "
                f"{len(self.records)} finished samples are kept, go on with --resume"
            ) from None
        self.records[_make_record_key(record)] = json.loads(line)  # as a resumed run reads it

    def finish(self, rows: list[Row], command: str | None = None) -> None:
        """Write the rows, and the command that makes them.

        Raises:
            InputError: The rows cannot be written.
        """
        try:
            content = {"rows": rows} if command is None else {"command": command, "rows": rows}
            write_atomically(self.folder / ROWS, json.dumps(content) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.folder / ROWS}: {error.strerror}") from None

    def close(self) -> None:
        """Close the file of records."""
        self.file.close()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / BOOKS
        try:
            begun = json.loads(path.read_text())
            assert isinstance(begun, dict)
        except (ValueError, AssertionError):
            raise InputError(f"{path} is damaged: it is not a JSON object; name a new --out") from None
        for name in settings:
            if begun.get(name) != settings[name]:
                raise InputError(
                    f"{self.folder} was begun with {name} {begun.get(name)!r}, not {settings[name]!r}; name a new --out"
                )

    def _read(self) -> None:
        path = self.folder / SAMPLES
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))  # the line that was being written when the last run was killed
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.records[_make_record_key(record)] = record
            except (ValueError, KeyError, TypeError, AttributeError):
                raise InputError(f"{path} is damaged: line {number} is not a record") from None


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raise an InputError if results cannot go to a folder; to call before a model is loaded."""
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; name a folder for --out")
        empty = not folder.exists() or not any(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot write results to {folder}: {error.strerror}") from None
    if not empty and not resume:
        raise InputError(f"{folder} exists and is not empty; name a new folder for --out, or go on with --resume")
    if not empty and not (folder / BOOKS).exists():
        raise InputError(f"{folder} has no results to go on with: no {BOOKS}")


def check_speed_folder(folder: Path) -> None:
    """Raise an InputError if a folder has the rows of a speed run already, or is no folder."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    if (folder / SPEED).exists():
        raise InputError(f"{folder / SPEED} exists; name another --out, or remove it")


def write_speed(folder: Path, rows: list[Row]) -> None:
    """Write the rows of a speed run to a folder, which is made if it does not exist.

    Raises:
        InputError: The rows cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SPEED, json.dumps({"rows": rows}, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write results to {folder}: {error.strerror}") from None


def _make_key(task: str, length: int, index: int, arm: Mapping[str, Any]) -> str:
    return json.dumps([task, length, index, *(arm[name] for name in ("policy", "share", "memory", "budget", "peer"))])


def _make_record_key(record: Record) -> str:
    return _make_key(record["task"], record["length"], record["index"], record["arm"])
