"""What a policy sees: a layer when room must be made, a row while it is read; and the attention it may derive."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, pad
from transformers import PreTrainedModel

from vestige.kernels import AttentionScale
from vestige.models.rope import Rope

OUTLIERS = 4
"""First tokens, whose queries and keys are unlike all others: statistics leave them out."""


class Moments(NamedTuple):
    """Mean and covariance of a batch row's queries before RoPE, by query head, in float32; zeros if there were none."""

    mean: Float[Tensor, "heads dim"]
    covariance: Float[Tensor, "heads dim dim"]


class Phase(Enum):
    """When a settle happens: while a text is read, or after tokens were generated."""

    PREFILL = "prefill"
    DECODE = "decode"


class Row(NamedTuple):
    """One packed row of an observation: its batch row, KV head and slice of the packed tensors."""

    batch: int
    kv_head: int
    pairs: slice


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One layer at the moment of a settle, packed: row r owns pairs ``cu_seqlens[r]:cu_seqlens[r + 1]``.

    Rows are in (batch, kv_head) order, pairs of a row in time order. Pads are not among them.

    Args:
        layer_idx: Index of the layer in the model.
        phase: Whether a text is being read or tokens were generated.
        kv_heads: KV heads of the layer; ``len(cu_seqlens) - 1 == batch * kv_heads``.
        seen: Logical length of each batch row.
        pair_limits: Average pairs per row that each batch row may hold after this settle.
        positions: Position of each pair in the sequence as seen.
        keys: Keys as stored: after RoPE.
        values: Values as stored.
        queries: Per batch row the latest queries, oldest first, ``heads latest head_dim``, after RoPE; the last one
            is at position ``seen - 1``. Empty unless the policy needs ``"queries"``.
        hidden: Per batch row what the latest tokens brought into the attention module, oldest first, ``latest
            hidden``; the last one is at position ``seen - 1``. Empty unless the policy looks back at it.
        query_moments: Per batch row mean and covariance of all queries, before RoPE. Empty unless the policy needs
            ``"query_moments"``.
        rope: How the model's layers turn keys, if a policy needs ``"rope"``.
        module: The layer's attention module, for methods that call its projections; never to be changed.
        model: The whole model, for policies that bring something made for it.
        attention: How the layer weighs query-key products, if queries were observed.
        annotations: Per-pair side arrays that the policy wrote when the pairs were stored.
        earlier: The scores that it gave to layers before this one, by layer index.
    """

    layer_idx: int
    phase: Phase
    kv_heads: int
    seen: tuple[int, ...]
    pair_limits: tuple[int, ...] = ()
    cu_seqlens: tuple[int, ...]
    positions: Int[Tensor, " held"]
    keys: Float[Tensor, "held head_dim"]
    values: Float[Tensor, "held value_dim"]
    queries: tuple[Float[Tensor, "heads _latest head_dim"], ...] = ()
    hidden: tuple[Float[Tensor, "_latest hidden"], ...] = ()
    query_moments: tuple[Moments, ...] = ()
    rope: Rope | None = None
    module: nn.Module | None = None
    model: PreTrainedModel | None = None
    attention: AttentionScale | None = None
    annotations: Mapping[str, Tensor] = field(default_factory=dict)
    earlier: Mapping[int, Float[Tensor, " _held"]] = field(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        """Yield every row that holds a pair, with its slice of the packed tensors."""
        for index, (start, end) in enumerate(pairwise(self.cu_seqlens)):
            if end > start:
                yield Row(index // self.kv_heads, index % self.kv_heads, slice(start, end))


@dataclass(frozen=True, kw_only=True)
class RowView:
    """One row of a layer while new queries attend to it, their own pairs included. Views of live storage.

    Args:
        layer_idx: Index of the layer in the model.
        batch: The row's batch row.
        kv_head: The row's KV head.
        queries: New queries of the heads that read this row, after RoPE.
        at: Position of each new query; pads are left out.
        attention: How these heads weigh query-key products.
        positions: Position of each pair; -1 for pads, which no query sees.
        keys: Keys as stored: after RoPE.
        values: Values as stored.
        annotations: The row's side arrays, which the policy that owns them may write in place.
    """

    layer_idx: int
    batch: int = 0
    kv_head: int
    queries: Float[Tensor, "queries_per_kv new head_dim"]
    at: Int[Tensor, " new"]
    attention: AttentionScale
    positions: Int[Tensor, " row_held"]
    keys: Float[Tensor, "row_held head_dim"]
    values: Float[Tensor, "row_held value_dim"]
    annotations: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One batch row of a layer while new tokens attend to it: all its rows together, and what made the queries.

    Args:
        layer_idx: Index of the layer in the model.
        model: The whole model, for policies that bring something made for it.
        queries: New queries of all heads, after RoPE; pads are left out.
        hidden: What entered the attention module with them, if a policy needs ``"hidden"``.
        at: Position of each new query.
        see: Makes the glances at each row.
        slots: The side arrays of all rows behind each other, with free slots among them, which may be written but mean
            nothing: what takes one operation for all rows need not take one for each.
        heads: The KV head of each slot.
    """

    layer_idx: int
    model: PreTrainedModel
    queries: Float[Tensor, "heads new head_dim"]
    hidden: Float[Tensor, "new hidden"] | None
    at: Int[Tensor, " new"]
    see: Callable[[], tuple[RowView, ...]]
    slots: Mapping[str, Tensor]
    heads: Int[Tensor, " slots"]

    @cached_property
    def rows(self) -> tuple[RowView, ...]:
        """A glance at each row, by KV head."""
        return self.see()


def observed_attention(
    seen: Observation, row: Row, observed: int
) -> tuple[Float[Tensor, "queries_per_kv latest row_held"], int]:
    """Return the attention that the latest queries pay to one row's pairs, and the first query's position.

    Args:
        seen: The layer.
        row: The row whose pairs are looked at.
        observed: Queries wanted; fewer come back if fewer were seen.
    """
    assert seen.attention is not None, "the cache records queries for every policy that needs them"
    queries = seen.queries[row.batch][:, -observed:]
    first = seen.seen[row.batch] - queries.shape[1]
    at = torch.arange(first, seen.seen[row.batch], device=queries.device)
    scale = seen.attention.of_group(row.kv_head, seen.kv_heads)
    group = queries.chunk(seen.kv_heads)[row.kv_head]
    return attention_weights(group, at, seen.keys[row.pairs], seen.positions[row.pairs], scale), first


def attention_weights(
    queries: Float[Tensor, "queries_per_kv some head_dim"],
    at: Int[Tensor, " some"],
    keys: Float[Tensor, "row_held head_dim"],
    positions: Int[Tensor, " row_held"],
    scale: AttentionScale,
) -> Float[Tensor, "queries_per_kv some row_held"]:
    """Return softmax attention over the pairs of a row, in float32, causally by position, pads unseen.

    Args:
        queries: Queries of the heads that read the row.
        at: Position of each query.
        keys: Keys of the row.
        positions: Position of each pair; -1 for pads.
        scale: Factor, softcap and sinks of these heads.
    """
    logits = scale.capped(queries.float() @ keys.float().T * scale.scaling)
    pads, late = positions < 0, (positions > at[:1]).nonzero()
    tail = int(late[0]) if len(late) else len(positions)  # no query is too early for what comes before
    if bool(pads.any()):
        logits.masked_fill_(pads, -torch.inf)
    logits[..., tail:].masked_fill_(positions[tail:] > at[:, None], -torch.inf)
    if scale.sinks is None:
        weights = logits.softmax(-1)
        # A query older than all that the row holds sees nothing: 0, where softmax gives NaN.
        return weights if bool((~pads[:tail]).any()) else weights.nan_to_num_(0.0)
    sink = scale.sinks.float()[:, None, None].expand(-1, logits.shape[1], 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]


def over_heads(seen: Observation, scores: Float[Tensor, " held"]) -> Float[Tensor, " held"]:
    """Return each token's mean score over the KV heads that hold it, the same for all of them.

    Args:
        seen: The layer.
        scores: Of its pairs.
    """
    means = torch.empty_like(scores)
    for b, length in enumerate(seen.seen):
        pairs = slice(*(seen.cu_seqlens[row * seen.kv_heads] for row in (b, b + 1)))
        at = seen.positions[pairs].long()
        total, holders = scores.new_zeros(2, length)
        total.index_add_(0, at, scores[pairs])
        holders.index_add_(0, at, torch.ones_like(scores[pairs]))
        means[pairs] = total[at] / holders[at]
    return means


def pooled(scores: Float[Tensor, " row_held"], kernel: int, causal: bool = False) -> Float[Tensor, " row_held"]:
    """Return averages over ``kernel`` neighbouring pairs (odd), zeros beyond the ends.

    An important token brings its neighbours; after an eviction these are the neighbours that are left.

    Args:
        scores: Of one row, in time order.
        kernel: Pairs that are averaged.
        causal: Average a pair with those before it, so that a score reaches only the tokens that come after.
    """
    before = kernel - 1 if causal else kernel // 2
    return avg_pool1d(pad(scores[None], (before, kernel - 1 - before)), kernel, stride=1)[0]
