"""Keep what the latest queries attend to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.policies.base import Policy, check_pooling
from vestige.policies.observation import Observation, observed_attention, pooled
from vestige.policies.selection import Scale


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keep the tokens that the latest queries attend to, with their neighbours.

    Source: SnapKV, arXiv 2404.14469: mean attention of the last ``observed`` queries, pooled along the tokens so that
    an important token brings its neighbours. Differs: scores are averaged over the query group (the paper predates
    grouped queries); pooling is by average, as in later work, and after an eviction runs over neighbouring slots;
    room is made again while decoding, where the paper compresses the prompt once.
    """

    observed: int = 32
    """Latest queries whose attention is averaged."""
    kernel: int = 5
    """Tokens that are pooled together; odd, 1 switches pooling off."""
    causal: bool = False
    """Pool a token with those before it, not around it. What the question looks at is where an answer begins; what
    follows will be looked at while the answer is written. Ours, not the paper's."""
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    scale: Scale = "mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pooling(self.observed, self.kernel)

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return the pooled mean attention; the observed tokens themselves, seen by few, count as 0 for pooling."""
        scores = torch.empty(len(seen.positions), device=seen.keys.device)
        for row in seen.rows():
            attention, first = observed_attention(seen, row, self.observed)
            older = seen.positions[row.pairs] < first
            mass = attention.mean((0, 1)) * older
            scores[row.pairs] = pooled(mass, self.kernel, self.causal)
        return scores
