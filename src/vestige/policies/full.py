"""Full: no eviction, the control for all other policies."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from vestige.budget import Budget
from vestige.errors import PolicyError
from vestige.policies.base import Policy
from vestige.policies.observation import Observation


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Keep every pair.

    Source: the model itself; the upper bound of memory and the reference of accuracy.

    Raises:
        PolicyError: A budget was given, which this policy would never meet.
    """

    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            raise PolicyError("policy 'full' takes no budget: it keeps every pair")
        super().__post_init__()

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return equal scores for all pairs."""
        return obs.keys.new_zeros(len(obs.positions)).float()
