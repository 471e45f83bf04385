"""Record the queries, keys, values and hidden states of a text: the training data of an indexer and a memory."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.cache.attach import attach
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill
from vestige.kernels import AttentionScale
from vestige.policies.full import Full
from vestige.policies.observation import LayerView


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """The tensors of one layer for a text, in float32.

    Args:
        layer_idx: Index of the layer in the model.
        queries: Queries of all heads, after RoPE.
        hidden: Hidden states that entered attention.
        keys: Keys after RoPE.
        values: Values as a cache stores them.
        scale: Attention scale of all heads.
    """

    layer_idx: int
    queries: Float[Tensor, "heads tokens head_dim"]
    hidden: Float[Tensor, "tokens hidden"]
    keys: Float[Tensor, "kv_heads tokens head_dim"]
    values: Float[Tensor, "kv_heads tokens value_dim"]
    scale: AttentionScale

    def logits(self, asking: slice) -> Float[Tensor, "heads asking stop"]:
        """Return the causally masked logits of a range of queries over all keys up to its end."""
        keys = self.keys[:, : asking.stop].repeat_interleave(len(self.queries) // len(self.keys), 0)
        found = self.scale.capped(self.queries[:, asking] @ keys.mT * self.scale.scaling)
        places = torch.arange(asking.stop, device=keys.device)
        return found.masked_fill(places > places[asking, None], -torch.inf)

    def log_normalizer(self, logits: Float[Tensor, "heads asking stop"]) -> Float[Tensor, "heads asking"]:
        """Return the log of the softmax denominator of some logits, sinks included."""
        lse = logits.logsumexp(-1)
        return lse if self.scale.sinks is None else torch.logaddexp(lse, self.scale.sinks[:, None])


@torch.no_grad()
def trace_text(model: PreTrainedModel, ids: Int[Tensor, "1 tokens"]) -> list[LayerTrace]:
    """Return the trace of every evictable layer for some ids."""
    recorder = _Recorder()
    with attach(model):
        prefill(model, ids, KVCache(model, recorder), chunk=ids.shape[1])
    return [_trace_layer(glance) for glance in recorder.glances]


@dataclass(frozen=True, kw_only=True)
class _Recorder(Full):
    """A policy that keeps all pairs, and records what it observes."""

    glances: list[LayerView] = field(default_factory=list, compare=False)
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def watch_layer(self, glance: LayerView) -> None:
        self.glances.append(glance)


def _trace_layer(glance: LayerView) -> LayerTrace:
    assert glance.hidden is not None, "the recorder needs hidden states"
    keys, values = (torch.stack([getattr(row, name) for row in glance.rows]).float() for name in ("keys", "values"))
    scales = [row.attention for row in glance.rows]
    sinks = None if scales[0].sinks is None else torch.cat([scale.sinks for scale in scales if scale.sinks is not None])
    return LayerTrace(
        layer_idx=glance.layer_idx,
        queries=glance.queries.float(),
        hidden=glance.hidden.float(),
        keys=keys,
        values=values,
        scale=AttentionScale(scales[0].scaling, scales[0].softcap, None if sinks is None else sinks.detach().float()),
    )
