"""KeyDiff: keys that differ most from the mean direction."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vestige.policies.base import Policy
from vestige.policies.observation import Observation
from vestige.policies.selection import Scale


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Keep the pairs whose keys point away from the mean direction of their row.

    Source: KeyDiff, arXiv 2504.15364: the anchor is the mean of the L2-normalised keys of a KV head, the score the
    negative cosine to it. Differs: sink and window are protected here; the anchor is that of the pairs still held, so
    evicted keys no longer count.
    """

    scale: Scale = "signed"

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return the negative cosine of each key to its row's anchor."""
        keys = obs.keys.float()
        scores = keys.new_empty(len(keys))
        for row in obs.rows():
            anchor = normalize(keys[row.pairs], dim=-1).mean(0, keepdim=True)
            scores[row.pairs] = -cosine_similarity(keys[row.pairs], anchor, dim=-1)
        return scores
