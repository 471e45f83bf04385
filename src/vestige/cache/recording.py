"""What is recorded while a cache is filled: the union of what its policy and its observers look back at."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vestige.errors import PolicyError
from vestige.models.anatomy import ModelLayout
from vestige.policies.base import LayerObserver, NeedsWeights, NewPairs, PairAnnotator, Policy, QueryObserver
from vestige.policies.observation import LayerView, RowView


@dataclass(frozen=True)
class RecordingSpec:
    """What the layers keep beside keys and values.

    Args:
        needs: As :attr:`Policy.needs`.
        ring_sizes: Latest queries and hidden states that each layer remembers, by name.
        writers: Policies that store side arrays beside new pairs.
        watchers: What is shown every row as queries attend to it.
        layer_watchers: What is shown all rows of a batch row of a layer together.
    """

    needs: frozenset[str] = frozenset()
    ring_sizes: Mapping[str, int] = field(default_factory=dict)
    writers: tuple[PairAnnotator, ...] = ()
    watchers: tuple[Callable[[RowView], None], ...] = field(
        default=(), compare=False
    )  # methods of equal policies differ
    layer_watchers: tuple[Callable[[LayerView], None], ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, observers: Sequence[Policy]) -> "RecordingSpec":
        """Return what these policies need together; those that would write the same do so once.

        Raises:
            PolicyError: Two policies would write different things into one side array.
        """
        recording = [one for one in observers if isinstance(one, PairAnnotator | QueryObserver | LayerObserver)]
        distinct = {annotation_key(one): one for one in recording}.values()
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
            writers=tuple(one for one in distinct if isinstance(one, PairAnnotator)),
            watchers=tuple(one.watch for one in distinct if isinstance(one, QueryObserver)),
            layer_watchers=tuple(one.watch_layer for one in distinct if isinstance(one, LayerObserver)),
        )

    @property
    def annotations(self) -> frozenset[str]:
        """Names of the side arrays."""
        return frozenset[str]().union(*(one.annotations for one in self.writers))

    @property
    def has_observers(self) -> bool:
        """Whether anything looks at every query."""
        return bool(self.watchers or self.layer_watchers)

    @property
    def longest_ring(self) -> int:
        """Most tokens that any ring looks back."""
        return max(self.ring_sizes.values(), default=0)

    @property
    def needs_rope(self) -> bool:
        """Whether keys or queries are turned back to what they were before RoPE."""
        return not self.needs.isdisjoint({"rope", "query_moments"})

    def check_model(self, layout: ModelLayout) -> None:
        """Refuse a model that lacks what is to be recorded, before anything is read.

        Raises:
            ModelError: It has no plain output projection, its rotation is unknown, or what a policy brings along was
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
        found: dict[str, Tensor] = {}
        for policy in self.writers:
            new = policy.annotate(written)
            if new.keys() != policy.annotations:
                raise PolicyError(f"{policy} gave the side arrays {sorted(new)}, not {sorted(policy.annotations)}")
            found |= new
        return found

    def check(self, policy: Policy) -> None:
        """Raise a PolicyError if a policy needs what is not recorded."""
        short = [name for name, size in policy.ring_sizes.items() if size > self.ring_sizes.get(name, 0)]
        if short or not (policy.needs <= self.needs and policy.annotations <= self.annotations):
            raise PolicyError(
                f"policy {type(policy).__name__} needs {_list_needs(policy.needs | policy.annotations, policy.ring_sizes)}, "
                f"this cache recorded {_list_needs(self.needs | self.annotations, self.ring_sizes)}; "
                "name the policy in KVCache(..., observers=[...]) before reading"
            )
        if isinstance(policy, PairAnnotator) and annotation_key(policy) not in map(annotation_key, self.writers):
            options = ", ".join(policy.annotation_options) or "options"
            raise PolicyError(
                f"what this cache keeps beside its pairs ({', '.join(sorted(policy.annotations))}) was written with "
                f"other {options} than those of {policy}"
            )


def annotation_key(policy: Policy | PairAnnotator) -> tuple[object, ...]:
    """Return what bears on what a policy writes: its class and the options that it names."""
    return (type(policy), *(getattr(policy, name) for name in policy.annotation_options))


def _list_needs(names: frozenset[str], sizes: Mapping[str, int]) -> str:
    """Return names for a message, with how many of each are remembered."""
    return ", ".join(f"{name} ({sizes[name]})" if name in sizes else name for name in sorted(names)) or "nothing"


def _merge_sizes(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the largest number given for each name."""
    found: dict[str, int] = {}
    for one in sizes:
        found |= {name: max(size, found.get(name, 0)) for name, size in one.items()}
    return found
