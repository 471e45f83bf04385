"""Keep everything: the control that every method is measured against."""

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
        PolicyError: A budget was given: nothing would ever be evicted to meet it.
    """

    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            raise PolicyError("policy 'full' takes no budget: it keeps every pair")
        super().__post_init__()

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return equal scores: no pair is worth less than another."""
        return seen.keys.new_zeros(len(seen.positions)).float()
