"""Scores that policies share, derived from an observation: attention, its mean over KV heads, pooling over tokens."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from vestige.errors import PolicyError
from vestige.kernels import AttentionScale
from vestige.policies.observation import Observation, Row


def compute_observed_attention(
    obs: Observation, row: Row, observed: int
) -> tuple[Float[Tensor, "queries_per_kv latest row_held"], int]:
    """Return the attention that the latest queries pay to one row's pairs, and the first query's position.

    There are fewer than ``observed`` queries if fewer were seen.
    """
    assert obs.attention is not None, "the cache records queries for every policy that needs them"
    queries = obs.queries[row.batch][:, -observed:]
    first = obs.seen[row.batch] - queries.shape[1]
    query_positions = torch.arange(first, obs.seen[row.batch], device=queries.device)
    scale = obs.attention.of_group(row.kv_head, obs.kv_heads)
    group = queries.chunk(obs.kv_heads)[row.kv_head]
    return compute_attention(group, query_positions, obs.keys[row.pairs], obs.positions[row.pairs], scale), first


def compute_attention(
    queries: Float[Tensor, "queries_per_kv some head_dim"],
    query_positions: Int[Tensor, " some"],
    keys: Float[Tensor, "row_held head_dim"],
    positions: Int[Tensor, " row_held"],
    scale: AttentionScale,
) -> Float[Tensor, "queries_per_kv some row_held"]:
    """Return softmax attention over the pairs of a row, in float32; later pairs and pads get 0.

    Positions of queries ascend; those of pads are -1. ``scale`` is that of the heads that read the row.
    """
    logits = scale.capped(queries.float() @ keys.float().T * scale.scaling)
    pads, late = positions < 0, (positions > query_positions[:1]).nonzero()
    tail = int(late[0]) if len(late) else len(positions)  # every query sees the pairs before the tail
    if bool(pads.any()):
        logits.masked_fill_(pads, -torch.inf)
    logits[..., tail:].masked_fill_(positions[tail:] > query_positions[:, None], -torch.inf)
    if scale.sinks is None:
        weights = logits.softmax(-1)
        # A query that sees no pair of the row pays 0, where softmax gives NaN.
        return weights if bool((~pads[:tail]).any()) else weights.nan_to_num_(0.0)
    sink = scale.sinks.float()[:, None, None].expand(-1, logits.shape[1], 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]


def average_over_heads(obs: Observation, scores: Float[Tensor, " held"]) -> Float[Tensor, " held"]:
    """Return each token's mean score over the KV heads that hold it, the same for all of them."""
    means = torch.empty_like(scores)
    for b, length in enumerate(obs.seen):
        pairs = slice(*(obs.cu_seqlens[row * obs.kv_heads] for row in (b, b + 1)))
        positions = obs.positions[pairs].long()
        total, holders = scores.new_zeros(2, length)
        total.index_add_(0, positions, scores[pairs])
        holders.index_add_(0, positions, torch.ones_like(scores[pairs]))
        means[pairs] = total[positions] / holders[positions]
    return means


def check_pooling(observed: int, kernel: int) -> None:
    """Raise a PolicyError unless a policy looks at one query or more and pools over an odd number of tokens."""
    if observed < 1 or kernel < 1 or kernel % 2 == 0:
        raise PolicyError(f"observed must be at least 1 and kernel odd, got observed={observed}, kernel={kernel}")


def pool_scores(scores: Float[Tensor, " row_held"], kernel: int, causal: bool = False) -> Float[Tensor, " row_held"]:
    """Return averages over ``kernel`` neighbouring pairs (odd), with zeros beyond the ends.

    An important token raises its neighbours; after an eviction these are the neighbours still held. ``causal`` averages
    a pair with those before it, so that a score reaches only later tokens.
    """
    before = kernel - 1 if causal else kernel // 2
    return avg_pool1d(pad(scores[None], (before, kernel - 1 - before)), kernel, stride=1)[0]
