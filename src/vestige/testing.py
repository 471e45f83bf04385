"""Tiny models and oracles for tests: public, so that policies written elsewhere can be checked too.

``tiny("llama")`` builds a random-weight model in milliseconds, offline. ``masked_logits`` computes the
expected logits after evictions: one dense forward in which each query sees only the pairs that
were still held. It shares no code with the cache that it tests.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

__all__ = [
    "NEVER",
    "REFUSED",
    "TINY",
    "attention",
    "bury",
    "covering",
    "full_layers",
    "held_mask",
    "left_padded",
    "masked_logits",
    "random_deaths",
    "random_ids",
    "tiny",
    "tiny_vl",
    "watch",
]

NEVER = 2**62
"""The death of a pair that is never evicted."""

SPECIAL = 8
"""Number of ids at the end of every vocabulary that are left to image tokens; id 0 is the pad."""

Config = dict[str, Any]

Deaths = Mapping[int, Int[Tensor, "_batch _kv_heads _seen"]]
"""For each layer and pair the padded index of the first query that no longer sees it; KV heads may differ by layer."""

COMMON: Config = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,  # tied random weights repeat the last token
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,  # greedy decoding runs its full length
}
_EXPERTS: Config = {
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",  # grouped_mm, the default, knows no float64
}
_ALTERNATE = ["sliding_attention", "full_attention"] * 2
_MOSTLY_SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_SHARING = ["full_attention", "sliding_attention", "full_attention"] * 2

TINY: dict[str, Config] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32},
    "mistral": {"sliding_window": None},  # MistralConfig slides by default
    "phi3": {},
    "gemma2": {
        "num_hidden_layers": 4,
        "layer_types": _ALTERNATE,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 4.0,  # low enough to bend the scores
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "layer_types": _MOSTLY_SLIDING,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
    },
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.8, "logits_scaling": 2.0},
    "smollm3": {"num_hidden_layers": 4},  # the fourth layer has no RoPE
    "glm4": {},
    "gpt_oss": _EXPERTS
    | {
        "num_local_experts": 4,
        "num_hidden_layers": 4,
        "layer_types": _ALTERNATE,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16},
    },
    "gemma4": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "layer_types": _SHARING,
        "num_kv_shared_layers": 3,  # layers 3 and 5 read the pairs of 2, layer 4 those of 1
        "sliding_window": 8,
        "global_head_dim": 32,  # of full attention; sliding layers have head_dim
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
    },
}
"""Supported architectures by name, with their changes to ``COMMON``."""

REFUSED: dict[str, Config] = {
    "deepseek_v3": _EXPERTS
    | {
        "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    "jetmoe": _EXPERTS | {"kv_channels": 16, "num_local_experts": 4},
    "diffllama": {},
    "bloom": {},
}
"""Architectures whose attention a per-head cache cannot serve; they build, so refusals are tested."""

_VL: Config = {
    "text_config": COMMON | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    },
    "image_token_id": 124,
    "video_token_id": 125,
    "vision_start_token_id": 126,
    "vision_end_token_id": 127,
}


def tiny(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Return a random-weight model of an architecture in ``TINY`` or ``REFUSED``, in eval mode.

    Equal arguments give equal weights; the global random state is not moved. Weights are spread
    so widely that attention is far from uniform and every visible key matters to the logits.

    Args:
        name: A key of ``TINY`` or ``REFUSED``.
        seed: Seed of the weights, which are drawn in float32 and then cast.
        dtype: Dtype of the weights.
        overrides: Changes to the config, e.g. ``num_hidden_layers=2``.

    Raises:
        ValueError: The name is unknown; the message lists the valid ones.
    """
    known = TINY | REFUSED
    if name not in known:
        raise ValueError(f"unknown tiny model {name!r}; available: {', '.join(known)}")
    settings = deepcopy(COMMON | known[name] | overrides)  # configs modify their arguments
    config = AutoConfig.for_model(settings.pop("model_type", name), **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _redraw_weights(AutoModelForCausalLM.from_config(config), dtype)


def tiny_vl(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, grid: tuple[int, int] = (4, 4)
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return a tiny Qwen2.5-VL and the inputs of one prompt: text, one image, text.

    The inputs are those of a processor: ``input_ids``, ``attention_mask``, ``mm_token_type_ids``,
    each of shape (1, 20 + rows * columns), ``pixel_values`` and ``image_grid_thw``.

    Args:
        seed: Seed of weights, ids and pixels.
        dtype: Dtype of weights and pixels.
        grid: Rows and columns of image tokens.
    """
    rows, columns = grid
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _redraw_weights(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**deepcopy(_VL))), dtype)
        pixels = torch.randn(4 * rows * columns, 3 * 2 * 4 * 4).to(dtype)  # colours, frames, height, width of a patch
    text = random_ids(model, 1, 18, seed)
    image = _VL["image_token_id"]
    picture = torch.tensor([[_VL["vision_start_token_id"], *[image] * (rows * columns), _VL["vision_end_token_id"]]])
    ids = torch.cat([text[:, :6], picture, text[:, 6:]], dim=1)
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image).long(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
    }


def random_ids(model: PreTrainedModel | int, batch: int, length: int, seed: int = 0) -> Int[Tensor, "batch length"]:
    """Return random ids of a model's vocabulary (or of a size), without the pad and special ids."""
    size = model if isinstance(model, int) else model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, size - SPECIAL, (batch, length), generator=generator)


def left_padded(
    model: PreTrainedModel | int, lengths: list[int], seed: int = 0
) -> tuple[Int[Tensor, "batch longest"], Int[Tensor, "batch longest"]]:
    """Return random ids of unequal lengths, left-padded with id 0, and their attention mask."""
    longest = max(lengths)
    pads = longest - torch.tensor(lengths)
    mask = (torch.arange(longest) >= pads[:, None]).long()
    return random_ids(model, len(lengths), longest, seed) * mask, mask


def full_layers(model: PreTrainedModel) -> list[int]:
    """Return the indices of the layers that keep all of their own pairs: full attention, not KV-shared."""
    layers = DynamicCache(config=model.config).layers
    return [layer_idx for layer_idx, layer in enumerate(layers) if type(layer) is DynamicLayer]


def random_deaths(
    model: PreTrainedModel, batch: int, seen: int, seed: int = 0
) -> dict[int, Int[Tensor, "batch kv_heads seen"]]:
    """Return random deaths for ``masked_logits``, of about half the pairs, different in each row.

    A pair that dies is seen at least by the query of its own token.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.config.get_text_config().num_key_value_heads, seen)
    deaths = {}
    for layer_idx in full_layers(model):
        age = 1 + torch.randint(seen, shape, generator=generator)
        lives = torch.rand(shape, generator=generator) < 0.5
        deaths[layer_idx] = torch.where(lives, NEVER, torch.arange(seen) + age)
    return deaths


def bury(
    deaths: Int[Tensor, "batch kv_heads seen"], held: Bool[Tensor, "batch kv_heads seen"], now: int
) -> Int[Tensor, "batch kv_heads seen"]:
    """Return deaths in which the pairs older than ``now`` that are not held died at ``now`` or before.

    Call it after each eviction, with ``now`` the padded index of the next query, to record the
    eviction for ``masked_logits``. The argument is not modified.
    """
    evicted = ~held & (torch.arange(held.shape[-1], device=held.device) < now)
    return torch.where(evicted, deaths.clamp(max=now), deaths)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Switch the text decoder to the attention registered as ``name``; it is restored on exit, even after an error."""
    config = _text_config(model)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def masked_logits(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch new"],
    deaths: Deaths,
    *,
    attention_mask: Int[Tensor, "batch given"] | None = None,
    position_ids: Int[Tensor, "... new"] | None = None,
    **inputs: Any,
) -> Float[Tensor, "batch new vocab"]:
    """Return the logits of all ids when pairs die on the way: one dense forward without a cache.

    It is the reference of invariant 1, *evicting equals masking*. Attention is the plain
    formula; the model's attention setting is restored. Rows of pads hold arbitrary numbers.

    Args:
        model: Any model that reads its attention from transformers' ``AttentionInterface``.
        input_ids: All ids of the model so far, pads and generated tokens included.
        deaths: For each layer the first query that no longer sees a pair: query t sees key i of a row if
            ``i <= t < deaths[layer_idx][batch, kv_head, i]`` and i is no pad. t and i count pads.
            A layer that is absent uses the model's own mask. A layer that reads the pairs of
            another (KV sharing) follows the deaths of that one and may not be named.
        attention_mask: 0 at pads. A shorter one is continued with 1: generated tokens.
        position_ids: Positions as the model takes them. By default counted without the pads, as ``generate``
            does; models with several inputs derive them.
        inputs: Passed to the model. A shorter ``mm_token_type_ids`` is continued with 0: text.

    Raises:
        ValueError: A layer has no pairs of its own, deaths do not cover ``input_ids``, or a mask is longer.
    """
    config = _text_config(model)
    owners = _owners(config)
    _check_deaths(deaths, owners, input_ids)
    length = input_ids.shape[1]
    if attention_mask is None:  # without a mask, transformers takes gaps in positions for packed sequences
        attention_mask = torch.ones_like(input_ids)
    attention_mask = _extend(attention_mask, length, 1)
    if position_ids is None and config is model.config:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = _extend(inputs["mm_token_type_ids"], length, 0)

    name = "vestige_oracle"
    by_layer = {layer_idx: deaths[owner] for layer_idx, owner in owners.items() if owner in deaths}
    AttentionInterface.register(name, partial(_mortal_attention, deaths=by_layer))
    AttentionMaskInterface.register(name, _whole_mask)
    with attention(model, name):
        positions = {} if position_ids is None else {"position_ids": position_ids}
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions, **inputs)
    logits: Tensor = output.logits
    return logits


def _mortal_attention(
    module: Any,
    query: Float[Tensor, "batch heads new head_dim"],
    key: Float[Tensor, "batch kv_heads new head_dim"],
    value: Float[Tensor, "batch kv_heads new value_dim"],
    attention_mask: Bool[Tensor, "#batch 1 new new"],
    *,
    deaths: Deaths,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "batch new heads value_dim"], None]:
    """Compute softmax attention by the formula over the pairs that each query still sees.

    Source: ``eager_attention_forward`` of gemma2 (softcap) and gpt_oss (sinks) in transformers 5.23.
    Differs: the mask is boolean and per head; the softmax is never narrower than float32.
    """
    queries_per_kv = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(queries_per_kv, dim=1) for states in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    visible = attention_mask
    if module.layer_idx in deaths:
        now = torch.arange(query.shape[2], device=query.device)
        alive = now[:, None] < deaths[module.layer_idx][:, :, None, :].to(query.device)
        visible = visible & alive.repeat_interleave(queries_per_kv, dim=1)  # (batch, heads, new, new)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)

    if s_aux is not None:  # a sink takes its share of the softmax and gives nothing
        sinks = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide)[..., : key.shape[2]].to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the config object that the attention modules of the text decoder read."""
    decoder: PreTrainedModel = model.get_decoder()
    return decoder.config


def _whole_mask(**arguments: Any) -> Bool[Tensor, "#batch 1 new new"] | None:
    """Return the boolean mask of sdpa, made even where sdpa needs none."""
    return sdpa_mask(**(arguments | {"allow_is_causal_skip": False}))


def _owners(config: PreTrainedConfig) -> dict[int, int]:
    """Return for each layer the one whose pairs it reads: itself, or under KV sharing the last of its type with any."""
    num_layers = config.num_hidden_layers
    first_shared = num_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    owners = {layer_idx: layer_idx for layer_idx in range(first_shared)}
    for layer_idx in range(first_shared, num_layers):
        kind = config.layer_types[layer_idx]
        owners[layer_idx] = max(i for i in range(first_shared) if config.layer_types[i] == kind)
    return owners


def _check_deaths(deaths: Deaths, owners: Mapping[int, int], input_ids: Int[Tensor, "batch new"]) -> None:
    batch, length = input_ids.shape
    for layer_idx, times in deaths.items():
        if owners.get(layer_idx) != layer_idx:
            valid = sorted(set(owners.values()))
            raise ValueError(f"layer {layer_idx} has no pairs of its own; layers that do: {valid}")
        if (times.shape[0], times.shape[-1]) != (batch, length):
            raise ValueError(
                f"deaths of layer {layer_idx} have shape {tuple(times.shape)},"
                f" expected (batch={batch}, kv_heads, seen={length})"
            )


def _extend(row: Int[Tensor, "batch given"], length: int, value: int) -> Int[Tensor, "batch length"]:
    if row.shape[1] > length:
        raise ValueError(f"a mask of length {row.shape[1]} for input_ids of length {length}; expected at most {length}")
    return nn.functional.pad(row, (0, length - row.shape[1]), value=value)


def _redraw_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Redraw the weights from the global random state, cast them, and let generation run its full length.

    The spread makes attention uneven, but keeps float32 noise in the logits near 1e-6.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2 if "embed" in name else 0.1)
            else:  # norms and biases are moved away from 1 and 0; attention sinks weigh like a key
                weight.add_(torch.randn_like(weight), alpha=1.0 if name.endswith("sinks") else 0.1)
        modules: Iterator[Any] = model.modules()
        for module in modules:
            if getattr(module, "scaling", None) == 1.0:  # gemma4 keeps its scaling in a learned norm
                module.q_norm.weight.mul_(module.head_dim**-0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    nn.Module.to(model, dtype)
    nn.Module.eval(model)
    return model


def watch(cache: Any) -> dict[int, Int[Tensor, "_batch _kv_heads _seen"]]:
    """Return deaths for ``masked_logits``, updated at every later settle of a ``vestige.KVCache``."""
    deaths: dict[int, Tensor] = {}
    settle = cache.settle

    def settle_and_bury(**options: Any) -> None:
        settle(**options)
        now = cache.get_seq_length()
        for layer in cache.evictable:
            held = held_mask(cache, layer)
            before = deaths.get(layer.layer_idx, torch.empty(*held.shape[:2], 0, dtype=torch.long))
            before = nn.functional.pad(before, (0, now - before.shape[-1]), value=NEVER)
            deaths[layer.layer_idx] = bury(before, held, now)

    cache.settle = settle_and_bury
    return deaths


def held_mask(cache: Any, layer: Any) -> Bool[Tensor, "batch kv_heads padded_seen"]:
    """Return for each row of a layer a mask of the fed tokens that it holds; pads count as not held."""
    held = torch.zeros(layer.batch_size, layer.kv_heads, cache.real.shape[1], dtype=torch.bool)
    for row in range(layer.rows):
        batch_idx, head = divmod(row, layer.kv_heads)
        column_of = cache.real[batch_idx].nonzero()[:, 0]  # of each position
        positions = layer.positions(row).long()
        held[batch_idx, head, column_of[positions[positions >= 0]]] = True
    return held


def covering(deaths: Deaths, length: int) -> dict[int, Int[Tensor, "_batch _kv_heads length"]]:
    """Return deaths extended to ``length`` tokens; the added ones never die."""
    return {i: nn.functional.pad(d, (0, length - d.shape[-1]), value=NEVER) for i, d in deaths.items()}
