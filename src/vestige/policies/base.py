"""The interface of eviction policies: `Policy`, and the protocols for what some policies do besides scoring."""

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
from vestige.policies.selection import SCALES, RowIndex, Scale, Share, parse_share

NEEDS = frozenset({"queries", "query_moments", "rope", "hidden", "output"})


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Scores pairs; the cache decides when, protects, and evicts. Frozen: state lives in the cache.

    Raises:
        BudgetError: The budget is below sink + window.
        PolicyError: A field is out of range.
    """

    budget: Budget | None
    """Average pairs per row; None never evicts."""
    share: Share = "head"
    """Which pairs compete: those of a row ("head"), of a layer, or of the whole model."""
    sink: int = 4
    """First tokens that always stay."""
    window: int = 32
    """Most recent tokens that always stay."""
    every: int = 64
    """Tokens generated between two evictions."""
    floor: float = 0.0
    """Share of the average budget that each row keeps before rows compete, in [0, 1]."""
    first_share: float = 0.0
    """Share of the average budget reserved for the first tokens, where that is more than ``sink``."""
    recent_share: float = 0.0
    """Share of the average budget reserved for the most recent tokens, where that is more than ``window``."""
    scale: Scale = "calibrated"
    """How the scores of layers are made comparable, for ``share="model"`` and for ``threshold``."""
    threshold: float | None = None
    """Evict every unprotected pair whose comparable score is below this, even within the budget."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Inputs that the cache must provide: "queries" (the latest ``observed`` of each layer), "query_moments" (mean and
    covariance of all queries, before RoPE), "rope" (the model's rotation), "hidden" (attention inputs: for
    `PairAnnotator`, `LayerObserver` and the latest ``hidden_observed``), "output" (the output projection, for
    `PairAnnotator`).
    """
    annotations: ClassVar[frozenset[str]] = frozenset()
    """Names of the side arrays that the policy keeps beside the pairs."""
    query_annotations: ClassVar[frozenset[str]] = frozenset()
    """Annotations accumulated from queries; they are kept when an eraser rewrites the pair."""
    annotation_options: ClassVar[tuple[str, ...]] = ()
    """Fields that determine the annotations; policies that agree in these can share them."""
    reading_slack: ClassVar[float] = 1.0
    """Factor on the budget between the chunks of a text."""

    def __post_init__(self) -> None:
        parse_share(self.share)
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
        """Pairs of each row that are never evicted, not counting pins."""
        return self.sink + self.window

    def protected_ends(self, pair_limit: int) -> tuple[int, int]:
        """Return the numbers of first and of latest tokens that a row never evicts, by the average pairs per row."""
        first, recent = (Budget.share_of(pair_limit, share) for share in (self.first_share, self.recent_share))
        return max(self.sink, first), max(self.window, recent)

    @property
    def evicts(self) -> bool:
        """Whether the policy ever evicts."""
        return self.budget is not None or self.threshold is not None

    @property
    def ring_sizes(self) -> dict[str, int]:
        """Sizes of the ring buffers that this policy needs, by name: in tokens, and 1 for query moments."""
        sizes = {"queries": getattr(self, "observed", 1), "hidden": getattr(self, "hidden_observed", 0)}
        sizes["query_moments"] = 1
        return {name: size for name, size in sizes.items() if name in self.needs and size}

    @abstractmethod
    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return the importance of each pair of a layer, packed as the observation is; larger means keep.

        Scores never encode protection, the observation is never modified, and NaN is an error.
        """


@runtime_checkable
class NeedsWeights(Protocol):
    """A policy with weights trained for one model. `bind` is called before the cache reads anything."""

    def bind(self, model: PreTrainedModel) -> None:
        """Load the weights for a model.

        Raises:
            ModelError: The policy has no weights for this model.
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

        These must not depend on the budget: one reading prepares for all budgets. The cache of the attached model has
        read the ids last; :func:`vestige.models.forward.replay` feeds it more and takes that back.
        """


@dataclass(frozen=True, kw_only=True)
class NewPairs:
    """Pairs of one layer at the moment they are stored.

    Args:
        layer_idx: Index of the layer in the model.
        hidden: Inputs of the attention module, if the policy needs ``"hidden"``.
        keys: New keys, after RoPE.
        values: New values.
        output: The layer's output projection, if the policy needs ``"output"``.
        model: The whole model, for policies with weights made for it.
    """

    layer_idx: int
    hidden: Float[Tensor, "batch new hidden"] | None
    keys: Float[Tensor, "batch kv_heads new head_dim"]
    values: Float[Tensor, "batch kv_heads new value_dim"]
    output: OutputProjection | None = None
    model: PreTrainedModel | None = None


@runtime_checkable
class PairAnnotator(Protocol):
    """A policy that stores side arrays beside new pairs, such as a gate's retention or a value's norm."""

    annotations: ClassVar[frozenset[str]]
    annotation_options: ClassVar[tuple[str, ...]]

    def annotate(self, new: NewPairs) -> Mapping[str, Tensor]:
        """Return a ``batch kv_heads new ...`` tensor for each of ``annotations``; they move with the pairs."""


@runtime_checkable
class QueryObserver(Protocol):
    """A policy that observes every query as it attends, for instance to accumulate attention."""

    def watch(self, view: RowView) -> None:
        """Observe one row and update the policy's own side arrays in place."""


@runtime_checkable
class LayerObserver(Protocol):
    """A policy that observes every query as it attends, all heads of a layer together, as an indexer does."""

    def watch_layer(self, view: LayerView) -> None:
        """Observe one batch row of a layer and update the policy's own side arrays in place."""


@runtime_checkable
class ResetsStatistics(Protocol):
    """A policy whose side arrays accumulate queries since the last eviction."""

    def renew(self, annotations: Mapping[str, Tensor]) -> None:
        """Reset the side arrays of one row in place, after an eviction at the end of a text or while generating."""


@runtime_checkable
class AllocatesRows(Protocol):
    """A policy that allocates the number of pairs of each row, such as a pyramid: rows do not compete."""

    def allot(
        self, scores: Float[Tensor, " held"], index: RowIndex, pair_limits: Int[Tensor, " batch"]
    ) -> Float[Tensor, " rows"]:
        """Return the pairs wanted for each row; ``selection.apportion`` scales them to the budget.

        Args:
            scores: Scores of all layers.
            index: Row, layer and batch row of each pair.
            pair_limits: Average pairs per row of each batch row.
        """
