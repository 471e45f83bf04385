"""Forgetting spans: subtracting their pairs from memories that are plain sums of the pairs they absorbed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vestige.cache import edits
from vestige.cache.kv_cache import KVCache
from vestige.erasers.replay import collect_fed_rows, reread
from vestige.memory.base import EvictedPairs, ForgetResult, LayerMemory
from vestige.policies.full import Full
from vestige.spans import Span, within


@dataclass(frozen=True)
class MemoryRelease:
    """A planned subtraction of spans from a cache's memory; :meth:`carry_out` applies it.

    Args:
        cache: The cache with the memory.
        spans: Spans to forget.
        outcome: Whether the memory will be free of them.
        read: Tokens per batch row that were read again to plan it.
        remains: New memories by layer index, for layers that change.
    """

    cache: KVCache
    spans: tuple[Span, ...]
    outcome: ForgetResult
    read: int = 0
    remains: Mapping[int, LayerMemory] | None = None

    @staticmethod
    def of(cache: KVCache, spans: Sequence[Span], model: PreTrainedModel, *, wanted: bool = True) -> "MemoryRelease":
        """Plan to forget spans that every batch row has seen.

        The ids up to the end of the last span are read again in one piece, without eviction, to recompute their pairs.
        These equal the absorbed ones, up to rounding, if nothing had been evicted when they were first read. If pairs
        had been evicted, or an eraser has moved earlier tokens, the spans cannot be forgotten.

        Args:
            cache: Not changed.
            spans: Ascending and disjoint.
            model: An attached model.
            wanted: False only reports whether the memory is free of the spans already.
        """
        results = {cache.forget(span) for span in spans} - {ForgetResult.EXACT}
        if not results or not wanted or not _can_release(cache, spans):
            return MemoryRelease(cache, tuple(spans), results.pop() if results else ForgetResult.EXACT)
        end = spans[-1].end
        full = KVCache(model, Full())
        with torch.no_grad():
            reread(model, full, [row[:end] for row in collect_fed_rows(cache)], chunk=end)
        return MemoryRelease(cache, tuple(spans), ForgetResult.SUBTRACTED, end, _subtract_pairs(cache, full, spans))

    def carry_out(self) -> None:
        """Replace the memories of the cache."""
        if self.remains is not None:
            edits.replace_memories(self.cache, self.remains, self.spans)


def forget(cache: KVCache, spans: Span | Sequence[Span], *, model: PreTrainedModel) -> ForgetResult:
    """Remove spans from a cache's memory, in place, if possible; pairs that the cache holds are not changed.

    Args:
        cache: The cache with the memory.
        spans: Spans that every batch row has seen.
        model: An attached model.

    Returns:
        ``EXACT`` if the memory never absorbed one of their pairs. ``SUBTRACTED`` if their absorbed pairs are subtracted
        now, at the cost of reading up to the end of the spans again. Else ``IMPOSSIBLE``; nothing is changed. After a
        subtraction the memory is exact up to its rounding, a few percent for nearly emptied ``slots`` in float16.
    """
    release = MemoryRelease.of(cache, (spans,) if isinstance(spans, Span) else sorted(spans), model)
    release.carry_out()
    return release.outcome


def _can_release(cache: KVCache, spans: Sequence[Span]) -> bool:
    """Tell whether the pairs of spans can be recomputed and subtracted from the memory."""
    state, end = cache.state, spans[-1].end
    return (
        state.bound_memory is not None
        and state.bound_memory.releases
        and not bool((cache.ids[cache.real] < 0).any())  # the model got ids, not embeddings
        and not any(erased.start < end for erased in state.erased)
        and all(end <= tokens for tokens in state.absorbed.replayable.values())  # nothing was evicted at first reading
        and not any(map(state.absorbed.was_released, spans))
    )


def _subtract_pairs(cache: KVCache, full: KVCache, spans: Sequence[Span]) -> dict[int, LayerMemory]:
    """Return the memories of a cache, by layer index, without its evicted pairs of spans.

    Args:
        cache: Not changed. Pairs that it holds, and spans released earlier, are not in its memories.
        full: A cache that holds all pairs of the spans.
        spans: Ascending and disjoint.
    """
    memories, released = {}, cache.state.absorbed.released
    for layer, full_layer in zip(cache.evictable, full.evictable, strict=True):
        if layer.remains is None:
            continue
        slots, lengths = [], []
        for row in range(layer.rows):
            positions = full_layer.positions(row)
            absorbed = within(positions, spans) & ~within(positions, released)
            absorbed &= ~torch.isin(positions, layer.positions(row))
            slots.append(full_layer.starts[row] + absorbed.nonzero()[:, 0])
            lengths.append(int(absorbed.sum()))
        if sum(lengths):
            pairs = EvictedPairs.of(layer.layer_idx, full_layer.columns, torch.cat(slots), lengths)
            memories[layer.layer_idx] = layer.remains.release(pairs)
    return memories
