"""What a pair is worth: the interface that every eviction method implements."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.budget import Budget
from vestige.errors import PolicyError, require_whole, unknown_name_message
from vestige.models.forward import RollbackCache
from vestige.models.layout import ModelLayout
from vestige.models.output_projection import OutputProjection
from vestige.policies.observation import LayerView, Observation, RowView
from vestige.policies.selection import SCALES, RowIndex, Scale, Share, share_of

NEEDS = frozenset({"queries", "query_moments", "rope", "hidden", "output"})


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
    first_share: float = 0.0
    """Share of the average budget that the first tokens take, where that is more than ``sink``."""
    recent_share: float = 0.0
    """Share of the average budget that the most recent tokens take, where that is more than ``window``."""
    scale: Scale = "calibrated"
    """How scores of different layers are made comparable, for ``share="model"`` and for ``threshold``."""
    threshold: float | None = None
    """Evict every unprotected pair whose comparable score is below this, also where the budget has room."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What must be at hand: "queries" (the latest ``observed`` of each layer), "query_moments" (mean and covariance of
    all queries, before RoPE), "rope" (to turn keys back to what they were before RoPE), "hidden" (what enters
    attention, for `Annotates`, `WatchesLayers` and the latest ``hidden_observed``), "output" (the output projection,
    for `Annotates`).
    """
    annotations: ClassVar[frozenset[str]] = frozenset()
    """Names of the side arrays that the policy keeps beside each pair."""
    query_annotations: ClassVar[frozenset[str]] = frozenset()
    """Those of them that tell what queries found in a pair: they outlive its being replaced."""
    annotation_options: ClassVar[tuple[str, ...]] = ()
    """Fields that bear on what these hold: policies that differ in others only can share them."""
    reading_slack: ClassVar[float] = 1.0
    """Between chunks of a text the limit is this many times the budget."""

    def __post_init__(self) -> None:
        share_of(self.share)
        if self.scale not in SCALES:
            raise PolicyError(unknown_name_message("scale", str(self.scale), SCALES))
        for name, least in (("sink", 0), ("window", 0), ("every", 1)):
            require_whole(name, getattr(self, name), least)
        for name in ("floor", "first_share", "recent_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise PolicyError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        if self.first_share + self.recent_share > 1:
            raise PolicyError("first_share and recent_share together must not exceed 1")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise PolicyError(f"threshold must be a number, got {self.threshold!r}")
        if min(self.ring_sizes.values(), default=0) < 0 or not self.needs <= NEEDS:
            raise PolicyError(f"observed must not be negative and needs must be among {sorted(NEEDS)}")
        if self.budget is not None:
            self.budget.check(self.protected)

    @property
    def protected(self) -> int:
        """Pairs of every row that are never evicted, pins aside."""
        return self.sink + self.window

    def protected_ends(self, room: int) -> tuple[int, int]:
        """Return how many of a row's first and of its latest tokens are never evicted.

        Args:
            room: Average pairs that each row may hold.
        """
        first, recent = (Budget.share_of(room, share) for share in (self.first_share, self.recent_share))
        return max(self.sink, first), max(self.window, recent)

    @property
    def evicts(self) -> bool:
        """Whether anything is ever evicted."""
        return self.budget is not None or self.threshold is not None

    @property
    def ring_sizes(self) -> dict[str, int]:
        """How many of the latest queries, and of what enters the layer, must be remembered for this policy.

        Moments of queries have one size: 1.
        """
        sizes = {"queries": getattr(self, "observed", 1), "hidden": getattr(self, "hidden_observed", 0)}
        sizes["query_moments"] = 1
        return {name: size for name, size in sizes.items() if name in self.needs and size}

    @abstractmethod
    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return the importance of each pair of a layer, packed as the observation is; larger means keep.

        Never encodes protection, never modifies what it is given; NaN is an error.
        """


@runtime_checkable
class NeedsWeights(Protocol):
    """A policy that writes what something made for one model says (trained gates): asked before anything is read."""

    def bind(self, model: PreTrainedModel) -> None:
        """Make ready for a model.

        Raises:
            ModelError: It cannot work with this one.
        """


class ReplayCache(RollbackCache, Protocol):
    """What a policy that needs replays may ask of a cache."""

    @property
    def layout(self) -> ModelLayout:
        """Where the model keeps what the cache needs."""

    @property
    def ids(self) -> Int[Tensor, "batch padded_seen"]:
        """Token ids fed so far, pads as they came; -1 where the model was fed embeddings."""

    @property
    def evictable(self) -> Sequence[Any]:
        """Layers whose pairs can be evicted."""


@runtime_checkable
class NeedsReplay(Protocol):
    """A policy that needs forwards of its own (a replay of the text, say) after reading and before the settle."""

    def prepare(self, model: Any, cache: ReplayCache, ids: Int[Tensor, "batch new"]) -> None:
        """Run them and leave the cache as it was, except for the policy's own annotations.

        What they write must not depend on the budget: one reading prepares for all budgets.

        Args:
            model: An attached model.
            cache: Has read the ids; :func:`vestige.models.forward.replay` feeds it more and takes that back.
            ids: What was read last.
        """


@dataclass(frozen=True, kw_only=True)
class NewPairs:
    """Pairs of one layer at the moment they are stored.

    Args:
        layer_idx: Index of the layer in the model.
        hidden: What enters the attention module, if the policy needs ``"hidden"``.
        keys: New keys, after RoPE.
        values: New values.
        output: The layer's output projection, if the policy needs ``"output"``.
        model: The whole model, for policies that bring something made for it.
    """

    layer_idx: int
    hidden: Float[Tensor, "batch new hidden"] | None
    keys: Float[Tensor, "batch kv_heads new head_dim"]
    values: Float[Tensor, "batch kv_heads new value_dim"]
    output: OutputProjection | None = None
    model: PreTrainedModel | None = None


@runtime_checkable
class PairAnnotator(Protocol):
    """A policy that stores side arrays beside each pair when it is written (a gate's retention, a value's norm)."""

    annotations: ClassVar[frozenset[str]]
    annotation_options: ClassVar[tuple[str, ...]]

    def annotate(self, written: NewPairs) -> Mapping[str, Tensor]:
        """Return a ``batch kv_heads new ...`` tensor for each of ``annotations``; they travel with the pairs."""


@runtime_checkable
class QueryObserver(Protocol):
    """A policy that looks at every query as it attends (accumulated attention, say)."""

    def watch(self, glance: RowView) -> None:
        """Look at one row and write what is found into the policy's own side arrays, in place."""


@runtime_checkable
class LayerObserver(Protocol):
    """A policy that looks at every query as it attends, at all heads of a layer together (an indexer, say)."""

    def watch_layer(self, glance: LayerView) -> None:
        """Look at one batch row of a layer and write what is found into the policy's own side arrays, in place."""


@runtime_checkable
class ResetsStatistics(Protocol):
    """A policy whose side arrays speak of the queries since the last eviction."""

    def renew(self, annotations: Mapping[str, Tensor]) -> None:
        """Begin anew, in place: pairs were evicted once a text was read, or while tokens were generated.

        Args:
            annotations: Of the pairs of one row.
        """


@runtime_checkable
class AllocatesRows(Protocol):
    """A policy that says how many pairs each row keeps (a pyramid, classes of heads): rows do not compete."""

    def allot(
        self, scores: Float[Tensor, " held"], grid: RowIndex, room: Int[Tensor, " batch"]
    ) -> Float[Tensor, " rows"]:
        """Return the pairs wanted for each row, in proportion: ``selection.apportion`` makes them add up.

        Args:
            scores: Of all layers.
            grid: Which row, layer and batch row a pair belongs to.
            room: Average pairs per row of each batch row.
        """


def check_pooling(observed: int, kernel: int) -> None:
    """Raise a PolicyError unless a policy looks at one query or more and pools over an odd number of tokens."""
    if observed < 1 or kernel < 1 or kernel % 2 == 0:
        raise PolicyError(f"observed must be at least 1 and kernel odd, got observed={observed}, kernel={kernel}")
