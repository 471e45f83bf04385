"""LagKV: tokens that stand out when scaled by the range of the next partition."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.errors import PolicyError
from vestige.policies.base import Policy
from vestige.policies.observation import Observation

_MIN_RANGE = 1e-12
"""Lower bound of a channel's range, so that a constant reference does not divide by 0."""


@dataclass(frozen=True, kw_only=True)
class LagKV(Policy):
    """Keep, of each partition of ``lag`` tokens, those whose keys and values vary most on the scale of the next one.

    A row is cut into partitions after the sinks. Each channel of a partition is normalised by its minimum and maximum
    in the next partition. A token's worth is the standard deviation over the channels, as a softmax over the partition,
    of its key plus that of its value. Partitions are equal: the score is the rank within one. The last partition and
    the remainder, which have no next partition, rank above all others. No queries are used.

    Source: LagKV, arXiv 2504.04704, with the paper's sinks. Differs: the paper takes a fixed ratio of each partition
    and scores a token once; under a budget, the held pairs are partitioned and scored again at each eviction. Since the
    last partition ranks first, a budget of at most ``sink`` plus ``lag`` pairs a row keeps only sinks and the most
    recent tokens: choose ``lag`` well below it.
    """

    sink: int = 16
    lag: int = 128
    """Tokens per partition, at least 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag < 2:
            raise PolicyError(f"lag must be at least 2, got {self.lag!r}")

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return each token's rank within its partition, in [0, 1), or 1 for tokens that are not ranked."""
        scores = torch.ones(len(obs.positions), device=obs.keys.device)
        for row in obs.rows():
            begin = row.pairs.start + int((obs.positions[row.pairs] < self.sink).sum())
            partitions = (row.pairs.stop - begin) // self.lag
            if partitions < 2:
                continue
            pairs = slice(begin, begin + partitions * self.lag)
            worth = _score_partitions(obs.keys[pairs], self.lag) + _score_partitions(obs.values[pairs], self.lag)
            ranks = worth.argsort(dim=-1, stable=True).argsort(-1)
            scores[begin : pairs.stop - self.lag] = ranks.flatten() / self.lag
        return scores


def _score_partitions(states: Float[Tensor, "partitioned dim"], lag: int) -> Float[Tensor, "judged lag"]:
    """Return the softmax of the tokens' standard deviations within each partition but the last."""
    parts = states.float().unflatten(0, (-1, lag))  # (partitions, lag, dim)
    low, high = parts[1:].amin(1, keepdim=True), parts[1:].amax(1, keepdim=True)
    on_scale: Tensor = (parts[:-1] - low) / (high - low).clamp_min(_MIN_RANGE)
    return on_scale.std(-1).softmax(-1)
