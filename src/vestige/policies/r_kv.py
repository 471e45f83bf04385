"""R-KV: attention of the latest queries minus redundancy among keys, for long reasoning."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from vestige.errors import PolicyError
from vestige.policies.base import Policy
from vestige.policies.observation import Observation
from vestige.policies.scoring import check_pooling
from vestige.policies.selection import Scale

KEY_BLOCK = 256
"""Keys compared with all others at a time, so that no matrix of all with all is made."""


@dataclass(frozen=True, kw_only=True)
class RKV(Policy):
    """Keep ``weight`` parts of importance minus ``1 - weight`` parts of redundancy, in buffers of ``every`` tokens.

    Importance is the attention of the last ``observed`` queries to the pairs before them: maximum of the logits over a
    query group, softmax, maximum over ``kernel`` neighbours, mean over queries. Redundancy is the softmax of a key's
    mean cosine similarity to the other keys of the row. The link from a key to its latest duplicate, the latest key
    more ``similar`` to it, does not count, so the latest of several duplicates stays. Meant for decoding, but it scores
    a text that was read as well.

    Source: R-KV, arXiv 2505.24133, equations 1 to 7. Differs: the paper drops the links of a key to its beta latest
    duplicates from the key's own mean, which favours no recent token; here, as in the authors' code with beta 1, the
    link is dropped from the mean of the duplicate. Without a duplicate no link is dropped (that code drops the link to
    the row's first key). The paper's neighbourhood has an even width, ours is centred. Softcaps apply; learned
    attention sinks do not, since they are not keys.
    """

    sink: int = 0
    window: int = 8
    every: int = 128
    scale: Scale = "signed"
    observed: int = 8
    """Latest queries whose attention is used; their own pairs score 0."""
    kernel: int = 7
    """Neighbours pooled by their maximum; odd, 1 switches pooling off."""
    weight: float = 0.1
    """The paper's lambda, in [0, 1]: 1 uses importance alone, 0 redundancy alone."""
    similar: float = 0.5
    """Cosine above which two keys are duplicates, in [0, 1]."""
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pooling(self.observed, self.kernel)
        if not (0 <= self.weight <= 1 and 0 <= self.similar <= 1):
            raise PolicyError(
                f"weight and similar must lie in [0, 1], got weight={self.weight!r}, similar={self.similar!r}"
            )

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return weighted importance minus weighted redundancy; 0 for the observed tokens."""
        scores = torch.zeros(len(obs.positions), device=obs.keys.device)
        for row in obs.rows():
            queries = obs.queries[row.batch][:, -self.observed :].chunk(obs.kv_heads)[row.kv_head]
            older = obs.positions[row.pairs] < obs.seen[row.batch] - queries.shape[1]
            keys = obs.keys[row.pairs][older].float()
            if len(keys):
                importance = self._compute_importance(obs, queries.float(), keys)
                redundancy = _compute_redundancy(keys, self.similar)
                scores[row.pairs][older] = self.weight * importance - (1 - self.weight) * redundancy
        return scores

    def _compute_importance(
        self,
        obs: Observation,
        queries: Float[Tensor, "queries_per_kv latest head_dim"],
        keys: Float[Tensor, "older head_dim"],
    ) -> Float[Tensor, " older"]:
        """Return pooled attention; every key is older than every query, so no mask is needed."""
        scale = obs.attention
        assert scale is not None, "the cache records queries for every policy that needs them"
        logits = scale.capped(queries @ keys.T * scale.scaling)
        weights = logits.amax(0).softmax(-1)  # (latest, older)
        return max_pool1d(weights, self.kernel, stride=1, padding=self.kernel // 2).mean(0)


def _compute_redundancy(keys: Float[Tensor, "older head_dim"], similar: float) -> Float[Tensor, " older"]:
    """Return the softmax of each key's mean similarity to the others, without links to the latest duplicates."""
    units, number = normalize(keys, dim=-1), torch.arange(len(keys), device=keys.device)
    total = torch.zeros(len(keys), device=keys.device)
    for block in number.split(KEY_BLOCK):
        links = units[block] @ units.T  # (block, older)
        here = number[: len(block)]
        links[here, block] = 0.0  # a key is no duplicate of itself
        latest = torch.where(links > similar, number, -1).amax(1)
        has = latest >= 0
        links[here[has], latest[has]] = 0.0
        total += links.sum(0)
    return (total / len(keys)).softmax(-1)
