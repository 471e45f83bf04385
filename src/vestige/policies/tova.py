"""TOVA: attention of the last query."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.policies.base import Policy
from vestige.policies.observation import Observation
from vestige.policies.scoring import average_over_heads, compute_observed_attention
from vestige.policies.selection import Scale


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Keep the tokens that the last query attends to, averaged over all heads of the layer.

    Source: TOVA (Token Omission Via Attention), arXiv 2401.06104. Differs: the cache evicts every ``every`` tokens
    rather than at each step; sink and window are protected; where rows hold different tokens, a token's average is over
    the KV heads that still hold it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    scale: Scale = "mass"

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return the last query's attention to each token, the same for every KV head that holds it."""
        scores = torch.empty(len(obs.positions), device=obs.keys.device)
        for row in obs.rows():
            attention, _ = compute_observed_attention(obs, row, observed=1)
            scores[row.pairs] = attention.mean((0, 1))
        return average_over_heads(obs, scores)
