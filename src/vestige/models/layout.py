"""Architectures of models: evictable layers, the modules that vestige needs, and reasons to refuse a model.

No other file knows architectures.
"""

import hashlib
import inspect
import json
import sys
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from vestige.errors import ModelError
from vestige.models.compat import CACHE_NAME
from vestige.models.output_projection import OutputProjection
from vestige.models.rope import Rope, Rotation

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
"""Model types that change cached keys or values between storing and attending to them, with the change."""


@dataclass(frozen=True, eq=False)
class ModelLayout:
    """The parts of a model that vestige needs.

    Args:
        model: The whole model.
        decoder: The text decoder, which makes masks and positions and calls the layers.
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
        """Device of the model's inputs."""
        return self.model.device

    @property
    def max_positions(self) -> int | None:
        """Positions that the model was trained for, if its config has the number."""
        return getattr(self.config, "max_position_embeddings", None)

    def _row_sizes(self, attention: Any) -> tuple[int, int]:
        """Return the KV heads and the head size of an attention module; layers of Gemma 4 differ in both."""
        config = self.config
        heads = config.num_attention_heads // getattr(attention, "num_key_value_groups", 1)
        return heads, getattr(attention, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def kv_heads(self, layer_idx: int) -> int:
        """Return the number of KV heads of an evictable layer."""
        return self._row_sizes(self.attentions[layer_idx])[0]

    def head_dim(self, layer_idx: int) -> int:
        """Return the size of a key of an evictable layer."""
        return self._row_sizes(self.attentions[layer_idx])[1]

    def output(self, layer_idx: int) -> OutputProjection:
        """Return a layer's output projection by query head; it is made once per model, and again if the weights change.

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

    def rope(self) -> Rope:
        """Return the rotations of keys and queries in the evictable layers; they are found once per model.

        Each layer computes the key of one made-up token at two positions. A rotation is accepted if undoing it gives
        the same key for both. So a layer without RoPE is recognised, and nothing is guessed.

        Raises:
            ModelError: Positions have several axes (mRoPE), angles depend on the length of the text, or no known
                rotation reproduces the layer's keys.
        """
        if self.decoder not in _ropes:
            _check_rope_kind(self)
            _ropes[self.decoder] = Rope({i: _find_rotation(self, i) for i in self.evictable})
        return _ropes[self.decoder]

    def fingerprint(self) -> str:
        """Return a hash of the config and of a few weights of every parameter, which identifies the model.

        The hash is the same in float32, float16 and bfloat16, except for weights that change when rounded twice.
        """
        config = {k: v for k, v in self.config.to_diff_dict().items() if k not in _VOLATILE}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                digest.update(name.encode())
                flat = weight.flatten()
                sample = flat[:: max(flat.numel() // _SAMPLED, 1)][:_SAMPLED]
                digest.update(str(sample.bfloat16().float().tolist()).encode())
        return digest.hexdigest()[:32]


_OUTPUTS = ("o_proj", "out_proj", "dense", "wo")
_outputs: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], OutputProjection]]" = weakref.WeakKeyDictionary()


def _plain_weight(projection: Any) -> Tensor | None:
    """Return the weight of a linear module, which peft may have wrapped, or None if it is packed or absent."""
    weight = getattr(getattr(projection, "base_layer", projection), "weight", None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2 else None


_SAMPLED = 64  # weights of each parameter, evenly spaced: a fine-tuned model differs in some of them
_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache"}


def check(model: nn.Module) -> ModelLayout:
    """Return the layout of a model that vestige can serve. Nothing is changed.

    Raises:
        ModelError: The model cannot be served: no attention interface, an encoder, MLA, keys that are transformed after
            they were stored, or no layer whose pairs could be evicted. The message gives model and reason.
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
    return ModelLayout(model, decoder, evictable, attentions)


def attention_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Float[Tensor, "batch new hidden"]:
    """Return the hidden states among the arguments of an attention module."""
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return hidden


def _attention_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    found: dict[int, nn.Module] = {}
    for module in decoder.modules():
        idx: Any = getattr(module, "layer_idx", None)
        if isinstance(idx, int) and "attention" in type(module).__name__.lower():
            found.setdefault(idx, module)
    return found


_ropes: "weakref.WeakKeyDictionary[nn.Module, Rope]" = weakref.WeakKeyDictionary()
_LENGTH_DEPENDENT = ("dynamic", "longrope")
_TRIED = (0, 7)  # positions of the made-up token
_TOLERANCE = 0.05  # relative error: rounding to bf16 stays below, another rotation is far above


def _check_rope_kind(layout: ModelLayout) -> None:
    """Refuse rotations by config that the test would not detect, as they differ only for images or long texts."""
    settings = getattr(layout.config, "rope_parameters", None) or {}
    per_type = [x for x in settings.values() if isinstance(x, dict)]  # some models have one dict per layer type
    for rope in [settings, *per_type]:
        if "mrope_section" in rope:
            raise _rope_error(layout, "their positions have several axes (mRoPE)")
        if (kind := rope.get("rope_type")) in _LENGTH_DEPENDENT:
            raise _rope_error(layout, f"their angles depend on the length of the text (rope_type {kind!r})")


def _rope_error(layout: ModelLayout, reason: str) -> ModelError:
    name = f"{type(layout.model).__name__} ({layout.config.model_type})"
    return ModelError(f"keys of {name} cannot be turned back to what they were before RoPE: {reason}")


def _find_rotation(layout: ModelLayout, layer_idx: int) -> Rotation:
    module, rotary = layout.attentions[layer_idx], getattr(layout.decoder, "rotary_emb", None)
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        raise _rope_error(layout, "its decoder has no rotary_emb, or its code no apply_rotary_pos_emb")
    layer_types = getattr(layout.config, "layer_types", None)
    candidates = _list_rotations(rotary, apply, layer_types[layer_idx] if layer_types else None)
    try:
        positions = torch.tensor(_TRIED, device=layout.device)[:, None]
        keys = _keys_at(layout, layer_idx, candidates[0].angles, positions)
        found = next((rotation for rotation in candidates if _explains(rotation, keys, positions)), None)
    except Exception as error:  # other code, called in a way that it may not support, can raise anything
        raise _rope_error(layout, f"layer {layer_idx} could not be tried out: {error}") from error
    if found is None:
        raise _rope_error(layout, f"no rotation explains what layer {layer_idx} does")
    return found


def _list_rotations(rotary: Any, apply: Any, layer_type: str | None) -> list[Rotation]:
    """Return the possible rotations: of whole vectors by the model's own function, of their first part, or none."""
    extra = {"layer_type": layer_type} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
    single = next(iter(inspect.signature(apply).parameters)) == "x"  # gemma4 rotates queries and keys separately

    def angles(like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(like, positions, **extra)
        return cos, sin

    def no_angles(like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angles(like, positions)
        return torch.ones_like(cos), torch.zeros_like(sin)

    def whole(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned: Tensor = apply(x, cos, sin) if single else apply(x, x, cos, sin)[0]
        return turned

    def first_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = cos.shape[-1]
        return torch.cat([whole(x[..., :size], cos, sin), x[..., size:]], -1)

    return [Rotation(turns, turn) for turns in (angles, no_angles) for turn in (whole, first_part)]


def _keys_at(layout: ModelLayout, layer_idx: int, angles: Any, positions: Tensor) -> Tensor:
    """Return the keys ``positions kv_heads 1 head_dim`` that a layer stores for one made-up token."""
    module, cache = layout.attentions[layer_idx], DynamicCache()
    like = torch.linspace(-1, 1, layout.config.hidden_size, device=layout.device, dtype=layout.model.dtype)
    token = like.expand(len(positions), 1, -1)
    given = {
        "hidden_states": token,
        "position_embeddings": angles(token, positions),
        "attention_mask": None,
        CACHE_NAME: cache,
    }
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    with torch.no_grad():
        module(**{name: {} for name in required} | given)  # gemma4 requires a dict of shared pairs
    stored: Any = cache.layers[layer_idx]
    keys: Tensor = stored.keys
    return keys


def _explains(rotation: Rotation, keys: Tensor, positions: Tensor) -> bool:
    """Return whether undoing a rotation gives the same key for one token at two positions."""
    try:
        first, second = Rope({0: rotation}).unrotate(keys, positions, 0).float()
    except RuntimeError:  # the sizes of vectors and angles do not fit
        return False
    return bool((first - second).norm() <= _TOLERANCE * first.norm())
