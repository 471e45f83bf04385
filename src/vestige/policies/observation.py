"""Views that policies get: an `Observation` of a layer at an eviction, a `RowView` or `LayerView` while it attends."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
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
    """When an eviction happens: while a text is read, or after tokens were generated."""

    PREFILL = "prefill"
    DECODE = "decode"


class Row(NamedTuple):
    """One packed row of an observation: its batch row, KV head and slice of the packed tensors."""

    batch: int
    kv_head: int
    pairs: slice


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One layer at an eviction, packed: row r owns pairs ``cu_seqlens[r]:cu_seqlens[r + 1]``.

    Rows are in (batch, kv_head) order, pairs of a row in time order. Pads are left out.

    Args:
        layer_idx: Index of the layer in the model.
        phase: Whether a text is being read or tokens were generated.
        kv_heads: KV heads of the layer; ``len(cu_seqlens) - 1 == batch * kv_heads``.
        seen: Logical length of each batch row.
        pair_limits: Average pairs per row that each batch row may hold after this eviction.
        positions: Position of each pair in the sequence as seen.
        keys: Keys as stored: after RoPE.
        values: Values as stored.
        queries: Latest queries of each batch row, oldest first, ``heads latest head_dim``, after RoPE; the last one
            is at position ``seen - 1``. Empty unless the policy needs ``"queries"``.
        hidden: Attention inputs of the latest tokens of each batch row, oldest first, ``latest hidden``; the last one
            is at position ``seen - 1``. Empty unless the policy sets ``hidden_observed``.
        query_moments: Mean and covariance of all queries of each batch row, before RoPE. Empty unless the policy needs
            ``"query_moments"``.
        rope: Rotation of the model's layers, if a policy needs ``"rope"``.
        module: The layer's attention module, for methods that call its projections; never to be changed.
        model: The whole model, for policies with weights made for it.
        attention: Factor, softcap and sinks of the layer, if queries were observed.
        annotations: Side arrays that the policy keeps beside the pairs.
        earlier: Scores that the policy gave to earlier layers, by layer index.
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
        """Yield every row that holds a pair."""
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
        query_positions: Position of each new query; pads are left out.
        attention: Factor, softcap and sinks of these heads.
        positions: Position of each pair; -1 for pads, which no query sees.
        keys: Keys as stored: after RoPE.
        values: Values as stored.
        annotations: The row's side arrays, which the policy that owns them may write in place.
    """

    layer_idx: int
    batch: int = 0
    kv_head: int
    queries: Float[Tensor, "queries_per_kv new head_dim"]
    query_positions: Int[Tensor, " new"]
    attention: AttentionScale
    positions: Int[Tensor, " row_held"]
    keys: Float[Tensor, "row_held head_dim"]
    values: Float[Tensor, "row_held value_dim"]
    annotations: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """One batch row of a layer while new tokens attend to it: all its KV heads, and the hidden states of the tokens.

    Args:
        layer_idx: Index of the layer in the model.
        model: The whole model, for policies with weights made for it.
        queries: New queries of all heads, after RoPE; pads are left out.
        hidden: Attention inputs of the same tokens, if a policy needs ``"hidden"``.
        query_positions: Position of each new query.
        make_rows: Makes a view of each row.
        slots: Side arrays of all rows, concatenated, so that one operation can serve all rows. Free slots are among
            them; these may be written and have no meaning.
        heads: The KV head of each slot.
    """

    layer_idx: int
    model: PreTrainedModel
    queries: Float[Tensor, "heads new head_dim"]
    hidden: Float[Tensor, "new hidden"] | None
    query_positions: Int[Tensor, " new"]
    make_rows: Callable[[], tuple[RowView, ...]]
    slots: Mapping[str, Tensor]
    heads: Int[Tensor, " slots"]

    @cached_property
    def rows(self) -> tuple[RowView, ...]:
        """A view of each row, by KV head."""
        return self.make_rows()
