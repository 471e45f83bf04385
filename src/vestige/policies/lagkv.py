"""Keep the tokens that stand out against the partition of tokens that follows theirs."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.errors import PolicyError
from vestige.policies.base import Policy
from vestige.policies.observation import Observation

_NARROWEST = 1e-12
"""The least range of a channel: a reference that is constant there must not divide by 0."""


@dataclass(frozen=True, kw_only=True)
class LagKV(Policy):
    """Keep, of each partition of ``lag`` tokens, those whose keys and values vary most on the scale of the next one.

    Beyond the sinks a row is cut into partitions. The channels of a partition are normalised by the minimum and
    maximum that they have in the next one; a token is worth the standard deviation over its channels, as a softmax
    over the partition, of its key plus that of its value. Partitions are equals: the score is the rank within one. The
    last partition and the remainder, which none follows, come before all others. No queries are looked at.

    Source: LagKV, arXiv 2504.04704, with the paper's sinks. Differs: the paper takes a fixed ratio of each partition
    and never judges a token twice; under a budget, what is held is cut anew and judged again at each settle. Since the
    last partition comes first, a budget of no more than ``sink`` plus ``lag`` pairs a row keeps sinks and the most
    recent tokens alone: choose ``lag`` well below it.
    """

    sink: int = 16
    lag: int = 128
    """Tokens of a partition, at least 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag < 2:
            raise PolicyError(f"lag must be at least 2, got {self.lag!r}")

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return each token's rank within its partition, in [0, 1); 1 for what is not judged."""
        scores = torch.ones(len(seen.positions), device=seen.keys.device)
        for row in seen.rows():
            begin = row.pairs.start + int((seen.positions[row.pairs] < self.sink).sum())
            partitions = (row.pairs.stop - begin) // self.lag
            if partitions < 2:
                continue
            pairs = slice(begin, begin + partitions * self.lag)
            worth = _standing_out(seen.keys[pairs], self.lag) + _standing_out(seen.values[pairs], self.lag)
            ranks = worth.argsort(dim=-1, stable=True).argsort(-1)
            scores[begin : pairs.stop - self.lag] = ranks.flatten() / self.lag
        return scores


def _standing_out(states: Float[Tensor, "partitioned dim"], lag: int) -> Float[Tensor, "judged lag"]:
    """Return, for all partitions but the last, the softmax over each of its tokens' standard deviation."""
    parts = states.float().unflatten(0, (-1, lag))  # (partitions, lag, dim)
    low, high = parts[1:].amin(1, keepdim=True), parts[1:].amax(1, keepdim=True)
    on_scale: Tensor = (parts[:-1] - low) / (high - low).clamp_min(_NARROWEST)
    return on_scale.std(-1).softmax(-1)
