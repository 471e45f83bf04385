"""Checkpoints of a run: folders of safetensors and JSON, there completely or not at all; loading runs no code.

``step-00000120/`` holds ``weights.safetensors`` (what is trained, by name), ``optimizer.safetensors`` (AdamW's moments
and torch's random state) and ``checkpoint.json`` (the step, and what a run that goes on must have in common).
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vestige.errors import InputError

FORMAT = 1
KEPT = 2
"""The latest one may be on a disk that was full or lost power."""
WEIGHTS, OPTIMIZER, BOOKS = "weights.safetensors", "optimizer.safetensors", "checkpoint.json"
_NAME, _WORK = re.compile(r"step-(\d{8,})"), ".step-"
_RNG = "rng"  # moments are called "exp_avg/<name>": no clash


@dataclass(frozen=True, kw_only=True)
class State:
    """All that a run is after a number of steps; where samples come from follows from that number."""

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    """AdamW's, as "exp_avg/<name>" and "exp_avg_sq/<name>"; empty before the first step."""
    rng: UInt8[Tensor, " bytes"]
    """Torch's random state on the CPU."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Of the run; made when something is saved.
        books: What a checkpoint must have in common with this run, in two levels of JSON values: task and config.

    Raises:
        InputError: The books are not JSON.
    """

    def __init__(self, folder: Path, books: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder = folder
        try:
            self.metadata = json.loads(json.dumps(books))  # as a file would give them back: tuples are lists
        except (TypeError, ValueError) as error:
            raise InputError(f"the identity of a task must be JSON values: {error}") from None

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is."""
        return self.folder / f"step-{step:08d}"

    def newest(self) -> Path | None:
        """Return the checkpoint of the highest step, if there is one."""
        return max(self._all(), default=None, key=_step_of)

    def load(self) -> State | None:
        """Read the newest checkpoint, to the CPU; None if there is none.

        Raises:
            InputError: It is damaged, or of another task or config; the message names what differs.
        """
        path = self.newest()
        if path is None:
            return None
        try:
            books = json.loads((path / BOOKS).read_text())
            if books["format"] != FORMAT:
                raise InputError(f"{path} has format {books['format']}, this version of vestige reads {FORMAT}")
            self._compare(path, books)
            moments = load_file(path / OPTIMIZER)
            rng = moments.pop(_RNG)
            return State(step=books["step"], weights=load_file(path / WEIGHTS), moments=moments, rng=rng)
        except InputError:
            raise
        except Exception as error:  # a damaged file makes a dozen types come out of json and safetensors
            why = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is damaged ({why}); remove it to go on from the one before") from None

    def save(self, state: State) -> Path:
        """Write a checkpoint, and remove all but the latest two.

        Raises:
            InputError: It cannot be written; those before are still there.
        """
        path = self.path(state.step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove(self.folder.glob(f"{_WORK}*"))  # what a kill left
            self._write(path, state)
        except (OSError, SafetensorError) as error:
            kept = self.newest()
            hint = f"; the last one is {kept}" if kept else ""
            raise InputError(f"cannot write the checkpoint {path}: {error}{hint}") from None
        self._remove(sorted(self._all(), key=_step_of)[:-KEPT])
        return path

    def check(self, *, resume: bool) -> None:
        """Raise an InputError unless a run can begin in the folder, or go on in it."""
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise InputError(f"{self.folder} is a file; name a folder for the run")
            empty = not self.folder.exists() or all(p.name.startswith(_WORK) for p in self.folder.iterdir())
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror}") from None
        if not empty and not resume:
            raise InputError(f"{self.folder} exists and is not empty; name a new folder, or go on with --resume")
        if not empty and self.newest() is None:
            raise InputError(f"{self.folder} has no checkpoint to go on with")

    def _write(self, path: Path, state: State) -> None:
        """Write beside the final place and rename."""
        work = Path(tempfile.mkdtemp(prefix=_WORK, dir=self.folder))
        try:
            save_file(_own(state.weights), work / WEIGHTS)
            save_file(_own({**state.moments, _RNG: state.rng}), work / OPTIMIZER)
            books = {"format": FORMAT, "step": state.step, **self.metadata}
            (work / BOOKS).write_text(json.dumps(books, indent=1) + "\n")
            for file in work.iterdir():
                file.chmod(0o644)  # safetensors leaves them to their owner alone
                _flush(file)
            work.chmod(0o755)  # mkdtemp makes it private
            if path.exists():  # begun again before it was removed
                shutil.rmtree(path)
            os.replace(work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _all(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)

    def _compare(self, path: Path, saved: Mapping[str, Any]) -> None:
        for kind, own in self.metadata.items():
            for name in dict.fromkeys([*own, *saved[kind]]):
                was, now = saved[kind].get(name), own.get(name)
                if was != now:
                    raise InputError(f"{path} was made with {kind} {name} {was!r}, not {now!r}; name a new folder")


def _step_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found, "only such names are listed"
    return int(found[1])


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    """Have the disk take a file before its folder is renamed, so that a power cut leaves no hollow checkpoint."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
