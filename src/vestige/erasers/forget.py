"""Taking the pairs of spans out of what a memory absorbed, where the memory is a sum that can be taken apart."""

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
    """What will remain of the evicted without some spans; nothing is changed until :meth:`carry_out`.

    Args:
        cache: Whose memory it is.
        spans: What is forgotten.
        outcome: How far the memory will be free of them.
        read: Tokens of a batch row that were read again for it.
        remains: By layer index, where pairs are taken out.
    """

    cache: KVCache
    spans: tuple[Span, ...]
    outcome: ForgetResult
    read: int = 0
    remains: Mapping[int, LayerMemory] | None = None

    @staticmethod
    def of(cache: KVCache, spans: Sequence[Span], model: PreTrainedModel, *, wanted: bool = True) -> "MemoryRelease":
        """Return what it takes to forget some spans, which every batch row has seen.

        The ids up to the last one's end are read again, in one piece and with nothing evicted, to have their pairs once
        more. They are those that were absorbed, up to rounding, if nothing had been evicted when they were first read;
        if something had, or an eraser has moved what comes before them, the spans cannot be forgotten.

        Args:
            cache: Not changed.
            spans: Ascending and disjoint.
            model: An attached model.
            wanted: False only says how far the memory is free of the spans as it is.
        """
        found = {cache.forget(span) for span in spans} - {ForgetResult.EXACT}
        if not found or not wanted or not _can_release(cache, spans):
            return MemoryRelease(cache, tuple(spans), found.pop() if found else ForgetResult.EXACT)
        end = spans[-1].end
        reread_cache = KVCache(model, Full())
        with torch.no_grad():
            reread(model, reread_cache, [row[:end] for row in collect_fed_rows(cache)], chunk=end)
        return MemoryRelease(
            cache, tuple(spans), ForgetResult.SUBTRACTED, end, _subtract_pairs(cache, reread_cache, spans)
        )

    def carry_out(self) -> None:
        """Have the cache forget."""
        if self.remains is not None:
            edits.replace_memories(self.cache, self.remains, self.spans)


def forget(cache: KVCache, spans: Span | Sequence[Span], *, model: PreTrainedModel) -> ForgetResult:
    """Free a cache's memory of spans, in place, as far as can be; pairs that are held are left as they are.

    Args:
        cache: What the model has read.
        spans: Seen by every batch row.
        model: An attached model.

    Returns:
        ``EXACT`` if none of their pairs was ever absorbed, ``SUBTRACTED`` if those that were are out now, at the cost
        of reading up to their end once more, else ``IMPOSSIBLE``, and then nothing is changed. What is left is exact up
        to how the memory rounds what it stores: of ``slots`` in float16 that were nearly emptied, a few percent.
    """
    release = MemoryRelease.of(cache, (spans,) if isinstance(spans, Span) else sorted(spans), model)
    release.carry_out()
    return release.outcome


def _can_release(cache: KVCache, spans: Sequence[Span]) -> bool:
    """Return whether pairs can be subtracted: not from a memory that is no plain sum, nor pairs that no reading gives
    again (of embeddings, behind what an eraser changed, or read when something had been evicted already), nor beside
    pairs of the same tokens, of other heads, that are out already."""
    fed, end = not bool((cache.ids[cache.real] < 0).any()), spans[-1].end
    changed = any(one.start < end for one in cache.state.erased)
    replayable = all(end <= most for most in cache.state.absorbed.replayable.values())
    released = any(map(cache.state.absorbed.again, spans))
    return (
        cache.state.bound_memory is not None
        and cache.state.bound_memory.releases
        and fed
        and not changed
        and replayable
        and not released
    )


def _subtract_pairs(cache: KVCache, reread_cache: KVCache, spans: Sequence[Span]) -> dict[int, LayerMemory]:
    """Return what remains without the pairs of spans that a cache no longer holds, and that are not out already; a twin
    holds all of them."""
    found, out = {}, cache.state.absorbed.released
    for layer, reread_layer in zip(cache.evictable, reread_cache.evictable, strict=True):
        if layer.remains is None:
            continue
        slots, lengths = [], []
        for row in range(layer.rows):
            places = reread_layer.positions(row)
            evicted = within(places, spans) & ~within(places, out) & ~torch.isin(places, layer.positions(row))
            slots.append(reread_layer.starts[row] + evicted.nonzero()[:, 0])
            lengths.append(int(evicted.sum()))
        if sum(lengths):
            absorbed = EvictedPairs.of(layer.layer_idx, reread_layer.columns, torch.cat(slots), lengths)
            found[layer.layer_idx] = layer.remains.release(absorbed)
    return found
