"""Differentiable attention that fades with a pair's age, to train gates: ``softmax(q.k + (t - i) log beta_i)``.

It is for training only; in use, attention is ordinary and runs over the kept pairs. A sequence may hold several
documents. Gates belong to full-attention layers, and there no document sees another one.

Source: TRIM-KV, arXiv 2512.03324: retention is added to the logits.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from vestige.cache.attention import vestige_attention
from vestige.kernels import AttentionScale, reference
from vestige.models.layout import ModelLayout, attention_input, check
from vestige.nn.retention_gates import Gates

NAME = "vestige_gated"
BLOCK = 256
"""Queries computed together."""

Queries = Float[Tensor, "1 heads new head_dim"]
Keys = Float[Tensor, "1 kv_heads tokens head_dim"]
Values = Float[Tensor, "1 kv_heads tokens value_dim"]
AttentionOutput = Float[Tensor, "1 heads new value_dim"]

Attend = Callable[[Queries, Keys, Values, int, AttentionScale], AttentionOutput]
"""Attention of new tokens over the pairs of all tokens, the new ones last. The other arguments are the index of the
layer that wrote the pairs, and factor, softcap and sinks."""


@dataclass(eq=False)
class GatedAttention:
    """Attention that fades by the gates, over several documents.

    Args:
        starts: Position at which the document of each token begins.
        gates: The gates; None forgets nothing.
        log_beta: Log beta of the pairs of each evictable layer, filled while the model runs, ``1 kv_heads tokens``.
    """

    starts: Int[Tensor, " tokens"]
    gates: Gates | None = None
    log_beta: dict[int, Float[Tensor, "1 _kv_heads tokens"]] = field(default_factory=dict)

    @property
    def positions(self) -> Int[Tensor, "1 tokens"]:
        """Position of each token in its document: the model's ``position_ids``."""
        return (torch.arange(len(self.starts), device=self.starts.device) - self.starts)[None]

    def fade(self, layer_idx: int, hidden: Float[Tensor, "1 tokens hidden"]) -> None:
        """Compute log beta of a layer's pairs from its hidden states."""
        if self.gates is not None:
            self.log_beta[layer_idx] = self.gates(layer_idx, hidden)

    def packed_log_beta(self) -> Float[Tensor, "rows tokens"]:
        """Return log beta of the rows of all layers."""
        return torch.cat([self.log_beta[layer_idx][0] for layer_idx in sorted(self.log_beta)])

    def attend(
        self, query: Queries, keys: Keys, values: Values, layer_idx: int, scale: AttentionScale
    ) -> AttentionOutput:
        """Attend causally within each document, in blocks of queries that the backward pass recomputes."""
        log_beta = self.log_beta.get(layer_idx)
        blocks = [
            checkpoint(self._block, query, keys, values, log_beta, start, scale, use_reentrant=False)
            for start in range(0, query.shape[2], BLOCK)
        ]
        return torch.cat(blocks, 2)

    def _block(
        self, query: Tensor, keys: Tensor, values: Tensor, log_beta: Tensor | None, start: int, scale: AttentionScale
    ) -> Tensor:
        end = min(start + BLOCK, query.shape[2])
        begin = int(self.starts[start])
        at, pairs = (torch.arange(*ends, device=query.device) for ends in ((start, end), (begin, end)))
        age = at[:, None] - pairs
        seen = (age >= 0) & (pairs >= self.starts[start:end, None])
        mask = torch.zeros(age.shape, device=query.device).masked_fill(~seen, torch.finfo(query.dtype).min)
        if log_beta is not None:
            faded = age.clamp_min(0) * log_beta[:, :, None, begin:end]  # (1, kv_heads, queries, pairs)
            mask = mask + faded.repeat_interleave(query.shape[1] // keys.shape[1], 1)
        visible = slice(begin, end)
        return reference.written_out(query[:, :, start:end], keys[:, :, visible], values[:, :, visible], mask, scale)


@contextmanager
def use_gates(model: PreTrainedModel, gating: GatedAttention) -> Iterator[None]:
    """Fade the attention of a model's full-attention layers by gates within the block.

    Args:
        model: Call it with the ids of one row, ``position_ids=gating.positions``, and no cache.
        gating: The model's calls fill its ``log_beta``.
    """
    with hook_inputs(model, gating.fade), use_attention(model, gating.attend):
        yield


@contextmanager
def record_hidden_states(model: PreTrainedModel) -> Iterator[dict[int, Float[Tensor, "batch new hidden"]]]:
    """Record the input of each evictable layer's attention in the first forward pass: the input of the gates."""
    states: dict[int, Tensor] = {}
    with hook_inputs(model, states.setdefault):
        yield states


@contextmanager
def hook_inputs(model: PreTrainedModel, receive: Callable[[int, Tensor], object]) -> Iterator[None]:
    """Call a function with the index and the attention's input of each evictable layer within the block."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer_idx: Any = module.layer_idx
        receive(layer_idx, attention_input(args, kwargs))

    with ExitStack() as stack:
        for module in check(model).attentions.values():
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def use_attention(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Replace the attention of a model's full-attention layers within the block."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    anatomy = check(model)
    config: Any = anatomy.decoder.config
    before = config._attn_implementation_internal
    with ExitStack() as stack:
        for module, layer_idx in _readers(anatomy):
            _running[module] = attend, layer_idx
            stack.callback(_running.pop, module, None)
        config._attn_implementation_internal = NAME
        stack.callback(setattr, config, "_attn_implementation_internal", before)
        yield


_running: dict[nn.Module, tuple[Attend, int]] = {}
"""Replacement by attention module, with the index of the layer whose pairs the module reads."""


def _readers(anatomy: ModelLayout) -> Iterator[tuple[nn.Module, int]]:
    """Yield the modules that read evictable pairs, each with the layer that writes them; the last one if shared."""
    yield from ((module, layer_idx) for layer_idx, module in anatomy.attentions.items())
    config: Any = anatomy.decoder.config
    for module in anatomy.decoder.modules():
        if getattr(module, "is_kv_shared_layer", False):
            layer_idx: Any = module.layer_idx
            if config.layer_types[layer_idx] == "full_attention":
                yield module, max(anatomy.evictable)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with transformers' signature; layers without a replacement attend as usual."""
    if (found := _running.get(module)) is None:
        return vestige_attention(
            module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, s_aux=s_aux, **kwargs
        )
    scale = AttentionScale(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    attend, layer_idx = found
    return attend(query, key, value, layer_idx, scale).transpose(1, 2).contiguous(), None
