"""Measure a sample text to set options of policies."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vestige.budget import Budget
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill
from vestige.policies.xkv import XKV


def profile_layers(model: Any, ids: Int[Tensor, "batch new"], budget: Budget, **options: Any) -> tuple[float, ...]:
    """Return the mean number of pairs that each evictable layer keeps of a sample text, for ``XKV(profile=...)``.

    Args:
        model: An attached model.
        ids: Ids of a short sample text.
        budget: Budget of the cache; well below the length of the text, or all layers keep everything.
        options: Other fields of ``XKV``.
    """
    cache = KVCache(model, XKV(budget=budget, **options))
    with torch.no_grad():
        prefill(model, ids, cache)
    pairs = [layer.live_lengths() for layer in cache.evictable]
    return tuple(sum(rows) / len(rows) for rows in pairs)
