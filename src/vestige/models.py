"""The one file that knows architectures: what can be evicted, where things are, and what must be refused, and why."""

import hashlib
import json
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from vestige.budget import Footprint
from vestige.errors import ModelError
from vestige.output import OutputProjection

TRANSFORMS_AFTER_UPDATE = {
    "diffllama": "it subtracts two attentions over halved heads of the cached keys",
    "doge": "it derives a mask from the cached values",
    "idefics": "it attends to images through cached states of another module",
    "inkling": "it mixes cached keys after storing them",
    "jetmoe": "it repeats the cached keys for its experts",
    "minimax_m3_vl": "it indexes the cached keys by itself",
    "mllama": "its cross-attention layers cache image states",
    "moonshine": "it pads the cached keys",
    "nemotron_asr": "it transforms the cached keys",
}
"""Model types that use cached keys or values between storing and attending to them, and how."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Where a model keeps what vestige needs.

    Args:
        model: The whole model.
        decoder: The text decoder: it makes masks and positions, and calls the layers.
        evictable: Indices of the full-attention layers.
        attentions: Attention module of each evictable layer.
    """

    model: PreTrainedModel
    decoder: nn.Module
    evictable: tuple[int, ...]
    attentions: dict[int, nn.Module]

    @property
    def config(self) -> PretrainedConfig:
        """Config of the text decoder."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs live."""
        return self.model.device

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was made for, if its config says."""
        return getattr(self.config, "max_position_embeddings", None)

    def expected_footprint(self, dtype: torch.dtype) -> Footprint:
        """Return what a batch row will weigh, by the config: enough to refuse a hopeless budget before reading."""
        sizes = [self._row_sizes(module) for module in self.attentions.values()]
        rows = sum(heads for heads, _ in sizes)
        return Footprint(rows, sum(heads * (2 * head_dim * dtype.itemsize + 4) for heads, head_dim in sizes))

    def _row_sizes(self, attention: Any) -> tuple[int, int]:
        """Return KV heads and head size of an attention module, which can differ between layers (Gemma 4)."""
        config = self.config
        heads = config.num_attention_heads // getattr(attention, "num_key_value_groups", 1)
        return heads, getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def output(self, layer_idx: int) -> OutputProjection:
        """Return a layer's output projection by query head; made once per model, and anew if its weights change.

        Raises:
            ModelError: The attention module has no plain linear output projection.
        """
        module: Any = self.attentions[layer_idx]
        weight = next((w for name in _OUTPUTS if (w := _plain_weight(getattr(module, name, None))) is not None), None)
        heads = self.config.num_attention_heads
        if weight is None or weight.shape[1] % heads:
            raise ModelError(
                f"the output projection of {type(module).__name__} was not found or is packed (looked for "
                f"{', '.join(_OUTPUTS)}), so values cannot be weighed by it"
            )
        state = (weight.data_ptr(), weight._version, weight.dtype)
        if module not in _outputs or _outputs[module][0] != state:
            by_head = weight.detach().T.unflatten(0, (heads, -1))
            _outputs[module] = (state, OutputProjection(by_head))
        return _outputs[module][1]

    def fingerprint(self) -> str:
        """Return a hash of the config and of a few weights of every parameter, to tell one model from another."""
        config = {k: v for k, v in self.config.to_diff_dict().items() if k not in _VOLATILE}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                digest.update(name.encode())
                flat = weight.flatten()
                sample = flat[:: max(flat.numel() // _SAMPLED, 1)][:_SAMPLED]
                digest.update(str(sample.float().tolist()).encode())
        return digest.hexdigest()[:32]


_OUTPUTS = ("o_proj", "out_proj", "dense", "wo")
_outputs: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], OutputProjection]]" = weakref.WeakKeyDictionary()


def _plain_weight(projection: Any) -> Tensor | None:
    """Return the weight of a linear module, which peft may have wrapped, or None if it is packed or absent."""
    weight = getattr(getattr(projection, "base_layer", projection), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2 else None


_SAMPLED = 64  # weights of each parameter, evenly spaced: a fine-tuned model differs in some of them
_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache"}


def check(model: nn.Module) -> Anatomy:
    """Return where things are in a model that vestige can serve. Nothing is changed.

    Raises:
        ModelError: The model is named and the reason given: no attention interface, an encoder, MLA, keys that are
            transformed after they were stored, or no layer whose pairs could be evicted.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"vestige works on transformers models, got {type(model).__name__}")
    config = model.config.get_text_config(decoder=True)
    name = f"{type(model).__name__} ({config.model_type})"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{name} cannot be evicted: it is an encoder-decoder")
    if getattr(config, "kv_lora_rank", None):
        raise ModelError(f"{name} cannot be evicted: MLA caches a latent and expands it after storing (kv_lora_rank)")
    for kind in (config.model_type, model.config.model_type):
        for stem, reason in TRANSFORMS_AFTER_UPDATE.items():
            if kind == stem or kind.startswith(f"{stem}_"):
                raise ModelError(f"{name} cannot be evicted: {reason}")
    if not type(model)._can_set_attn_implementation():
        raise ModelError(f"{name} cannot be evicted: it has no attention interface to plug into")
    evictable = tuple(i for i, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is DynamicLayer)
    if not evictable:
        raise ModelError(f"{name} cannot be evicted: it has no full-attention layer, and the others stay small anyway")
    decoder = model.get_decoder()
    attentions = {i: module for i, module in _attention_modules(decoder).items() if i in evictable}
    if set(attentions) != set(evictable):
        raise ModelError(f"{name} cannot be evicted: no attention module was found for every full-attention layer")
    return Anatomy(model, decoder, evictable, attentions)


def _attention_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    found: dict[int, nn.Module] = {}
    for module in decoder.modules():
        idx: Any = getattr(module, "layer_idx", None)
        if isinstance(idx, int) and "attention" in type(module).__name__.lower():
            found.setdefault(idx, module)
    return found
