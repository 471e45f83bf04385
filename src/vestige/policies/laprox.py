"""LaProx: attention times the norm of the projected value, model-wide."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.policies.base import NewPairs, Policy
from vestige.policies.observation import Observation
from vestige.policies.scoring import check_pooling, compute_observed_attention, pool_scores
from vestige.policies.selection import Scale, Share


@dataclass(frozen=True, kw_only=True)
class LaProx(Policy):
    """Keep the pairs whose loss would change the layer's output most, in one top-k over all layers and heads.

    The layer's output is one matrix product whose inner index is (query head, token). Column-row sampling approximates
    such a product best if a term's weight is the product of two norms: of its column, the attention of the last
    ``observed`` queries to a token, and of its row, the token's value after the output projection.

    Source: LaProx, arXiv 2605.07234, Algorithms 1 and 2. The paper does not define per-head scores for grouped
    queries: here each query head's complete score is averaged over the group. Differs: a layer's scores are divided by
    their sum over the unprotected pairs, where the paper takes all. Completed by us, since the paper evicts once after
    the prompt: norms of values are stored when pairs are written and the latest queries are recorded, so that the cache
    can evict again while decoding; a text read in chunks may use twice the budget until its end; ``sink`` protects
    first tokens, unlike the paper.
    """

    share: Share = "model"
    sink: int = 0
    scale: Scale = "mass"
    """"mass" divides by the layer's sum; "calibrated" compares raw scores, as in the paper's ablation."""
    observed: int = 32
    """Latest queries whose attention is used."""
    kernel: int = 7
    """Tokens averaged by pooling; odd, 1 switches pooling off."""
    causal: bool = False
    """Pool a token with those before it, not around it: the question attends to the beginning of an answer, the reply
    will attend to the tokens that follow. Ours, not the paper's."""
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "output"})
    annotations: ClassVar[frozenset[str]] = frozenset({"output_norms"})
    reading_slack: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pooling(self.observed, self.kernel)

    def annotate(self, new: NewPairs) -> Mapping[str, Tensor]:
        """Return the norm of each value after the output projection, by query head."""
        assert new.output is not None
        norms = new.output.norms(new.values)
        return {"output_norms": norms.clamp_max(torch.finfo(torch.float16).max).half()}

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return attention norm times output norm, averaged over the query group and pooled."""
        norms = obs.annotations["output_norms"].float()
        scores = torch.empty(len(obs.positions), device=obs.keys.device)
        for row in obs.rows():
            attention, first = compute_observed_attention(obs, row, self.observed)
            columns = attention.square_().sum(1).sqrt()  # (queries_per_kv, row_held); a norm over dim 1 is far slower
            worth = (columns * norms[row.pairs].T).mean(0)
            older = obs.positions[row.pairs] < first
            scores[row.pairs] = pool_scores(worth * older, self.kernel, self.causal)
        return scores
