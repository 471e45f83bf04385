"""Taking spans out of a cache that is alive: dropping their pairs, closing the gap, leaving one.

Each function checks what it needs before it changes anything. What erasers are made of; none of it reads a token.
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
    """Free the pairs of spans. Everything else stays where it is, so positions have a gap."""
    for layer in cache.evictable:
        slots, lengths = layer.live_slots()
        kept = ~within(layer.columns["positions"][slots], spans)
        layer.keep(slots[kept], packed.counts_per_row(kept, lengths))


def close(cache: KVCache, spans: Sequence[Span]) -> PositionMap:
    """Take spans out of the sequence: free their pairs, move what follows up, turn its keys to where they then are.

    Values are untouched, so what follows still carries what it read of the spans. Records of queries are turned and
    moved likewise; moments of queries and sums that policies keep beside pairs still count the spans.

    Args:
        cache: Changed in place.
        spans: Ascending and disjoint.

    Returns:
        How positions changed.

    Raises:
        ModelError: How the model turns keys is not understood. Nothing was changed.
        CacheError: A memory absorbed pairs at or behind the spans, which it cannot move. Nothing was changed.
    """
    rope, remap = cache.layout.rope(), PositionMap(tuple(spans))
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
    """Go on behind tokens that are not read: their ids are booked, no pairs are stored, and positions have a gap."""
    cache.state.skip(ids, real)
    for layer in cache.evictable:
        for ring in layer.rings.values():
            ring.skip(cache.seen)
        layer.padded_seen += ids.shape[1]
        if layer.is_initialized:
            layer.keep(*layer.live_slots())
        layer.ragged = True


def replace_memories(cache: KVCache, remains: Mapping[int, LayerMemory], released: Sequence[Span]) -> None:
    """Give layers another state of the cache's memory, of which pairs of some spans were taken out.

    Args:
        cache: Changed in place.
        remains: By layer index.
        released: What was taken out.
    """
    for layer in cache.evictable:
        layer.remains = remains.get(layer.layer_idx, layer.remains)
    for span in released:
        cache.state.absorbed.remove(span)


def _close_pairs(layer: RaggedLayer, remap: PositionMap, rope: Rope) -> None:
    """Drop a layer's pairs of the spans and renumber the others; a layer of which nothing was evicted stays dense."""
    dense = not layer.ragged
    slots = packed.packed_slots(layer.starts, layer.lengths, layer.device)
    kept = ~within(layer.columns["positions"][slots], remap.spans)
    layer.keep(slots[kept], packed.counts_per_row(kept, layer.lengths))
    layer.ragged = not dense
    layer.padded_seen -= remap.removed
    before = layer.columns["positions"]
    after = remap.moved(before)
    moved = (before != after).nonzero()[:, 0]
    if len(moved):
        keys = layer.columns["keys"]
        still = rope.unrotate(keys[moved].float(), before[moved], layer.layer_idx)
        turned = rope.rotate(still, after[moved], layer.layer_idx)
        layer.columns["keys"] = keys.index_copy(0, moved, turned.to(keys.dtype))
        layer.columns["positions"] = after


def _close_rings(cache: KVCache, layer: RaggedLayer, remap: PositionMap, rope: Rope) -> None:
    """Move a layer's latest queries and hidden states to their new positions; those of the spans are forgotten."""
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
                still = rope.unrotate(rows.float(), before, layer.layer_idx)
                rows = rope.rotate(still, after, layer.layer_idx).to(ring.data.dtype)
            new_data[b][:, after % ring.size] = rows
        layer.rings[name] = RingBuffer(new_data, list(map(remap.at, begins)))
