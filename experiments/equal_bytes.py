"""Budgets at which all methods take equal bytes: side arrays, query records and memories count in full."""

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
    """Bytes of a row of a cache, the mean over all rows.

    Args:
        pair: Bytes of a pair with its side arrays.
        fixed: Bytes that no eviction frees: query records, the state of a memory.
    """

    pair: float
    fixed: float


def weigh(model: PreTrainedModel, policy: str, memory: str = "none") -> Weight:
    """Return the weight of a method, measured on a short text.

    Args:
        model: Of the cache.
        policy: By name.
        memory: By name.

    Raises:
        VestigeError: There is no such method, or it has no weights for the model.
    """
    cache = _fill_cache(model, policy, memory)
    whole = cache.state.footprint()
    fixed = whole.fixed_bytes - cache.state.growth_slots * whole.pair_bytes
    return Weight(pair=whole.pair_bytes / whole.rows, fixed=fixed / whole.rows)


def measure_plain_pair(model: PreTrainedModel) -> float:
    """Return the bytes of a pair in transformers' own cache: keys and values, the mean over all rows."""
    cache = _fill_cache(model, "full", "none")
    return cache.report().full_kv_bytes / (cache.state.footprint().rows * _LENGTH)


def _fill_cache(model: PreTrainedModel, policy: str, memory: str) -> KVCache:
    made = policies.make(policy, None if policy == "full" else Budget.fraction(1.0))
    cache = KVCache(model, made, memory=memories.make(memory))
    with attach(model), torch.no_grad():
        prefill(model, torch.arange(_LENGTH, device=model.device)[None] + 2, cache)
    return cache


def find_kept_fraction(weight: Weight, plain: float, length: int, fraction: float) -> float:
    """Return the fraction of pairs at which a method takes the bytes of ``fraction`` of plain pairs.

    It is negative if the method's fixed bytes exceed these.

    Args:
        weight: Of the method.
        plain: Bytes of a pair without side arrays.
        length: Tokens of the text.
        fraction: Of its pairs.
    """
    return (fraction * plain - weight.fixed / length) / weight.pair


@dataclass(frozen=True, kw_only=True)
class Part:
    """One run, and the fraction of plain pairs whose bytes each of its arms takes."""

    config: BenchConfig
    fractions: Mapping[Key, str]
    impossible: tuple[str, ...] = ()
    """Arms that are left out, as their fixed bytes alone exceed the budget."""

    def budget_of(self, record: Record) -> str:
        """Return the fraction under which a record is compared; "1.0" for caches that evict nothing."""
        arm = record["arm"]
        return self.fractions.get((arm["policy"], arm["memory"], arm["budget"]), arm["budget"])


def make_part(
    model: PreTrainedModel,
    names: Sequence[str],
    fractions: Sequence[str],
    length: int,
    *,
    memories: Sequence[str] = ("none",),
    **config: Any,
) -> Part:
    """Return a run of the full cache, and of methods at budgets of equal bytes.

    Args:
        model: For measuring the bytes of caches.
        names: Policies.
        fractions: Of all pairs, in transformers' own cache.
        length: Tokens of the texts.
        memories: To combine with each policy.
        config: Further options of :class:`BenchConfig`.
    """
    plain = measure_plain_pair(model)
    found: dict[Key, tuple[Method, str]] = {}
    impossible = []
    for name, memory in product(names, memories):
        own = weigh(model, name, memory)
        for fraction in fractions:
            kept = find_kept_fraction(own, plain, length, float(fraction))
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


def list_impossible(parts: Mapping[str, Part]) -> list[str]:
    """Return a paragraph for each arm that no budget makes small enough."""
    return [f"Cannot be that small: {arm}." for part in parts.values() for arm in part.impossible]
