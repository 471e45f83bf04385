"""Expected Attention: attention of future queries, predicted from the distribution of all queries so far."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.errors import PolicyError
from vestige.policies.base import Policy
from vestige.policies.observation import Observation, Row
from vestige.policies.selection import Scale


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """Keep the pairs that the next ``future`` queries are expected to attend to, weighed by their values' norms.

    Queries before RoPE are modelled as Gaussian, with the mean and covariance of all queries so far. Rotated by the
    average of the coming rotations they have mean ``m`` and covariance ``C``, which gives a key ``k`` the expected
    weight ``exp(s k.m + s^2 k.C k / 2)``, where ``s`` is the layer's scaling.

    Source: Expected Attention, arXiv 2510.00636, with the constants of its authors' code: weights are normalised over
    the pairs other than sinks and averaged over the query group, the score is ``(weight + epsilon) * ||v||``, and the
    first 4 queries do not count. Differs: every query updates the moments, so that the cache can evict again in later
    chunks and turns and while decoding, where the authors compress the prompt once. Completed by us: a softcap bounds
    the expected logit, which has no closed form then, and learned sinks take part in the normalisation.
    """

    future: int = 512
    """Coming positions over which the rotation is averaged."""
    epsilon: float = 0.0
    """Added to each weight before the product with the value's norm; the authors evaluate with 0.01."""
    needs: ClassVar[frozenset[str]] = frozenset({"query_moments", "rope"})
    scale: Scale = "mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1 or not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise PolicyError(
                "future must be at least 1 and epsilon not negative, "
                f"got future={self.future!r}, epsilon={self.epsilon!r}"
            )

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return expected attention, averaged over the query group, times the norm of the value; 0 for sinks."""
        scores = torch.zeros(len(obs.positions), device=obs.keys.device)
        moments = [self._predict_moments(obs, b) for b in range(len(obs.seen))]
        for row in obs.rows():
            others = obs.positions[row.pairs] >= self.sink
            weights = self._compute_weights(obs, row, *moments[row.batch])[:, others].mean(0)
            norms = torch.linalg.vector_norm(obs.values[row.pairs][others].float(), dim=-1)
            scores[row.pairs][others] = (weights + self.epsilon) * norms
        return scores

    def _predict_moments(
        self, obs: Observation, b: int
    ) -> tuple[Float[Tensor, "heads head_dim"], Float[Tensor, "heads head_dim head_dim"]]:
        """Return the mean and covariance of a batch row's coming queries."""
        assert obs.rope is not None, "the cache knows the rotation for every policy that needs it"
        mean, covariance = obs.query_moments[b]
        turned, start = obs.rope.averaged, obs.seen[b]
        once = turned(covariance, start, self.future, obs.layer_idx)  # C R^T, and as C is symmetric, R C transposed
        both = turned(once.mT, start, self.future, obs.layer_idx)
        return turned(mean, start, self.future, obs.layer_idx), both

    def _compute_weights(
        self, obs: Observation, row: Row, mean: Tensor, covariance: Tensor
    ) -> Float[Tensor, "queries_per_kv row_held"]:
        """Return each query head's expected weights on a row, normalised over the pairs other than sinks."""
        assert obs.attention is not None, "a layer that was read has attended"
        scale, keys = obs.attention.of_group(row.kv_head, obs.kv_heads), obs.keys[row.pairs].float()
        logits = keys @ mean.chunk(obs.kv_heads)[row.kv_head].T * scale.scaling  # (row_held, queries_per_kv)
        for head, c in enumerate(covariance.chunk(obs.kv_heads)[row.kv_head]):
            logits[:, head] += (keys @ c * keys).sum(-1) * (scale.scaling**2 / 2)
        logits = scale.capped(logits).T.masked_fill(obs.positions[row.pairs] < self.sink, -torch.inf)
        if scale.sinks is None:
            return logits.softmax(-1)
        learned = scale.sinks.float()[:, None]
        return torch.cat([logits, learned], -1).softmax(-1)[:, :-1]
