"""Budgets at which methods weigh the same: side arrays, records of queries and memories count as what they are."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vestige import memory as memories
from vestige import policies
from vestige.attachment import attach
from vestige.budget import Budget
from vestige.cache import KVCache
from vestige.reading import prefill

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


def pairs(of: Weight, plain: Weight, length: int, fraction: float) -> int:
    """Return how many pairs a row may keep to weigh as much as a share of all pairs with nothing beside them.

    Args:
        of: The method.
        plain: A cache that keeps everything.
        length: Tokens of the text.
        fraction: Of its pairs.
    """
    return int((fraction * length * plain.pair - of.fixed) / of.pair)
