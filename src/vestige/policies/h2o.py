"""H2O: the heavy hitters, by attention accumulated over all queries, and the most recent tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.policies.base import NewPairs, Policy
from vestige.policies.observation import Observation, RowView
from vestige.policies.scoring import compute_attention
from vestige.policies.selection import Scale

QUERY_BLOCK = 256
"""Queries attended at a time, so that no attention matrix of a whole text is made."""


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Keep the pairs that gathered the most attention since they were written; half of the room is for recent tokens.

    Source: H2O, arXiv 2306.14048. Differs: attention is averaged over the query group (the paper predates grouped
    queries); the cache evicts every ``every`` tokens rather than at each; ``window`` tokens stay even if they exceed
    half of the budget. The score is a sum, as in the paper, which favours older pairs; kvpress'
    ObservedAttentionPress divides by the number of queries that saw the pair. The attention of tokens that were rolled
    back later (speculative decoding) stays counted.
    """

    sink: int = 0
    recent_share: float = 0.5
    scale: Scale = "mass"
    annotations: ClassVar[frozenset[str]] = frozenset({"received"})
    query_annotations: ClassVar[frozenset[str]] = annotations

    def annotate(self, new: NewPairs) -> Mapping[str, Tensor]:
        """Return zeros, ``batch kv_heads new``: new pairs received no attention yet."""
        return {"received": new.keys.new_zeros(new.keys.shape[:3], dtype=torch.float32)}

    def watch(self, view: RowView) -> None:
        """Add the attention of new queries to each pair of a row, averaged over the query group."""
        received = view.annotations["received"]
        blocks = zip(view.queries.split(QUERY_BLOCK, 1), view.query_positions.split(QUERY_BLOCK), strict=True)
        for queries, at in blocks:
            end = len(received)
            if len(view.query_positions) > QUERY_BLOCK:  # no query of the block sees later pairs: half the work
                end = int((view.positions <= at.max()).nonzero()[-1]) + 1
            keys, positions = view.keys[:end], view.positions[:end]
            weights = compute_attention(queries, at, keys, positions, view.attention)
            received[:end] += weights.sum(1).mean(0).detach()  # learned sinks carry gradients

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return the attention that each pair received."""
        return obs.annotations["received"].float()
