"""``vestige.erase``: check spans, let an eraser remove them from a live cache, and report the outcome of every slot."""

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
    """Erase spans from a cache, in place, for every later query.

    The same positions are erased in every batch row. An error leaves the cache unchanged; fork it first to keep a copy.

    Args:
        cache: The cache that has read the spans.
        spans: Spans of positions, in any order; they must not overlap.
        eraser: The method: see ``vestige erasers``.
        model: The model that filled the cache; attached during the call.
        input_ids: All ids fed to the cache, pads included, and any ids still to be fed after them.

    Returns:
        The ids to continue from, the report, and the map to new positions.

    Raises:
        InputError: No span, overlapping spans, a span that not every batch row has seen, the first token, or ids that
            the cache was not fed.
        CacheError: The eraser cannot edit this cache; the message names one that can.
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
    """Return the spans in order, or raise an error if they, the ids, or the cache do not suit the eraser."""
    if not spans:
        raise InputError("no span to erase")
    ordered = tuple(sorted(spans))
    for first, second in pairwise(ordered):
        if second.start < first.end:
            raise InputError(f"the spans [{first.start}, {first.end}) and [{second.start}, {second.end}) overlap")
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
    """Return the number of pairs that a cache holds of a span, over layers and rows."""
    ends = torch.tensor([span.start, span.end], dtype=torch.int32, device=cache.layout.device)
    counts = [
        torch.searchsorted(layer.positions(row), ends).diff() for layer in cache.evictable for row in range(layer.rows)
    ]
    return int(torch.cat(counts).sum())
