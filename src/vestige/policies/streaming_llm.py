"""StreamingLLM: the first and the most recent tokens."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from vestige.policies.base import Policy
from vestige.policies.observation import Observation


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Keep attention sinks and the most recent tokens.

    Source: StreamingLLM, arXiv 2309.17453. Differs: keys keep their true positions; the paper renumbers positions
    within the cache at each step, so that a model can stream past its trained length.
    """

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return the position: newer is better; the sinks are protected, not scored."""
        return obs.positions.float()
