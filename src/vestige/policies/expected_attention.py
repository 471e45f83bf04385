"""Keep what future queries can be expected to attend to, judged by the distribution of all queries so far."""

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

    Queries before RoPE are taken for Gaussian, with the mean and covariance of all that was read and generated. Turned
    by the average of the rotations to come they give mean ``m`` and covariance ``C``, and a key ``k`` the expected
    weight ``exp(s k.m + s^2 k.C k / 2)``, where ``s`` is the layer's scaling.

    Source: Expected Attention, arXiv 2510.00636, with the constants of its authors' code: weights are normalised over
    the pairs that are no sinks and averaged over the query group, ``(weight + epsilon) * ||v||`` is the score, and the
    first 4 queries do not count. Differs: moments are kept up to date with every query, so that room is made again in
    later chunks and turns and while decoding, where the authors compress the prompt once. Completed by us: a softcap
    bounds the expected logit, for which there is no closed form, and learned sinks take part in the normalisation.
    """

    future: int = 512
    """Coming positions over which the rotation is averaged."""
    epsilon: float = 0.0
    """Added to each weight before it meets the value's norm; the authors evaluate with 0.01."""
    needs: ClassVar[frozenset[str]] = frozenset({"query_moments", "rope"})
    scale: Scale = "mass"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1 or not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise PolicyError(
                "future must be at least 1 and epsilon not negative, "
                f"got future={self.future!r}, epsilon={self.epsilon!r}"
            )

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return expected attention, averaged over the query group, times the norm of the value; 0 for sinks."""
        scores = torch.zeros(len(seen.positions), device=seen.keys.device)
        moments = [self._expected(seen, b) for b in range(len(seen.seen))]
        for row in seen.rows():
            others = seen.positions[row.pairs] >= self.sink
            weights = self._weights(seen, row, *moments[row.batch])[:, others].mean(0)
            norms = torch.linalg.vector_norm(seen.values[row.pairs][others].float(), dim=-1)
            scores[row.pairs][others] = (weights + self.epsilon) * norms
        return scores

    def _expected(
        self, seen: Observation, b: int
    ) -> tuple[Float[Tensor, "heads head_dim"], Float[Tensor, "heads head_dim head_dim"]]:
        """Return mean and covariance of a batch row's coming queries."""
        assert seen.rope is not None, "the cache knows the rotation for every policy that needs it"
        mean, covariance = seen.query_moments[b]
        turned, start = seen.rope.averaged, seen.seen[b]
        once = turned(covariance, start, self.future, seen.layer_idx)  # C R^T, and as C is symmetric, R C transposed
        both = turned(once.mT, start, self.future, seen.layer_idx)
        return turned(mean, start, self.future, seen.layer_idx), both

    def _weights(
        self, seen: Observation, row: Row, mean: Tensor, covariance: Tensor
    ) -> Float[Tensor, "queries_per_kv row_held"]:
        """Return expected weights by query head of the row's group, normalised over the pairs that are no sinks."""
        assert seen.attention is not None, "a layer that was read has attended"
        scale, keys = seen.attention.of_group(row.kv_head, seen.kv_heads), seen.keys[row.pairs].float()
        logits = keys @ mean.chunk(seen.kv_heads)[row.kv_head].T * scale.scaling  # (row_held, queries_per_kv)
        for head, c in enumerate(covariance.chunk(seen.kv_heads)[row.kv_head]):
            logits[:, head] += (keys @ c * keys).sum(-1) * (scale.scaling**2 / 2)
        logits = scale.capped(logits).T.masked_fill(seen.positions[row.pairs] < self.sink, -torch.inf)
        if scale.sinks is None:
            return logits.softmax(-1)
        learned = scale.sinks.float()[:, None]
        return torch.cat([logits, learned], -1).softmax(-1)[:, :-1]
