"""Small trained weights that belong to one model: shipped with the package, in a folder, or on the hub."""

import hashlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from vestige.errors import ModelError
from vestige.models.layout import check

SHIPPED = Path(__file__).parent / "weights"
"""Weights that come with the package: a folder for each kind and model, ``<kind>-<fingerprint of the model>``."""
M = TypeVar("M", bound="Weights")
_FILES = ("*.safetensors", "*.json")


@runtime_checkable
class Weights(Protocol):
    """Small trained weights."""

    def require_fit(self, model: PreTrainedModel) -> None:
        """Raise a ModelError unless they were made for a model."""


@runtime_checkable
class Trained(Protocol):
    """A policy, memory or eraser that works with trained weights."""

    def weights_for(self, model: PreTrainedModel) -> nn.Module:
        """Return its weights for a model."""


def digest(user: object, model: PreTrainedModel) -> str:
    """Return a hash of the trained weights of a policy, memory or eraser; empty if it has none."""
    if not isinstance(user, Trained):
        return ""
    found = hashlib.sha256()
    for name, x in sorted(user.weights_for(model).state_dict().items()):
        found.update(name.encode() + x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def folder_of(kind: str, name: str | None, model: PreTrainedModel) -> Path:
    """Return the folder with weights of a kind.

    Args:
        kind: ``"eraser"``, ``"retention"``, ...
        name: A folder, else a hub id, from which only safetensors and JSON are fetched; None takes the shipped weights.
        model: Model that they are for.

    Raises:
        ModelError: Nothing of that kind is shipped for the model, or the name is no folder and cannot be fetched.
    """
    if name is None:
        return _shipped(kind, model)
    if (folder := Path(name)).is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"no such folder: {name}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's client and its libraries raise a dozen types
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{name} is no folder and cannot be fetched from the hub: {reason}") from None


def _shipped(kind: str, model: PreTrainedModel) -> Path:
    home = SHIPPED / f"{kind}-{check(model).fingerprint()}"
    if not home.is_dir():
        name = model.config.name_or_path or type(model).__name__
        raise ModelError(
            f"no {kind} weights are shipped for {name}; train some with `vestige train {kind}` and name their folder"
        )
    return home


class WeightsCache(Generic[M]):
    """Weights of a kind by model and name, each read once.

    Args:
        kind: Kind of weights, as :func:`folder_of` takes it.
        read: Reads weights from a folder, for a model.
    """

    def __init__(self, kind: str, read: Callable[[Path, PreTrainedModel], M]) -> None:
        self.kind, self.read = kind, read
        self._known: weakref.WeakKeyDictionary[PreTrainedModel, dict[str | None, tuple[Any, M]]]
        self._known = weakref.WeakKeyDictionary()

    def get(self, name: str | M | None, model: PreTrainedModel) -> M:
        """Return the weights of a name for a model; given weights are returned as they are.

        Raises:
            ModelError: As :func:`folder_of`, or the weights cannot be read, or belong to another model.
        """
        if not isinstance(name, str | None):
            return name
        known = self._known.setdefault(model, {})
        if name not in known:
            known[name] = _stamp(name, model), self.read(folder_of(self.kind, name, model), model)
        return known[name][1]

    def refresh(self, name: str | M | None, model: PreTrainedModel) -> M:
        """Return the same as :meth:`get`; read them again if the model was moved or the folder was written since.

        Raises:
            ModelError: As :meth:`get`, or given weights belong to another model.
        """
        if not isinstance(name, str | None):
            name.require_fit(model)
            return name
        known = self._known.setdefault(model, {})
        if name in known and known[name][0] != _stamp(name, model):
            del known[name]
        return self.get(name, model)


def _stamp(name: str | None, model: PreTrainedModel) -> tuple[Any, ...]:
    """Return the state that loaded weights depend on: the model's device and dtype, the times of their files."""
    folder = Path(name or "")
    files = sorted(folder.glob("*.safetensors")) if name and folder.is_dir() else []
    return model.device, model.dtype, tuple(file.stat().st_mtime_ns for file in files)
