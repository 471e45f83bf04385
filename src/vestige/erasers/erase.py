"""``vestige.erase``: take spans out of a live cache by an eraser, and say what became of every slot."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.cache.attach import attach, require_cache
from vestige.cache.kv_cache import KVCache
from vestige.erasers import name_of
from vestige.erasers.base import Erased, Eraser, EraseReport, EraseRequest, SlotOutcome, SpanReport
from vestige.errors import CacheError, InputError
from vestige.spans import PositionMap, Span
from vestige.utils.timing import synchronized_time


def erase(
    cache: KVCache,
    spans: Span | Sequence[Span],
    eraser: Eraser,
    *,
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch length"],
) -> Erased:
    """Take spans out of a cache, in place, for every query that comes.

    The same positions go in every batch row. On any error the cache is as it was; fork it first to keep the old one.

    Args:
        cache: What the model has read.
        spans: Positions, in any order; they must not overlap.
        eraser: How: see ``vestige erasers``.
        model: Whose cache it is; attached for the time of the call.
        input_ids: What was fed, pads included, and what is still to be fed behind it.

    Returns:
        The ids to go on from, the report, and where later spans went.

    Raises:
        InputError: No span, overlapping ones, one that not every batch row has seen, the first token, or other ids.
        CacheError: This eraser cannot serve this cache; the message names one that can.
    """
    cache = require_cache(cache)
    ordered = _order_spans(cache, (spans,) if isinstance(spans, Span) else tuple(spans), eraser, input_ids)
    before = [_count_pairs(cache, span) for span in ordered]
    suffix = max(cache.seen) - ordered[0].end - sum(map(len, ordered[1:]))
    pending = input_ids[:, cache.ids.shape[1] :]
    with attach(model), torch.no_grad():
        started = synchronized_time(model.device)
        edit = eraser.edit(EraseRequest(model=model, cache=cache, spans=ordered))
        seconds = synchronized_time(model.device) - started
    if not eraser.renumbers and eraser.fate is not SlotOutcome.LEFT:
        cache.state.mark_erased(ordered)
    report = EraseReport(
        method=name_of(eraser),
        exact=eraser.replays and not cache.state.erased,
        spans=tuple(
            SpanReport(span=span, **{eraser.fate.value: pairs}) for span, pairs in zip(ordered, before, strict=True)
        ),
        suffix_left=suffix - edit.suffix_recomputed,
        tokens_recomputed=edit.recomputed,
        memory=edit.memory,
        edit_s=seconds,
    )
    ids = torch.cat([cache.ids.to(input_ids.device), pending], 1)
    return Erased(input_ids=ids, report=report, remap=PositionMap(ordered if eraser.renumbers else ()))


def _order_spans(cache: KVCache, spans: tuple[Span, ...], eraser: Eraser, input_ids: Tensor) -> tuple[Span, ...]:
    """Return the spans in order, or raise what is wrong with them, the ids, or the cache for this eraser."""
    if not spans:
        raise InputError("no span to erase")
    ordered = tuple(sorted(spans))
    for one, other in pairwise(ordered):
        if other.start < one.end:
            raise InputError(f"the spans [{one.start}, {one.end}) and [{other.start}, {other.end}) overlap")
    shortest = min(cache.seen, default=0)
    if ordered[-1].end > shortest:
        raise InputError(
            f"the span [{ordered[-1].start}, {ordered[-1].end}) is not in the cache, which has seen {shortest} tokens "
            f"{'of its shortest batch row' if len(cache.seen) > 1 else ''}".rstrip()
        )
    fed = cache.ids
    if input_ids.shape[0] != fed.shape[0] or not torch.equal(input_ids[:, : fed.shape[1]].cpu(), fed):
        raise InputError(
            f"input_ids {tuple(input_ids.shape)} do not begin with the {fed.shape[1]} ids that the cache was fed; "
            "after an erase go on from Erased.input_ids"
        )
    if eraser.replays:
        return ordered
    name = name_of(eraser)
    if ordered[0].start == 0 and eraser.fate is not SlotOutcome.LEFT:
        raise InputError(f"{name} cannot erase the first token: all later ones lean on it; use recompute")
    if len(cache.evictable) != len(cache.layers):
        raise CacheError(f"{name} cannot edit sliding or linear layers; use recompute, which reads the ids anew")
    return ordered


def _count_pairs(cache: KVCache, span: Span) -> int:
    """Return the pairs that a cache holds of a span, over layers and rows."""
    ends = torch.tensor([span.start, span.end], dtype=torch.int32, device=cache.layout.device)
    counts = [
        torch.searchsorted(layer.positions(row), ends).diff() for layer in cache.evictable for row in range(layer.rows)
    ]
    return int(torch.cat(counts).sum())
