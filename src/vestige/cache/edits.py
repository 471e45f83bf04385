"""Edits of a live cache, the building blocks of erasers: drop pairs, close gaps, skip tokens, replace memories.

Each function checks its preconditions before it changes anything. None of them runs the model.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from vestige.cache.kv_cache import KVCache
from vestige.cache.layer import RaggedLayer
from vestige.cache.query_records import RingBuffer
from vestige.errors import CacheError
from vestige.kernels import packed
from vestige.memory.base import LayerMemory
from vestige.models.rope import Rope
from vestige.spans import PositionMap, Span, within


def drop(cache: KVCache, spans: Sequence[Span]) -> None:
    """Free the pairs of spans. All other pairs keep their positions, which then have a gap."""
    for layer in cache.evictable:
        slots, lengths = layer.live_slots()
        kept = ~within(layer.columns["positions"][slots], spans)
        layer.keep(slots[kept], packed.counts_per_row(kept, lengths))


def close(cache: KVCache, spans: Sequence[Span]) -> PositionMap:
    """Remove spans from the sequence: free their pairs, move later pairs up, rotate their keys to the new positions.

    Values do not change, so later pairs still depend on the spans. Query records are moved and rotated likewise; query
    moments and the sums that policies keep with pairs still count the spans.

    Args:
        cache: Changed in place.
        spans: Ascending and disjoint.

    Returns:
        The map from old to new positions.

    Raises:
        ModelError: The model's rotary embedding is unknown. Nothing was changed.
        CacheError: A memory absorbed pairs at or after the spans, which it cannot move. Nothing was changed.
    """
    rope = cache.layout.rope()
    remap = PositionMap(tuple(spans))
    if cache.state.absorbed.overlaps(Span(spans[0].start, max(*cache.seen, spans[-1].end))):
        raise CacheError(
            "the cache's memory took in pairs at or behind the span, and what it holds cannot be moved; "
            "use an eraser that keeps positions (drop, learned), or recompute"
        )
    for layer in cache.evictable:
        _close_rings(cache, layer, remap, rope)
        _close_pairs(layer, remap, rope)
    cache.state.remove(remap)
    return remap


def skip(cache: KVCache, ids: Int[Tensor, "batch new"], real: Tensor) -> None:
    """Skip tokens without reading them: record their ids and store no pairs, so that positions have a gap."""
    cache.state.skip(ids, real)
    for layer in cache.evictable:
        for ring in layer.rings.values():
            ring.skip(cache.seen)
        layer.padded_seen += ids.shape[1]
        if layer.is_initialized:
            layer.keep(*layer.live_slots())
        layer.ragged = True


def replace_memories(cache: KVCache, remains: Mapping[int, LayerMemory], released: Sequence[Span]) -> None:
    """Replace the memories of layers by ones from which the pairs of some spans were subtracted.

    Args:
        cache: Changed in place.
        remains: New memories by layer index.
        released: The subtracted spans.
    """
    for layer in cache.evictable:
        layer.remains = remains.get(layer.layer_idx, layer.remains)
    for span in released:
        cache.state.absorbed.remove(span)


def _close_pairs(layer: RaggedLayer, remap: PositionMap, rope: Rope) -> None:
    """Drop a layer's pairs of the spans and renumber the others; a dense layer stays dense."""
    dense = not layer.ragged
    slots = layer.stored_slots()
    kept = ~within(layer.columns["positions"][slots], remap.spans)
    layer.keep(slots[kept], packed.counts_per_row(kept, layer.lengths))
    layer.ragged = not dense
    layer.padded_seen -= remap.removed
    before = layer.columns["positions"]
    after = remap.moved(before)
    moved = (before != after).nonzero()[:, 0]
    if len(moved):
        keys = layer.columns["keys"]
        unrotated = rope.unrotate(keys[moved].float(), before[moved], layer.layer_idx)
        rotated = rope.rotate(unrotated, after[moved], layer.layer_idx)
        layer.columns["keys"] = keys.index_copy(0, moved, rotated.to(keys.dtype))
        layer.columns["positions"] = after


def _close_rings(cache: KVCache, layer: RaggedLayer, remap: PositionMap, rope: Rope) -> None:
    """Move a layer's latest queries and hidden states to their new positions; drop those of the spans."""
    for name, ring in layer.rings.items():
        if not isinstance(ring, RingBuffer):
            continue
        new_data, begins = torch.zeros_like(ring.data), ring.find_begins(cache.seen)
        for b, rows in enumerate(ring.latest(cache.seen)):
            before = torch.arange(begins[b], cache.seen[b], device=rows.device)
            kept = ~within(before, remap.spans)
            rows, before = rows[:, kept], before[kept]
            after = remap.moved(before)
            if name == "queries":
                unrotated = rope.unrotate(rows.float(), before, layer.layer_idx)
                rows = rope.rotate(unrotated, after, layer.layer_idx).to(ring.data.dtype)
            new_data[b][:, after % ring.size] = rows
        layer.rings[name] = RingBuffer(new_data, list(map(remap.at, begins)))
