"""Prefill: reading a text into a cache in chunks, with eviction between them."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vestige.cache.attach import require_cache
from vestige.cache.kv_cache import KVCache
from vestige.errors import InputError
from vestige.models.forward import forward
from vestige.policies.base import NeedsReplay


def prefill(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch new"],
    cache: Cache,
    *,
    chunk: int = 1024,
    length: int | Sequence[int] | None = None,
    settle: bool = True,
    attention_mask: Int[Tensor, "batch new"] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Read ids into a cache, holding at most its limit and one chunk; return the logits of the last token.

    All ids are read. To generate from exactly these ids, read ``ids[:, :-1]`` and pass all of them to ``generate``,
    which feeds the last one.

    Args:
        model: An attached model.
        input_ids: Ids of the tokens that follow those that the cache has seen.
        cache: A :class:`~vestige.KVCache`; changed in place.
        chunk: Tokens per forward.
        length: Full length to come in tokens (text, question, ...), for all batch rows or for each. Fraction budgets
            refer to it from now on; without it they refer to the tokens seen after this prefill.
        settle: Whether to settle between chunks and at the end; False keeps all pairs, for instance of a question.
        attention_mask: 0 for pads, which must be at the left.
        progress: Called with the number of tokens read so far.

    Raises:
        CacheError: The cache is not a KVCache, the model is not attached, or the ids do not fit the cache.
        BudgetError: The budget for the announced length is below the protected pairs; nothing was read.
        InputError: No ids, or more than the model has positions for; nothing was read.
    """
    cache = require_cache(cache)
    _check_input(cache, input_ids, attention_mask, chunk)
    state, total = cache.state, input_ids.shape[1]
    state.announce(length, len(input_ids))
    state.prepared = state.prepared and not settle
    logits = torch.empty(0)
    with state.reading_until(_find_ends(cache, input_ids, attention_mask)), state.schedule.reading_chunks(chunk):
        for start in range(0, total, chunk):
            end = min(start + chunk, total)
            mask = None if attention_mask is None else attention_mask[:, start:end]
            logits = forward(model, input_ids[:, start:end], cache, mask)
            if settle and end < total:
                cache.settle(reading=True)
            if progress is not None:
                progress(end)
        if settle:
            finish(model, cache, input_ids)
    return logits


def finish(model: PreTrainedModel, cache: KVCache, input_ids: Int[Tensor, "batch new"]) -> None:
    """Settle a cache after reading, as the end of :func:`prefill` does.

    Any policy can finish a fork of a reading without evictions, so that one reading serves many policies. A policy that
    needs a replay runs it once: a fork that is prepared only settles.

    Args:
        model: An attached model.
        cache: A cache that has read the ids; changed in place.
        input_ids: The ids read last.
    """
    if isinstance(cache.policy, NeedsReplay) and not cache.state.prepared:
        cache.policy.prepare(model, cache, input_ids)
        cache.state.prepared = True
    cache.settle()
    if isinstance(cache.policy, NeedsReplay):  # a settle without evictions leaves the slots of the replay allocated
        for layer in cache.evictable:
            layer.shrink()
    cache.state.schedule.prefilled = True


def _check_input(cache: KVCache, ids: Tensor, mask: Tensor | None, chunk: int) -> None:
    if ids.ndim != 2 or not ids.numel():
        raise InputError(f"nothing to read: input_ids have shape {tuple(ids.shape)}, expected (batch, new)")
    if chunk < 1:
        raise InputError(f"chunk must be at least 1, got {chunk}")
    if mask is not None and (mask.shape != ids.shape or bool((mask[:, 1:] < mask[:, :-1]).any())):
        raise InputError("attention_mask must have the shape of input_ids, with the pads at the left")
    total, limit = max(cache.seen, default=0) + ids.shape[1], cache.layout.max_positions
    if limit is not None and total > limit:
        raise InputError(f"{total} tokens are more than the model's {limit} positions")


def _find_ends(cache: KVCache, ids: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    """Return the length of each batch row once these ids are read."""
    fed = [ids.shape[1]] * ids.shape[0] if mask is None else mask.sum(1).tolist()
    return tuple(s + n for s, n in zip(cache.seen or (0,) * len(fed), fed, strict=True))
