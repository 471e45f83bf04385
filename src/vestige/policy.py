"""What a pair is worth: the interface that every eviction method implements."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from vestige.budget import Budget
from vestige.errors import PolicyError, unknown
from vestige.observe import Observation
from vestige.select import SHARES, Scale, Share

if TYPE_CHECKING:
    from vestige.cache import KVCache

NEEDS = frozenset({"queries", "hidden"})


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Scores pairs; the cache, not the policy, decides when, protects, and evicts. Frozen: state lives in the cache.

    Raises:
        BudgetError: The budget is below sink + window.
        PolicyError: A field is out of range.
    """

    budget: Budget | None
    """Pairs per row on average; None never evicts."""
    share: Share = "head"
    """Who competes for room: the pairs of a row ("head"), of a layer, or of the whole model."""
    sink: int = 4
    """First tokens that always stay."""
    window: int = 32
    """Most recent tokens that always stay."""
    every: int = 64
    """Tokens generated between two settles."""
    floor: float = 0.0
    """Share of the average budget that each row keeps before rows compete, in [0, 1]."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What the cache must record: "queries" (the latest ``observed`` of each layer) or "hidden" (for `Annotates`)."""
    scale: ClassVar[Scale] = "calibrated"
    """How scores of different layers are made comparable for ``share="model"``."""
    reading_slack: ClassVar[float] = 1.0
    """Between chunks of a text the limit is this many times the budget."""

    def __post_init__(self) -> None:
        if self.share not in SHARES:
            raise PolicyError(unknown("share", str(self.share), SHARES))
        for name, least in (("sink", 0), ("window", 0), ("every", 1)):
            if not (isinstance(value := getattr(self, name), int) and value >= least):
                raise PolicyError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not 0 <= self.floor <= 1:
            raise PolicyError(f"floor must lie in [0, 1], got {self.floor!r}")
        if self.queries_observed < 0 or not self.needs <= NEEDS:
            raise PolicyError(f"observed must not be negative and needs must be among {sorted(NEEDS)}")
        if self.budget is not None:
            self.budget.check(self.protected)

    @property
    def protected(self) -> int:
        """Pairs of every row that are never evicted, pins aside."""
        return self.sink + self.window

    @property
    def queries_observed(self) -> int:
        """Latest queries that each layer must keep for this policy."""
        return getattr(self, "observed", 1) if "queries" in self.needs else 0

    @abstractmethod
    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return the importance of each pair of a layer, packed as the observation is; larger means keep.

        Never encodes protection, never modifies what it is given; NaN is an error.
        """


@runtime_checkable
class Prepares(Protocol):
    """A policy that needs forwards of its own (a replay of the text, say) after reading and before the settle."""

    def prepare(self, model: Any, cache: "KVCache", ids: Int[Tensor, "batch new"]) -> None:
        """Run them on forks of ``cache``; what they find goes into the cache's annotations."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """Pairs of one layer at the moment they are stored.

    Args:
        layer_idx: Index of the layer in the model.
        hidden: What enters the attention module, if the policy needs ``"hidden"``.
        keys: New keys, after RoPE.
        values: New values.
    """

    layer_idx: int
    hidden: Float[Tensor, "batch new hidden"] | None
    keys: Float[Tensor, "batch kv_heads new head_dim"]
    values: Float[Tensor, "batch kv_heads new value_dim"]


@runtime_checkable
class Annotates(Protocol):
    """A policy that stores side arrays beside each pair when it is written (a gate's retention, a value's norm)."""

    def annotate(self, written: Written) -> Mapping[str, Tensor]:
        """Return one ``batch kv_heads new ...`` tensor per name; they travel with the pairs and count as bytes."""
