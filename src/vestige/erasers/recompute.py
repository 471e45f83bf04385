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

    The cache then equals one that read the remaining ids afresh, under the same policy and budget, with what was
    generated taken as read. Ids that an earlier erase marked stay out, and their positions stay a gap.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.DROPPED
    renumbers: ClassVar[bool] = True
    replays: ClassVar[bool] = True
    chunk: int = 1024
    """Tokens per forward."""

    def edit(self, scene: EraseRequest) -> EditResult:
        """Read into a second cache, which takes the place of the first once it is whole."""
        cache, remap = scene.cache, PositionMap(scene.spans)
        rows = collect_fed_rows(cache)
        begin = scene.spans[0].start if _can_continue(cache, scene.spans) else 0
        copy = cache.fork(empty=not begin)
        if begin:
            copy.crop(begin - cache.seen[0])
            copy.state.restart_schedule(begin)  # as if it had never read further
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
    """Return whether what stands before the spans is as a fresh reading would have left it.

    Not if pairs were evicted, if pads make rows begin at several columns, if a policy counts queries, which cannot be
    taken back, or if what is read again is shorter than what policies look back at.
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
    """Return the last ids of each row, as many as went."""
    return torch.stack([row[-removed:] for row in rows]) if min(map(len, rows)) >= removed else None
