"""Budgets at which methods weigh the same: side arrays, records of queries and memories count as what they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel

from vestige import memory as memories
from vestige import policies
from vestige.bench.config import BenchConfig
from vestige.bench.methods.method import Method, cross
from vestige.bench.results.aggregate import Record
from vestige.budget import Budget
from vestige.cache.attach import attach
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill

Key = tuple[str, str, str]
"""Policy, memory and budget of an arm."""
_LENGTH = 64
_LEAST = 1e-4  # budgets have four digits


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
    cache = _read(model, policy, memory)
    whole = cache.footprint()
    fixed = whole.fixed_bytes - cache.growth_slots * whole.pair_bytes
    return Weight(pair=whole.pair_bytes / whole.rows, fixed=fixed / whole.rows)


def plain_pair(model: PreTrainedModel) -> float:
    """Return the bytes of a pair in transformers' own cache: keys and values, the mean over all rows."""
    cache = _read(model, "full", "none")
    return cache.report().full_kv_bytes / (cache.footprint().rows * _LENGTH)


def _read(model: PreTrainedModel, policy: str, memory: str) -> KVCache:
    made = policies.make(policy, None if policy == "full" else Budget.fraction(1.0))
    cache = KVCache(model, made, memory=memories.make(memory))
    with attach(model), torch.no_grad():
        prefill(model, torch.arange(_LENGTH, device=model.device)[None] + 2, cache)
    return cache


def kept_fraction(of: Weight, plain: float, length: int, fraction: float) -> float:
    """Return the fraction of the pairs that weighs as much as ``fraction`` of them with nothing beside them.

    It is negative if what no eviction frees weighs more than that.

    Args:
        of: The method.
        plain: Bytes of a pair with nothing beside it.
        length: Tokens of the text.
        fraction: Of its pairs.
    """
    return (fraction * plain - of.fixed / length) / of.pair


@dataclass(frozen=True, kw_only=True)
class Part:
    """One run, and the fraction of all pairs that each of its arms weighs as much as."""

    config: BenchConfig
    fractions: Mapping[Key, str]
    impossible: tuple[str, ...] = ()
    """Arms that are left out: what no eviction frees of them weighs more than they may."""

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
    **config: Any,
) -> Part:
    """Return a run of the full cache, and of methods at budgets at which all weigh the same.

    Args:
        model: Whose caches are weighed.
        names: Policies.
        fractions: Of all pairs, in transformers' own cache.
        length: Tokens of the texts.
        memories: Each beside each policy.
        config: What else :class:`BenchConfig` takes.
    """
    plain, found, impossible = plain_pair(model), dict[Key, tuple[Method, str]](), []
    for name, memory in product(names, memories):
        own = weight(model, name, memory)
        for fraction in fractions:
            kept = kept_fraction(own, plain, length, float(fraction))
            if kept < _LEAST:
                impossible.append(f"{name}, memory {memory}, at {fraction}")
                continue
            (arm,) = cross((name,), (budget := f"{kept:.4f}",), memories=(memory,))
            found[name, memory, budget] = arm, fraction
    arms = (*cross(("full",), ()), *(arm for arm, _ in found.values()))
    return Part(
        config=BenchConfig(methods=arms, lengths=(length,), **config),
        fractions={key: fraction for key, (_, fraction) in found.items()},
        impossible=tuple(impossible),
    )


def left_out(parts: Mapping[str, Part]) -> list[str]:
    """Return a paragraph for each arm that cannot be as small as it should."""
    return [f"Cannot be that small: {one}." for part in parts.values() for one in part.impossible]
