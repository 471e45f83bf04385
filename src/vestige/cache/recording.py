"""The statistics that a cache records while it is filled: the union of those its policy and observers need."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vestige.errors import PolicyError
from vestige.models.layout import ModelLayout
from vestige.policies.base import LayerObserver, NeedsWeights, NewPairs, PairAnnotator, Policy, QueryObserver
from vestige.policies.observation import LayerView, RowView


@dataclass(frozen=True)
class RecordingSpec:
    """Statistics that layers record in addition to keys and values.

    Args:
        needs: Names of the needed inputs, as in :attr:`Policy.needs`.
        ring_sizes: Number of latest queries and hidden states that each layer records, by name.
        writers: Policies that store side arrays with new pairs.
        watchers: Called with every row as queries attend to it.
        layer_watchers: Called with all rows of a layer and batch row together.
    """

    needs: frozenset[str] = frozenset()
    ring_sizes: Mapping[str, int] = field(default_factory=dict)
    writers: tuple[PairAnnotator, ...] = ()
    watchers: tuple[Callable[[RowView], None], ...] = field(default=(), compare=False)  # equal policies' methods differ
    layer_watchers: tuple[Callable[[LayerView], None], ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, observers: Sequence[Policy]) -> "RecordingSpec":
        """Return the union of these policies' needs; of policies with equal side arrays, one writes them.

        Raises:
            PolicyError: Two policies would write different things into one side array.
        """
        active = [policy for policy in observers if isinstance(policy, PairAnnotator | QueryObserver | LayerObserver)]
        distinct = {annotation_key(policy): policy for policy in active}.values()
        owners: dict[str, Policy] = {}
        for policy in distinct:
            for name in policy.annotations:
                if owners.setdefault(name, policy) is not policy:
                    raise PolicyError(
                        f"two policies would write different things into the side array {name!r}: "
                        f"{owners[name]} and {policy}"
                    )
        return cls(
            needs=frozenset[str]().union(*(observer.needs for observer in observers)),
            ring_sizes=_merge_sizes(observer.ring_sizes for observer in observers),
            writers=tuple(policy for policy in distinct if isinstance(policy, PairAnnotator)),
            watchers=tuple(policy.watch for policy in distinct if isinstance(policy, QueryObserver)),
            layer_watchers=tuple(policy.watch_layer for policy in distinct if isinstance(policy, LayerObserver)),
        )

    @property
    def annotations(self) -> frozenset[str]:
        """Names of the side arrays."""
        return frozenset[str]().union(*(writer.annotations for writer in self.writers))

    @property
    def has_observers(self) -> bool:
        """Whether any policy observes every query."""
        return bool(self.watchers or self.layer_watchers)

    @property
    def longest_ring(self) -> int:
        """Number of rows in the largest ring."""
        return max(self.ring_sizes.values(), default=0)

    @property
    def needs_rope(self) -> bool:
        """Whether a statistic undoes RoPE of keys or queries."""
        return not self.needs.isdisjoint({"rope", "query_moments"})

    def check_model(self, layout: ModelLayout) -> None:
        """Refuse a model whose statistics cannot be recorded, before reading.

        Raises:
            ModelError: It has no plain output projection, its rotary embedding is unknown, or a policy's weights were
                made for another model.
        """
        for policy in self.writers:
            if isinstance(policy, NeedsWeights):
                policy.bind(layout.model)
        if "output" in self.needs:
            for layer_idx in layout.evictable:
                layout.output(layer_idx)
        if self.needs_rope:
            layout.rope()

    def annotate(self, written: NewPairs) -> dict[str, Tensor]:
        """Return the side arrays of new pairs.

        Raises:
            PolicyError: A policy gave others than it declares.
        """
        arrays: dict[str, Tensor] = {}
        for policy in self.writers:
            new = policy.annotate(written)
            if new.keys() != policy.annotations:
                raise PolicyError(f"{policy} gave the side arrays {sorted(new)}, not {sorted(policy.annotations)}")
            arrays |= new
        return arrays

    def check(self, policy: Policy) -> None:
        """Raise a PolicyError if a policy needs a statistic that is not recorded."""
        short = [name for name, size in policy.ring_sizes.items() if size > self.ring_sizes.get(name, 0)]
        if short or not (policy.needs <= self.needs and policy.annotations <= self.annotations):
            needed = _describe(policy.needs | policy.annotations, policy.ring_sizes)
            recorded = _describe(self.needs | self.annotations, self.ring_sizes)
            raise PolicyError(
                f"policy {type(policy).__name__} needs {needed}, this cache recorded {recorded}; "
                "name the policy in KVCache(..., observers=[...]) before reading"
            )
        if isinstance(policy, PairAnnotator) and annotation_key(policy) not in map(annotation_key, self.writers):
            options = ", ".join(policy.annotation_options) or "options"
            raise PolicyError(
                f"what this cache keeps beside its pairs ({', '.join(sorted(policy.annotations))}) was written with "
                f"other {options} than those of {policy}"
            )


def annotation_key(policy: Policy | PairAnnotator) -> tuple[object, ...]:
    """Return a key; policies with equal keys can share one side array."""
    return (type(policy), *(getattr(policy, name) for name in policy.annotation_options))


def _describe(names: frozenset[str], sizes: Mapping[str, int]) -> str:
    """Return names for a message, with ring sizes."""
    return ", ".join(f"{name} ({sizes[name]})" if name in sizes else name for name in sorted(names)) or "nothing"


def _merge_sizes(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the largest size for each name."""
    merged: dict[str, int] = {}
    for policy_sizes in sizes:
        merged |= {name: max(size, merged.get(name, 0)) for name, size in policy_sizes.items()}
    return merged
