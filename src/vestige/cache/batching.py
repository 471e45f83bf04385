"""Joining several caches into the batch rows of one, so that one forward feeds them all."""

from collections.abc import Sequence

import torch

from vestige.cache.kv_cache import KVCache
from vestige.cache.layer import RaggedLayer
from vestige.errors import CacheError
from vestige.policies import Full


def can_join(caches: Sequence[KVCache]) -> bool:
    """Tell whether :func:`join` accepts these caches."""
    return _find_refusal(caches) is None


def join(caches: Sequence[KVCache]) -> KVCache:
    """Return a cache whose batch rows are those of several caches, in order. The caches are not changed.

    Pairs that were evicted, replaced or moved stay so. The joined cache keeps every pair from here on: it takes neither
    the policies of the caches nor their recorded statistics.

    Args:
        caches: Caches of one model; none is empty.

    Raises:
        CacheError: The caches belong to several models, or have memories or layers that cannot be joined.
    """
    if refusal := _find_refusal(caches):
        raise CacheError(refusal)
    joined = KVCache(caches[0].layout.model, Full())
    joined.state.join([cache.state for cache in caches])
    for index, layer in enumerate(joined.evictable):
        parts = [cache.evictable[index].packed_pairs() for cache in caches]
        columns = {name: torch.cat([pairs[name] for pairs, _ in parts]) for name in parts[0][0]}
        lengths = [length for _, lengths in parts for length in lengths]
        kv_heads = caches[0].evictable[index].kv_heads
        layer.restore(columns, lengths, kv_heads, joined.ids.shape[1], ragged_rows=True)
    return joined


def _find_refusal(caches: Sequence[KVCache]) -> str | None:
    if not caches or not all(cache.seen for cache in caches):
        return "there is nothing to join: give caches that have read something"
    if any(cache.layout.model is not caches[0].layout.model for cache in caches):
        return "these caches belong to different models"
    if any(cache.memory is not None for cache in caches):
        return "caches with a memory cannot be joined"
    if not all(isinstance(layer, RaggedLayer) for layer in caches[0].layers):
        return "this model has layers of other kinds (sliding, linear), whose states cannot be laid side by side"
    return None
