"""Small trained modules that belong to one model: written as safetensors and JSON, refused where they do not fit."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from vestige.errors import InputError, ModelError
from vestige.models.anatomy import check

M = TypeVar("M", bound=nn.Module)
_BROKEN = (
    OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, InputError, SafetensorError,
)  # fmt: skip
"""What a damaged file makes come out of JSON, safetensors, torch and a shape."""


@runtime_checkable
class OwnedConfig(Protocol):
    """A frozen dataclass: the shape of a module, and whose it is."""

    @property
    def base(self) -> str:
        """Fingerprint of the model."""

    @property
    def model(self) -> str:
        """Its name, for messages."""


def save(module: nn.Module, shape: Any, folder: Path, name: str, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a module's weights and its shape into a folder, as ``<name>.safetensors`` and ``<name>.json``."""
    weights = folder / f"{name}.safetensors"
    tensors = {key: x.detach().to("cpu", dtype).contiguous() for key, x in module.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, weights)
    weights.chmod(0o644)  # safetensors leaves it to its owner alone
    (folder / f"{name}.json").write_text(json.dumps(asdict(shape), indent=1) + "\n")


def load(make: Callable[[Mapping[str, Any]], M], folder: Path, name: str, what: str) -> M:
    """Read what :func:`save` wrote, in float32; runs no code from the files.

    Args:
        make: Makes the module from its shape, whose lists come as tuples.
        folder: Where they lie.
        name: Of the files.
        what: They are, for messages: "gates".

    Raises:
        ModelError: Missing or damaged.
    """
    weights, shape = folder / f"{name}.safetensors", folder / f"{name}.json"
    if missing := [path.name for path in (shape, weights) if not path.is_file()]:
        raise ModelError(f"{folder} has no {what}: no {missing[0]}")
    try:
        written = json.loads(shape.read_text()).items()
        module = make({key: tuple(x) if isinstance(x, list) else x for key, x in written})
        module.load_state_dict({key: x.float() for key, x in load_file(weights).items()})
    except _BROKEN as error:
        raise ModelError(f"{what} in {folder} cannot be read: {' '.join(str(error).split())[:300]}") from None
    return module


def digest(module: nn.Module) -> str:
    """Return a hash of a module's weights."""
    found = hashlib.sha256()
    for name, x in sorted(module.state_dict().items()):
        found.update(name.encode() + x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def ownership(model: PreTrainedModel) -> dict[str, str]:
    """Return the fields of a shape that say whose it is."""
    name = model.config.name_or_path or ""
    is_folder = Path(name).is_dir()  # whose path is nobody else's business
    return {"base": check(model).fingerprint(), "model": Path(name).name if is_folder else name}


def require_fit(shape: OwnedConfig, model: PreTrainedModel, what: str) -> None:
    """Raise a ModelError unless something of this shape was made for a model."""
    if shape.base != check(model).fingerprint():
        whose = f" ({shape.model})" if shape.model else ""
        raise ModelError(f"{what} made for another model{whose}, or for other weights")
