"""The metrics of a run: one line of JSON a step, and no step twice."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vestige.errors import InputError
from vestige.utils.files import write_atomically

METRICS = "metrics.jsonl"

Record = Mapping[str, Any]
"""``step`` (done, from 1), ``loss`` and its other parts, ``lr``, ``grad_norm`` (before clipping), ``seconds`` of the
step and its validation, ``tokens`` if the task counts them, ``validation`` where there was one. A figure that is not
finite is null."""


class Metrics:
    """The metrics file of a run; opening it removes the lines of steps after ``step``, which the run repeats.

    Args:
        folder: Folder of the run.
        step: Number of steps done.

    Raises:
        InputError: A line before the last is not a record, or the file cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / METRICS
        try:
            write_atomically(self.path, "".join(f"{line}\n" for line in _lines(self.path, step)))
            self.file = self.path.open("ab", buffering=0)  # a full disk must raise at once
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None

    def append(self, record: Record) -> None:
        """Write the record of a step.

        Raises:
            InputError: The disk is full or cannot be written.
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run.

    Raises:
        InputError: A line before the last is not a record.
    """
    return [json.loads(line) for line in _lines(folder / METRICS)]


def _lines(path: Path, last_step: int | None = None) -> list[str]:
    """Return the complete lines of steps up to the last one; a kill may have cut the final line short."""
    if not path.exists():
        return []
    kept = []
    for number, line in enumerate(path.read_bytes().decode(errors="replace").split("\n")[:-1], 1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path} is damaged: line {number} is not a record") from None
        if last_step is None or step <= last_step:
            kept.append(line)
    return kept
