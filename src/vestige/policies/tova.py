"""Keep what the last query attends to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.policies.base import Policy
from vestige.policies.observation import Observation, observed_attention, over_heads
from vestige.policies.selection import Scale


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """Keep the tokens that the last query attends to, averaged over all heads of the layer.

    Source: TOVA (Token Omission Via Attention), arXiv 2401.06104. Differs: room is made every ``every`` tokens rather
    than at each step; sink and window are protected; where rows hold different tokens, a token's average is over the
    KV heads that still hold it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    scale: Scale = "mass"

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return the last query's attention to each token, the same for every KV head that holds it."""
        scores = torch.empty(len(seen.positions), device=seen.keys.device)
        for row in seen.rows():
            attention, _ = observed_attention(seen, row, observed=1)
            scores[row.pairs] = attention.mean((0, 1))
        return over_heads(seen, scores)
