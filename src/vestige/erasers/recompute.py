"""Read what is left anew: exact, and as slow as reading."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vestige.cache.kv_cache import KVCache
from vestige.erasers.base import EditResult, Eraser, EraseRequest, SlotOutcome
from vestige.erasers.replay import collect_fed_rows, reread
from vestige.memory.base import ForgetResult
from vestige.spans import PositionMap, Span


@dataclass(frozen=True, kw_only=True)
class Recompute(Eraser):
    """Read the ids without the span: from the span on where nothing was evicted or counted yet, else from the first.

    The cache then equals one that read only the remaining ids, under the same policy and budget; generated tokens count
    as read. Spans of an earlier erase that kept their positions stay gaps.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.DROPPED
    renumbers: ClassVar[bool] = True
    replays: ClassVar[bool] = True
    chunk: int = 1024
    """Tokens per forward."""

    def edit(self, scene: EraseRequest) -> EditResult:
        """Read into a second cache, which replaces the first when it is complete."""
        cache = scene.cache
        remap = PositionMap(scene.spans)
        rows = collect_fed_rows(cache)
        begin = scene.spans[0].start if _can_continue(cache, scene.spans) else 0
        copy = cache.fork(empty=not begin)
        if begin:
            copy.crop(begin - cache.seen[0])
            copy.state.restart_schedule(begin)  # as if the reading had ended here
        copy.state.move_spans(remap, cache.state)
        remaining = [_remove_spans(row, scene.spans) for row in rows]
        lengths = cache.state.lengths and tuple(n - remap.removed for n in cache.state.lengths)
        reread(scene.model, copy, remaining, begin=begin, length=lengths, chunk=self.chunk)
        rebuilt = scene.memory is not ForgetResult.EXACT
        cache.replace_with(copy)
        cache.state.history.mark_stale(_take_last(rows, remap.removed))
        skipped = sum(max(span.end - max(span.start, begin), 0) for span in cache.state.erased)
        read = max(map(len, remaining)) - begin - skipped
        suffix = min(read, max(map(len, remaining)) - scene.spans[0].start)
        return EditResult(
            recomputed=read,
            suffix_recomputed=suffix,
            memory=ForgetResult.REBUILT if rebuilt else ForgetResult.EXACT,
        )


def _can_continue(cache: KVCache, spans: tuple[Span, ...]) -> bool:
    """Tell whether the pairs before the spans equal those of a fresh reading.

    They do not if pairs were evicted, pads make rows begin in different columns, a policy counts queries, which cannot
    be uncounted, or policies need more recent tokens than the suffix has.
    """
    recording = cache.state.recording
    even = len(set(cache.seen)) == 1 and not cache.padded and len(cache.evictable) == len(cache.layers)
    counts = recording.has_observers or "query_moments" in recording.ring_sizes
    suffix = min(cache.seen) - spans[0].start - sum(map(len, spans))
    before = not any(gap.start < spans[0].start for gap in cache.state.erased)
    return even and before and not cache.ragged and not counts and suffix >= recording.longest_ring


def _remove_spans(row: Tensor, spans: tuple[Span, ...]) -> Tensor:
    kept = torch.ones(len(row), dtype=torch.bool)
    for span in spans:
        kept[span.start : span.end] = False
    return row[kept]


def _take_last(rows: list[Tensor], removed: int) -> Tensor | None:
    """Return the last ``removed`` ids of each row, or None if a row is shorter."""
    return torch.stack([row[-removed:] for row in rows]) if min(map(len, rows)) >= removed else None
