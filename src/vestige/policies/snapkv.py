"""SnapKV: mean attention of the latest queries, pooled over neighbouring tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.policies.base import Policy
from vestige.policies.observation import Observation
from vestige.policies.scoring import check_pooling, compute_observed_attention, pool_scores
from vestige.policies.selection import Scale


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keep the tokens that the latest queries attend to, with their neighbours.

    Source: SnapKV, arXiv 2404.14469: mean attention of the last ``observed`` queries, pooled along the tokens so that
    an important token raises its neighbours. Differs: scores are averaged over the query group (the paper predates
    grouped queries); pooling is by average, as in later work, and after an eviction runs over neighbouring slots; the
    cache evicts again while decoding, where the paper compresses the prompt once.
    """

    observed: int = 32
    """Latest queries whose attention is averaged."""
    kernel: int = 5
    """Tokens averaged by pooling; odd, 1 switches pooling off."""
    causal: bool = False
    """Pool a token with those before it, not around it: the question attends to the beginning of an answer, the reply
    will attend to the tokens that follow. Ours, not the paper's."""
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    scale: Scale = "mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pooling(self.observed, self.kernel)

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return the pooled mean attention; the observed tokens, which few queries see, count as 0 for pooling."""
        scores = torch.empty(len(obs.positions), device=obs.keys.device)
        for row in obs.rows():
            attention, first = compute_observed_attention(obs, row, self.observed)
            older = obs.positions[row.pairs] < first
            mass = attention.mean((0, 1)) * older
            scores[row.pairs] = pool_scores(mass, self.kernel, self.causal)
        return scores
