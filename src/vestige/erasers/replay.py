"""Replay: reading the ids of a cache again into another cache, without erased spans."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.cache import edits
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill
from vestige.errors import CacheError
from vestige.models.forward import pad_left
from vestige.spans import Span


def collect_fed_rows(cache: KVCache) -> list[Int[Tensor, " _seen"]]:
    """Return the ids of each batch row, without pads.

    Raises:
        CacheError: The model got embeddings instead of ids.
    """
    rows = [row[real] for row, real in zip(cache.ids, cache.real, strict=True)]
    if any(bool((row < 0).any()) for row in rows):
        raise CacheError("the model was fed embeddings, of which the cache has no ids to read again")
    return rows


def reread(
    model: PreTrainedModel,
    cache: KVCache,
    rows: Sequence[Int[Tensor, " _length"]],
    *,
    begin: int = 0,
    length: Sequence[int] | None = None,
    chunk: int = 1024,
) -> None:
    """Read rows into a cache; its erased spans become gaps in the positions.

    Args:
        model: An attached model.
        cache: A cache that has read the tokens before ``begin``.
        rows: All ids of each batch row, from position 0 on.
        begin: First position to read, the same for all rows.
        length: Lengths to announce; with None, fraction budgets refer to the lengths of ``rows``.
        chunk: Tokens per forward.
    """
    end = max(map(len, rows))
    gaps = [Span(max(gap.start, begin), gap.end) for gap in cache.state.erased if begin < gap.end <= end]
    texts = _find_texts(gaps, begin, end)
    with cache.state.reading_until(tuple(map(len, rows))):
        for piece in sorted([*gaps, *texts]):
            cut = [row[piece.start : piece.end].tolist() for row in rows]
            if piece in gaps:
                ids, mask = pad_left(cut, torch.device("cpu"))
                edits.skip(cache, ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool())
                continue
            ids, mask = pad_left(cut, model.device)
            last = piece == texts[-1]
            prefill(model, ids, cache, chunk=chunk, length=length, attention_mask=mask, settle=last)
            if not last:
                cache.settle(reading=True)  # before the gap, which clears the latest queries


def _find_texts(gaps: Sequence[Span], begin: int, end: int) -> list[Span]:
    """Return the spans between gaps, which are ascending and disjoint."""
    starts, stops = [begin, *(gap.end for gap in gaps)], [*(gap.start for gap in gaps), end]
    return [Span(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]
