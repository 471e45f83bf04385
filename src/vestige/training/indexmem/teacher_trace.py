"""One reading of a text by the frozen model: all that an indexer and a memory are trained on."""

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
    """What one layer made of a text, in float32.

    Args:
        layer_idx: Index of the layer in the model.
        queries: Of all heads, after RoPE.
        hidden: What entered attention.
        keys: After RoPE.
        values: As they are stored.
        scale: Of all heads.
    """

    layer_idx: int
    queries: Float[Tensor, "heads tokens head_dim"]
    hidden: Float[Tensor, "tokens hidden"]
    keys: Float[Tensor, "kv_heads tokens head_dim"]
    values: Float[Tensor, "kv_heads tokens value_dim"]
    scale: AttentionScale

    def logits(self, asking: slice) -> Float[Tensor, "heads asking stop"]:
        """Return scaled products of some queries with all keys up to theirs, causally."""
        keys = self.keys[:, : asking.stop].repeat_interleave(len(self.queries) // len(self.keys), 0)
        found = self.scale.capped(self.queries[:, asking] @ keys.mT * self.scale.scaling)
        places = torch.arange(asking.stop, device=keys.device)
        return found.masked_fill(places > places[asking, None], -torch.inf)

    def weigh(self, logits: Float[Tensor, "heads asking stop"]) -> Float[Tensor, "heads asking"]:
        """Return the log of what the softmax of some logits divides by, sinks included."""
        lse = logits.logsumexp(-1)
        return lse if self.scale.sinks is None else torch.logaddexp(lse, self.scale.sinks[:, None])


@torch.no_grad()
def trace_text(model: PreTrainedModel, ids: Int[Tensor, "1 tokens"]) -> list[LayerTrace]:
    """Return what every evictable layer made of some ids."""
    recorder = _Recorder()
    with attach(model):
        prefill(model, ids, KVCache(model, recorder), chunk=ids.shape[1])
    return [_layer(glance) for glance in recorder.glances]


@dataclass(frozen=True, kw_only=True)
class _Recorder(Full):
    """Keeps all pairs, and what it is shown."""

    glances: list[LayerView] = field(default_factory=list, compare=False)
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def watch_layer(self, glance: LayerView) -> None:
        self.glances.append(glance)


def _layer(glance: LayerView) -> LayerTrace:
    assert glance.hidden is not None, "it was asked for"
    keys, values = (torch.stack([getattr(row, name) for row in glance.rows]).float() for name in ("keys", "values"))
    whole = [row.attention for row in glance.rows]
    sinks = None if whole[0].sinks is None else torch.cat([one.sinks for one in whole if one.sinks is not None])
    return LayerTrace(
        layer_idx=glance.layer_idx,
        queries=glance.queries.float(),
        hidden=glance.hidden.float(),
        keys=keys,
        values=values,
        scale=AttentionScale(whole[0].scaling, whole[0].softcap, None if sinks is None else sinks.detach().float()),
    )
