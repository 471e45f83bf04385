"""Reading ids that a cache was fed once more, into another cache, without what was erased."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige import editing
from vestige.cache import KVCache
from vestige.errors import CacheError
from vestige.reading import pad_left, prefill
from vestige.spans import Span


def fed_rows(cache: KVCache) -> list[Int[Tensor, " _seen"]]:
    """Return the ids of each batch row, pads left out.

    Raises:
        CacheError: The model was fed embeddings.
    """
    rows = [row[real] for row, real in zip(cache.ids, cache.real, strict=True)]
    if any(bool((row < 0).any()) for row in rows):
        raise CacheError("the model was fed embeddings, of which the cache has no ids to read again")
    return rows


def reread(
    model: PreTrainedModel,
    twin: KVCache,
    rows: Sequence[Int[Tensor, " _length"]],
    *,
    begin: int = 0,
    length: Sequence[int] | None = None,
    chunk: int = 1024,
) -> None:
    """Read rows into a cache; what it has marked as erased becomes a gap in the positions.

    Args:
        model: An attached model.
        twin: Has read what comes before ``begin``.
        rows: The ids of each batch row, from the first on.
        begin: Where to begin, the same for all.
        length: What to announce; None announces the rows' lengths for the time of reading.
        chunk: Tokens per forward.
    """
    end = max(map(len, rows))
    gaps = [Span(max(gap.start, begin), gap.end) for gap in twin.erased if begin < gap.end <= end]
    at = begin
    for gap in [*gaps, None]:
        stop = end if gap is None else gap.start
        if stop > at:
            ids, mask = pad_left([row[at:stop].tolist() for row in rows], model.device)
            announced = tuple(map(len, rows)) if length is None else tuple(length)
            prefill(model, ids, twin, chunk=chunk, length=announced, attention_mask=mask, settle=stop == end)
        if gap is not None:
            pieces = [row[gap.start : gap.end].tolist() for row in rows]
            ids, mask = pad_left(pieces, torch.device("cpu"))
            editing.skip(twin, ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool())
            twin.settle(reading=True)
            at = gap.end
    if length is None:
        twin.lengths = None
