"""Keep what changes the layer's output most: attention times the value after the output projection, model-wide."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.policies.base import NewPairs, Policy, check_pooling
from vestige.policies.observation import Observation, observed_attention, pooled
from vestige.policies.selection import Scale, Share


@dataclass(frozen=True, kw_only=True)
class LaProx(Policy):
    """Keep the pairs whose loss would change the layer's output most, in one top-k over all layers and heads.

    The layer's output is one matrix product whose inner index is (query head, token). Column-row sampling approximates
    such a product best if a term is worth the norm of its column, the attention that the last ``observed`` queries pay
    to a token, times the norm of its row, the token's value after the output projection.

    Source: LaProx, arXiv 2605.07234, Algorithms 1 and 2. The paper leaves open how its per-head scores meet grouped
    queries: here each query head's complete score is averaged over the group. Differs: a layer's scores are divided by
    their sum over the unprotected pairs, where the paper takes all. Completed by us, since the paper evicts once after
    the prompt: norms of values are stored when pairs are written, so that room can be made again while decoding, from
    a ring of the latest queries; a text read in chunks is held to twice the budget until its end; ``sink`` pins first
    tokens, which the paper does not.
    """

    share: Share = "model"
    sink: int = 0
    scale: Scale = "mass"
    """"mass" divides by the layer's sum; "calibrated" compares raw scores, as in the paper's ablation."""
    observed: int = 32
    """Latest queries whose attention is looked at."""
    kernel: int = 7
    """Tokens that are pooled together; odd, 1 switches pooling off."""
    causal: bool = False
    """Pool a token with those before it, not around it. What the question looks at is where an answer begins; what
    follows will be looked at while the answer is written. Ours, not the paper's."""
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "output"})
    annotations: ClassVar[frozenset[str]] = frozenset({"output_norms"})
    reading_slack: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pooling(self.observed, self.kernel)

    def annotate(self, written: NewPairs) -> Mapping[str, Tensor]:
        """Return the norm of each value after the output projection, by query head."""
        assert written.output is not None
        norms = written.output.norms(written.values)
        return {"output_norms": norms.clamp_max(torch.finfo(torch.float16).max).half()}

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return attention norm times output norm, averaged over the query group and pooled."""
        norms = seen.annotations["output_norms"].float()
        scores = torch.empty(len(seen.positions), device=seen.keys.device)
        for row in seen.rows():
            attention, first = observed_attention(seen, row, self.observed)
            columns = attention.square_().sum(1).sqrt()  # (queries_per_kv, row_held); a norm over dim 1 is far slower
            worth = (columns * norms[row.pairs].T).mean(0)
            older = seen.positions[row.pairs] < first
            scores[row.pairs] = pooled(worth * older, self.kernel, self.causal)
        return scores
