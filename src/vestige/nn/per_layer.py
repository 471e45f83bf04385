"""The base of small trained modules with a part for each evictable layer of one model, kept beside the model."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from vestige.errors import InputError, ModelError
from vestige.models.layout import check

_BROKEN = (
    OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, InputError, SafetensorError,
)  # fmt: skip
"""Errors that JSON, safetensors, torch and a config raise for a damaged file."""


@dataclass(frozen=True, kw_only=True)
class PerLayerConfig:
    """The model that a module belongs to; subclasses add the module's shape.

    Args:
        layers: Indices of the model's evictable layers.
        base: Fingerprint of the model.
        model: Name of the model, for messages.
    """

    layers: tuple[int, ...]
    base: str = ""
    model: str = ""


C = TypeVar("C", bound=PerLayerConfig)
M = TypeVar("M", bound="PerLayerModule[Any]")


class PerLayerModule(nn.Module, Generic[C]):
    """A trained module whose parts belong to the evictable layers of one model.

    Its files are ``<file_name>.safetensors``, the weights, and ``<file_name>.json``, the config.

    Args:
        config: Shape of the module, and the model it belongs to.
    """

    config_class: ClassVar[type[Any]]
    file_name: ClassVar[str]
    """Name of the files, where ``{kind}`` is the kind of the module, if there are several."""
    title: ClassVar[str]
    """Name of the module in messages, in which ``{kind}`` has the same meaning."""
    frozen: ClassVar[bool] = True
    """Whether loaded weights take no gradients."""

    def __init__(self, config: C) -> None:
        super().__init__()
        self.config = config
        self._place = {layer_idx: place for place, layer_idx in enumerate(config.layers)}

    @classmethod
    def initialize(cls: type[M], model: PreTrainedModel, **options: Any) -> M:
        """Return an untrained module for a model, in float32.

        Args:
            model: Gives the layers and their sizes.
            options: Fields of the config that do not follow from the model.

        Raises:
            ModelError: The model has no evictable layers.
            InputError: A number out of range.
        """
        layout = check(model)
        name = model.config.name_or_path or ""
        known = {
            "layers": layout.evictable,
            "kv_heads": tuple(map(layout.kv_heads, layout.evictable)),
            "head_dims": tuple(map(layout.head_dim, layout.evictable)),
            "hidden": layout.config.hidden_size,
            "base": layout.fingerprint(),
            "model": Path(name).name if Path(name).is_dir() else name,  # a user's folders are nobody else's business
        }
        own = {field.name: known[field.name] for field in fields(cls.config_class) if field.name in known}
        return cls(cls.config_class(**own, **options)).to(model.device)

    def require_fit(self, model: PreTrainedModel) -> None:
        """Raise a ModelError unless this module was made for a model with these weights."""
        if self.config.base != check(model).fingerprint():
            whose = f" ({self.config.model})" if self.config.model else ""
            title = self.title.format(kind=getattr(self.config, "kind", ""))
            raise ModelError(f"{title} made for another model{whose}, or for other weights")

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the weights, in a dtype, and the config into a folder."""
        stem = self.file_name.format(kind=getattr(self.config, "kind", ""))
        weights = folder / f"{stem}.safetensors"
        tensors = {key: x.detach().to("cpu", dtype).contiguous() for key, x in self.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, weights)
        weights.chmod(0o644)  # safetensors lets only the owner read it
        (folder / f"{stem}.json").write_text(json.dumps(asdict(self.config), indent=1) + "\n")

    @classmethod
    def load(cls: type[M], folder: Path, model: PreTrainedModel, kind: str = "") -> M:
        """Read a module for a model, in float32; runs no code from the files.

        Args:
            folder: Holds the files.
            model: The model that the module was made for.
            kind: Kind of the module, if there are several.

        Raises:
            ModelError: Missing, damaged, or made for another model.
        """
        stem, title = cls.file_name.format(kind=kind), cls.title.format(kind=kind)
        weights, shape = folder / f"{stem}.safetensors", folder / f"{stem}.json"
        if missing := [path.name for path in (shape, weights) if not path.is_file()]:
            raise ModelError(f"{folder} has no {title}: no {missing[0]}")
        try:
            written = json.loads(shape.read_text()).items()
            config = cls.config_class(**{key: tuple(x) if isinstance(x, list) else x for key, x in written})
            module = cls(config)
            module.load_state_dict({key: x.float() for key, x in load_file(weights).items()})
        except _BROKEN as error:
            raise ModelError(f"{title} in {folder} cannot be read: {' '.join(str(error).split())[:300]}") from None
        module.require_fit(model)
        return module.requires_grad_(not cls.frozen).to(model.device)
