"""Checkpoints of a run: folders of safetensors and JSON, written atomically; loading runs no code.

``step-00000120/`` holds ``weights.safetensors`` (the trained parameters by name), ``optimizer.safetensors`` (AdamW's
moments and torch's random state) and ``checkpoint.json`` (the step, and what a resumed run must have in common).
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
NUM_KEPT = 2
"""Checkpoints to keep: the latest may be damaged by a full disk or a power cut."""
WEIGHTS, OPTIMIZER, METADATA = "weights.safetensors", "optimizer.safetensors", "checkpoint.json"
_NAME, _WORK = re.compile(r"step-\d{8,}"), ".step-"
_RNG = "rng"  # moments are called "exp_avg/<name>": no clash


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a run after a number of steps, which also determines the next samples."""

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    """AdamW's moments, as "exp_avg/<name>" and "exp_avg_sq/<name>"; empty before the first step."""
    rng: UInt8[Tensor, " bytes"]
    """Torch's random state on the CPU."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Folder of the run; the first save makes it.
        metadata: JSON values that a checkpoint must share with this run, in two levels: task and config.

    Raises:
        InputError: The metadata is not JSON.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder = folder
        try:
            self.metadata = json.loads(json.dumps(metadata))  # tuples become lists, as in a file
        except (TypeError, ValueError) as error:
            raise InputError(f"the identity of a task must be JSON values: {error}") from None

    def path(self, step: int) -> Path:
        """Return the path of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def newest(self) -> Path | None:
        """Return the path of the newest checkpoint, or None."""
        return next(reversed(self._all()), None)

    def load(self) -> State | None:
        """Read the newest checkpoint, to the CPU; None if there is none.

        Raises:
            InputError: It is damaged, or of another task or config; the message names the difference.
        """
        path = self.newest()
        if path is None:
            return None
        try:
            metadata = json.loads((path / METADATA).read_text())
            if metadata["format"] != FORMAT:
                raise InputError(f"{path} has format {metadata['format']}, this version of vestige reads {FORMAT}")
            self._compare(path, metadata)
            moments = load_file(path / OPTIMIZER)
            rng = moments.pop(_RNG)
            return State(step=metadata["step"], weights=load_file(path / WEIGHTS), moments=moments, rng=rng)
        except InputError:
            raise
        except Exception as error:  # json and safetensors raise a dozen types for damaged files
            why = f"{type(error).__name__}: {error}"
            raise InputError(f"{path} is damaged ({why}); remove it to go on from the one before") from None

    def save(self, state: State) -> Path:
        """Write a checkpoint, and remove all but the latest two.

        Raises:
            InputError: It cannot be written; earlier checkpoints are still there.
        """
        path = self.path(state.step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove(self.folder.glob(f"{_WORK}*"))  # left by a kill
            self._write(path, state)
        except (OSError, SafetensorError) as error:
            kept = self.newest()
            hint = f"; the last one is {kept}" if kept else ""
            raise InputError(f"cannot write the checkpoint {path}: {error}{hint}") from None
        self._remove(self._all()[:-NUM_KEPT])
        return path

    def check(self, *, resume: bool) -> None:
        """Raise an InputError unless a run can start in the folder, or resume in it."""
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
        """Write to a temporary folder and rename it."""
        work = Path(tempfile.mkdtemp(prefix=_WORK, dir=self.folder))
        try:
            save_file(_copy_to_cpu(state.weights), work / WEIGHTS)
            save_file(_copy_to_cpu({**state.moments, _RNG: state.rng}), work / OPTIMIZER)
            metadata = {"format": FORMAT, "step": state.step, **self.metadata}
            (work / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")
            for file in work.iterdir():
                file.chmod(0o644)  # safetensors makes them private
                _flush(file)
            work.chmod(0o755)  # mkdtemp makes it private
            if path.exists():  # from a run that was restarted
                shutil.rmtree(path)
            os.replace(work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Return the paths of all checkpoints, the newest last."""
        found = [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def _remove(self, paths: Iterable[Path]) -> None:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)

    def _compare(self, path: Path, saved: Mapping[str, Any]) -> None:
        for kind, current in self.metadata.items():
            for name in dict.fromkeys([*current, *saved[kind]]):
                was, now = saved[kind].get(name), current.get(name)
                if was != now:
                    raise InputError(f"{path} was made with {kind} {name} {was!r}, not {now!r}; name a new folder")


def _copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU that share no memory, as safetensors requires."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    """Flush a file to disk before its folder is renamed, so that a power cut leaves no empty checkpoint."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
