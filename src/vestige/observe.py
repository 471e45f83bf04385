"""What a policy sees of one layer when room must be made, and the attention statistics it may derive from it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.kernels import AttentionScale


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
        positions: Position of each pair in the sequence as seen.
        keys: Keys as stored: after RoPE.
        values: Values as stored.
        queries: Per batch row the latest queries, oldest first, ``heads latest head_dim``, after RoPE; the last one
            is at position ``seen - 1``. Empty unless the policy needs ``"queries"``.
        attention: How the layer weighs query-key products, if queries were observed.
        annotations: Per-pair side arrays that the policy wrote when the pairs were stored.
    """

    layer_idx: int
    phase: Phase
    kv_heads: int
    seen: tuple[int, ...]
    cu_seqlens: tuple[int, ...]
    positions: Int[Tensor, " held"]
    keys: Float[Tensor, "held head_dim"]
    values: Float[Tensor, "held value_dim"]
    queries: tuple[Float[Tensor, "heads _latest head_dim"], ...] = ()
    attention: AttentionScale | None = None
    annotations: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        """Yield every row that holds a pair, with its slice of the packed tensors."""
        for index, (start, end) in enumerate(pairwise(self.cu_seqlens)):
            if end > start:
                yield Row(index // self.kv_heads, index % self.kv_heads, slice(start, end))


def observed_attention(
    seen: Observation, row: Row, observed: int
) -> tuple[Float[Tensor, "queries_per_kv latest row_held"], int]:
    """Return the attention that the latest queries pay to one row's pairs, and the first query's position.

    The softmax runs over the pairs held now, in float32, causally by position, with the layer's softcap and sinks.

    Args:
        seen: The layer.
        row: The row whose pairs are looked at.
        observed: Queries wanted; fewer come back if fewer were seen.
    """
    scale = seen.attention
    assert scale is not None, "the cache records queries for every policy that needs them"
    queries = seen.queries[row.batch][:, -observed:]
    groups = queries.shape[0] // seen.kv_heads
    heads = slice(row.kv_head * groups, (row.kv_head + 1) * groups)
    first = seen.seen[row.batch] - queries.shape[1]
    logits = queries[heads].float() @ seen.keys[row.pairs].float().T * scale.scaling
    if scale.softcap is not None:
        logits = scale.softcap * torch.tanh(logits / scale.softcap)
    at = torch.arange(first, seen.seen[row.batch], device=logits.device)
    later = seen.positions[row.pairs][None, :] > at[:, None]
    logits = logits.masked_fill(later, -torch.inf)
    if scale.sinks is None:  # a query older than all that the row holds sees nothing: 0, where softmax gives NaN
        return logits.softmax(-1).masked_fill(later, 0.0), first
    sink = scale.sinks[heads].float()[:, None, None].expand(-1, logits.shape[1], 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1], first
