"""Keep the heavy hitters, which all queries so far attended to most, and the most recent half."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.policies.base import NewPairs, Policy
from vestige.policies.observation import Observation, RowView, attention_weights
from vestige.policies.selection import Scale

QUERY_BLOCK = 256
"""Queries whose weights exist at a time: never an attention matrix of a whole text."""


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Keep the pairs that gathered the most attention since they were written; half of the room is for recent tokens.

    Source: H2O, arXiv 2306.14048. Differs: attention is averaged over the query group (the paper predates grouped
    queries); room is made every ``every`` tokens rather than at each; ``window`` tokens stay also where half of the
    room is less. It is a sum, as in the paper, so that older pairs had more time to gather; kvpress'
    ObservedAttentionPress divides by the number of queries that saw the pair. What tokens attended to that were later
    taken back (speculative decoding) stays counted.
    """

    sink: int = 0
    recent_share: float = 0.5
    scale: Scale = "mass"
    annotations: ClassVar[frozenset[str]] = frozenset({"received"})
    query_annotations: ClassVar[frozenset[str]] = annotations

    def annotate(self, written: NewPairs) -> Mapping[str, Tensor]:
        """Return zeros, ``batch kv_heads new``: new pairs were attended to by nobody yet."""
        return {"received": written.keys.new_zeros(written.keys.shape[:3], dtype=torch.float32)}

    def watch(self, glance: RowView) -> None:
        """Add to each pair of a row what new queries pay to it, averaged over the query group."""
        received = glance.annotations["received"]
        blocks = zip(glance.queries.split(QUERY_BLOCK, 1), glance.at.split(QUERY_BLOCK), strict=True)
        for queries, at in blocks:
            end = _seen_by(at, glance) if len(glance.at) > QUERY_BLOCK else len(received)
            keys, positions = glance.keys[:end], glance.positions[:end]
            weights = attention_weights(queries, at, keys, positions, glance.attention)
            received[:end] += weights.sum(1).mean(0).detach()  # learned sinks carry gradients

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return the attention that each pair received."""
        return seen.annotations["received"].float()


def _seen_by(at: Tensor, glance: RowView) -> int:
    """Return where the pairs end that any of these queries sees: half of a long text's work is beyond."""
    return int((glance.positions <= at.max()).nonzero()[-1]) + 1
