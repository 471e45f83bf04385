"""Budgets at which methods weigh the same: side arrays, records of queries and memories count as what they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from vestige import memory as memories
from vestige import policies
from vestige.attachment import attach
from vestige.bench.arms import Arm, cross
from vestige.bench.config import BenchConfig
from vestige.bench.rows import Record
from vestige.budget import Budget
from vestige.cache import KVCache
from vestige.reading import prefill

Key = tuple[str, str, str]
"""Policy, memory and budget of an arm."""
_READ = 64


@dataclass(frozen=True)
class Weight:
    """What a row of a cache weighs, in bytes, the mean over all rows.

    Args:
        pair: A pair with everything that lies beside it.
        fixed: What no eviction frees: records of queries, a memory's state.
    """

    pair: float
    fixed: float


def weight(model: PreTrainedModel, policy: str, memory: str = "none") -> Weight:
    """Return what a method weighs, measured on a short text.

    Args:
        model: Whose cache it is.
        policy: By name.
        memory: By name.

    Raises:
        VestigeError: There is no such method, or it has no weights for the model.
    """
    made = policies.make(policy, None if policy == "full" else Budget.fraction(1.0))
    cache = KVCache(model, made, memory=memories.make(memory))
    with attach(model), torch.no_grad():
        prefill(model, torch.arange(_READ, device=model.device)[None] + 2, cache)
    whole = cache.footprint()
    fixed = whole.fixed_bytes - cache.slack * whole.pair_bytes
    return Weight(pair=whole.pair_bytes / whole.rows, fixed=fixed / whole.rows)


def share(of: Weight, plain: Weight, length: int, fraction: float) -> float:
    """Return the share of the pairs that weighs as much as ``fraction`` of them with nothing beside them.

    Args:
        of: The method.
        plain: A cache that keeps everything.
        length: Tokens of the text.
        fraction: Of its pairs.
    """
    return (fraction * plain.pair - of.fixed / length) / of.pair


@dataclass(frozen=True, kw_only=True)
class Part:
    """One run, and the fraction of all pairs that each of its arms weighs as much as."""

    config: BenchConfig
    fractions: Mapping[Key, str]

    def budget_of(self, record: Record) -> str:
        """Return the fraction that a record is compared under; "1.0" for what evicts nothing."""
        arm = record["arm"]
        return self.fractions.get((arm["policy"], arm["memory"], arm["budget"]), arm["budget"])


def part(
    model: PreTrainedModel,
    names: Sequence[str],
    fractions: Sequence[str],
    length: int,
    *,
    memories: Sequence[str] = ("none",),
    peers: Sequence[str] = (),
    **config: Any,
) -> Part:
    """Return a run of the full cache, and of methods at budgets at which all weigh the same.

    Args:
        model: Whose caches are weighed.
        names: Policies.
        fractions: Of all pairs; peers hold just these.
        length: Tokens of the texts.
        memories: Each beside each policy.
        peers: Names of peers.
        config: What else :class:`BenchConfig` takes.
    """
    plain, found = weight(model, "full"), dict[Key, tuple[Arm, str]]()
    for name in names:
        for memory in memories:
            own = weight(model, name, memory)
            for fraction in fractions:
                budget = f"{share(own, plain, length, float(fraction)):.4f}"
                (arm,) = cross((name,), (budget,), memories=(memory,))
                found[name, memory, budget] = arm, fraction
    arms = (*cross(("full",), ()), *(arm for arm, _ in found.values()))
    if peers:
        arms += cross((), fractions, peers=peers)
    made = BenchConfig(arms=arms, lengths=(length,), **config)
    return Part(config=made, fractions={key: fraction for key, (_, fraction) in found.items()})
