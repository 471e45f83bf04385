"""Keep what the last query attends to."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.observe import Observation, observed_attention
from vestige.policy import Policy
from vestige.select import Scale


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
        mass = [torch.zeros(n, device=seen.keys.device) for n in seen.seen]
        holders = [torch.zeros_like(m) for m in mass]
        for row in seen.rows():
            attention, _ = observed_attention(seen, row, observed=1)
            at = seen.positions[row.pairs].long()
            mass[row.batch].index_add_(0, at, attention.mean((0, 1)))
            holders[row.batch].index_add_(0, at, torch.ones_like(at, dtype=torch.float32))
        scores = torch.empty(len(seen.positions), device=seen.keys.device)
        for row in seen.rows():
            at = seen.positions[row.pairs].long()
            scores[row.pairs] = mass[row.batch][at] / holders[row.batch][at]
        return scores
