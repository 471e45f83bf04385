"""Low-rank adapters (LoRA) on a frozen model: switched on by hooks, saved in peft's file format.

The model's own modules are not modified. Switched off, the model is bit for bit the same, so one model both erases and
answers.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vestige.errors import ModelError
from vestige.models.layout import check

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX, _BASE = "base_model.model.", "base_model_fingerprint"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The shape of an adapter, and the model it belongs to.

    Args:
        rank: Rank of each addition.
        alpha: Additions are scaled by ``alpha / rank``.
        modules: Full names of the adapted linear modules, in order.
        base: Fingerprint of the model; empty if its maker did not say.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]
    base: str = ""


class Adapter(nn.Module):
    """Additions ``x A^T B^T alpha / rank`` to the outputs of linear modules, in float32, computed in the model's dtype.

    B begins at zero, so a new adapter changes nothing.

    Args:
        config: Adapted modules and rank.
        shapes: ``(out, in)`` features of each module.
    """

    def __init__(self, config: AdapterConfig, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.config = config
        self.down = nn.ParameterList(nn.Parameter(torch.empty(config.rank, inputs)) for _, inputs in shapes)
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(outputs, config.rank)) for outputs, _ in shapes)
        for weight in self.down:
            nn.init.kaiming_uniform_(weight, a=5**0.5)

    @staticmethod
    def initialize(
        model: PreTrainedModel, *, rank: int = 16, alpha: float = 32.0, targets: Sequence[str] = TARGETS
    ) -> "Adapter":
        """Return an adapter on a model's linear modules that changes nothing yet.

        In the last layer only keys and values are adapted: nothing that follows them is cached.

        Raises:
            ModelError: No module has such a name.
        """
        layout = check(model)
        last = max(layout.evictable)
        found: dict[str, nn.Linear] = {}
        for name, module in model.named_modules():
            layer = re.search(r"\.layers\.(\d+)\.", f".{name}.")
            if not isinstance(module, nn.Linear) or layer is None or name.rpartition(".")[2] not in targets:
                continue
            if int(layer[1]) < last or name.endswith(("k_proj", "v_proj")):
                found[name] = module
        if not found:
            raise ModelError(f"{type(model).__name__} has no linear module named {', '.join(targets)}")
        config = AdapterConfig(rank=rank, alpha=alpha, modules=tuple(found), base=layout.fingerprint())
        shapes = [(module.out_features, module.in_features) for module in found.values()]
        return Adapter(config, shapes).to(model.device)

    def require_fit(self, model: PreTrainedModel) -> None:
        """Raise a ModelError unless the adapter was made for a model, or its maker did not say for which."""
        _require_base(self.config.base, model, "this adapter")

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Switch the additions on."""
        with ExitStack() as hooks:
            for i, name in enumerate(self.config.modules):
                handle = model.get_submodule(name).register_forward_hook(self._addition(i))
                hooks.callback(handle.remove)
            yield

    def _addition(self, index: int) -> Any:
        down, up = self.down[index], self.up[index]
        factor = self.config.alpha / self.config.rank

        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            return output + nn.functional.linear(nn.functional.linear(x, down.to(x.dtype)), up.to(x.dtype)) * factor

        return add

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write the adapter's two files into a folder, in the format of peft."""
        tensors = {}
        for name, down, up in zip(self.config.modules, self.down, self.up, strict=True):
            for side, weight in (("lora_A", down), ("lora_B", up)):
                tensors[f"{_PREFIX}{name}.{side}.weight"] = weight.detach().to("cpu", dtype).contiguous()
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={_BASE: self.config.base})
        (folder / WEIGHTS).chmod(0o644)  # safetensors lets only the owner read it
        written = {
            "peft_type": "LORA",
            "task_type": None,
            "inference_mode": True,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(self.config.modules),
        }
        (folder / CONFIG).write_text(json.dumps(written, indent=1) + "\n")

    @staticmethod
    def load(folder: Path, model: PreTrainedModel) -> "Adapter":
        """Read an adapter for a model; runs no code from the files.

        Raises:
            ModelError: Missing, damaged, not LoRA on linear modules, or made for another model.
        """
        if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
            raise ModelError(f"{folder} is not an adapter: no {missing[0]}")
        try:
            written = json.loads((folder / CONFIG).read_text())
            tensors = load_file(folder / WEIGHTS, device=str(model.device))
            with safe_open(folder / WEIGHTS, "pt") as file:
                base = (file.metadata() or {}).get(_BASE, "")
            rank, alpha = int(written["r"]), float(written["lora_alpha"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(f"the adapter in {folder} is damaged: {error!r}") from None
        names = sorted({name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors})
        _require_base(base, model, f"the adapter in {folder}")
        modules = dict(model.named_modules())
        pairs = [_find_pair(modules.get(name), tensors, name, folder) for name in names]
        config = AdapterConfig(rank=rank, alpha=alpha, modules=tuple(names), base=base)
        adapter = Adapter(config, [(up.shape[0], down.shape[1]) for down, up in pairs])
        for (down, up), own_down, own_up in zip(pairs, adapter.down, adapter.up, strict=True):
            own_down.data, own_up.data = down.float(), up.float()
        return adapter.to(model.device)


def _require_base(base: str, model: PreTrainedModel, what: str) -> None:
    if base and base != check(model).fingerprint():
        raise ModelError(f"{what} was made for another model or other weights")


def _find_pair(module: Any, tensors: Mapping[str, Tensor], name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Return the matrices A and B of a module from an adapter's files, or raise a ModelError if they do not fit."""
    down, up = (tensors.get(f"{_PREFIX}{name}.lora_{side}.weight") for side in "AB")
    if not isinstance(module, nn.Linear) or down is None or up is None:
        raise ModelError(f"the adapter in {folder} is for {name}, which this model does not have as a linear module")
    given, own = (up.shape[0], down.shape[1]), (module.out_features, module.in_features)
    if given != own:
        raise ModelError(f"the adapter in {folder} is for {given} features of {name}, the model has {own}")
    return down, up
