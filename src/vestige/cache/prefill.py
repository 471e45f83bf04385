"""Reading a text into a cache in chunks, with eviction between them."""

import inspect
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vestige.cache.attach import require_cache
from vestige.cache.kv_cache import KVCache
from vestige.errors import InputError
from vestige.models.compat import cache_argument
from vestige.policies.base import NeedsReplay
from vestige.policies.observation import RowView


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
    """Read ids into a cache, never holding more than its limit and one chunk; return the logits after the last one.

    Everything given is read. To generate from exactly these ids, pass ``ids[:, :-1]`` and give ``generate`` all of
    them: it feeds the last one.

    Args:
        model: An attached model.
        input_ids: What follows the tokens that the cache has seen.
        cache: A :class:`~vestige.KVCache`; changed in place.
        chunk: Tokens per forward.
        length: The full length to come (text, question, ...), of all batch rows or of each: what a fraction budget is a
            fraction of, from now on. Without it a fraction is one of the tokens seen once these ids are read.
        settle: Whether to settle between chunks and at the end; False reads a question, which stays whole.
        attention_mask: 0 for pads, which must be at the left.
        progress: Called with the number of tokens read so far.

    Raises:
        CacheError: The cache is not a KVCache, the model is not attached, or the ids do not fit the cache.
        BudgetError: The budget for the announced length is below the protected pairs; nothing was read.
        InputError: No ids, or more than the model has positions for; nothing was read.
    """
    cache = require_cache(cache)
    _check_input(cache, input_ids, attention_mask, chunk)
    announce(cache, length, len(input_ids))
    schedule, total = cache.schedule, input_ids.shape[1]
    cache.prepared = cache.prepared and not settle
    outer, cache.reading_to = cache.reading_to, cache.reading_to or _ends(cache, input_ids, attention_mask)
    within = schedule.reading
    schedule.reading, schedule.chunk = True, chunk
    logits = torch.empty(0)
    try:
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
    finally:
        schedule.reading, cache.reading_to = within, outer
    return logits


def finish(model: PreTrainedModel, cache: KVCache, input_ids: Int[Tensor, "batch new"]) -> None:
    """Settle what was read, as the end of :func:`prefill` does: a fork of an unevicted reading can be finished by any
    policy, so that one reading serves many. A policy that prepares does so once: a fork that is prepared only settles.

    Args:
        model: An attached model.
        cache: Holds the ids; changed in place.
        input_ids: What was read last.
    """
    if isinstance(cache.policy, NeedsReplay) and not cache.prepared:
        cache.policy.prepare(model, cache, input_ids)
        cache.prepared = True
    cache.settle()
    if isinstance(cache.policy, NeedsReplay):  # a cache that had nothing to evict still has room for what was replayed
        for layer in cache.evictable:
            layer.shrink()
    cache.schedule.prefilled = True


def replay(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch new"],
    cache: KVCache,
    watch: Callable[[RowView], None],
    mask: Int[Tensor, "batch new"] | None = None,
) -> None:
    """Feed ids after what the cache holds, show every row that they attend to, and take them back.

    What ``watch`` wrote into side arrays of older pairs stays, nothing else does: for policies that prepare.

    Args:
        model: An attached model.
        ids: What each batch row attends with; rows may differ.
        cache: Holds what the ids attend to.
        watch: Shown each row of each layer, but for batch rows that have only pads.
        mask: 0 for pads, which must be at the left.
    """
    with torch.no_grad(), cache.rolled_back(watch):
        forward(model, ids, cache, mask)


def announce(cache: KVCache, length: int | Sequence[int] | None, batch: int) -> None:
    """Say how long each batch row will be in the end: what a fraction budget is a fraction of, from now on.

    Args:
        cache: Changed in place.
        length: Tokens, of all batch rows or of each; None leaves what was announced before.
        batch: Batch rows.

    Raises:
        BudgetError: The budget for one of these lengths is below the protected pairs.
        InputError: Not as many lengths as batch rows.
    """
    lengths = None if length is None else (length,) * batch if isinstance(length, int) else tuple(length)
    if lengths is not None and len(lengths) != batch:
        raise InputError(f"{len(lengths)} lengths were announced for {batch} batch rows")
    if cache.policy.budget is not None:
        cache.policy.budget.check(cache.policy.protected, length=None if lengths is None else min(lengths))
    cache.lengths = lengths or cache.lengths


def pad_left(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch longest"], Int[Tensor, "batch longest"] | None]:
    """Return ids as one tensor with zeros at the left, and its mask, or None if no row needs pads."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == width for row in rows):
        return ids, None
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)


def _check_input(cache: KVCache, ids: Tensor, mask: Tensor | None, chunk: int) -> None:
    if ids.ndim != 2 or not ids.numel():
        raise InputError(f"nothing to read: input_ids have shape {tuple(ids.shape)}, expected (batch, new)")
    if chunk < 1:
        raise InputError(f"chunk must be at least 1, got {chunk}")
    if mask is not None and (mask.shape != ids.shape or bool((mask[:, 1:] < mask[:, :-1]).any())):
        raise InputError("attention_mask must have the shape of input_ids, with the pads at the left")
    total, limit = max(cache.seen, default=0) + ids.shape[1], cache.anatomy.max_positions
    if limit is not None and total > limit:
        raise InputError(f"{total} tokens are more than the model's {limit} positions")


def _ends(cache: KVCache, ids: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    fed = [ids.shape[1]] * ids.shape[0] if mask is None else mask.sum(1).tolist()
    return tuple(s + n for s, n in zip(cache.seen or (0,) * len(fed), fed, strict=True))


def forward(
    model: PreTrainedModel, ids: Int[Tensor, "batch new"], cache: KVCache, mask: Int[Tensor, "batch new"] | None = None
) -> Float[Tensor, "batch vocab"]:
    """Feed ids and return the logits after the last one, with the positions and the mask that padded rows need.

    Args:
        model: An attached model.
        ids: What follows the tokens that the cache has seen.
        cache: Changed in place; settles when one is due, as under ``generate``.
        mask: 0 for pads, which must be at the left.
    """
    inputs: dict[str, Tensor | int] = {**padding(ids, cache, mask)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    out = model(input_ids=ids, **cache_argument(cache), use_cache=True, **inputs)
    logits: Tensor = out.logits
    return logits[:, -1]


def padding(
    ids: Int[Tensor, "batch new"], cache: KVCache, mask: Int[Tensor, "batch new"] | None = None
) -> dict[str, Tensor]:
    """Return the positions and the mask that a forward needs where batch rows are padded; else nothing.

    Args:
        ids: What follows the tokens that the cache has seen.
        cache: Will be fed.
        mask: 0 for pads among the ids.
    """
    if mask is None and not cache.padded:
        return {}
    new = torch.ones_like(ids) if mask is None else mask
    before = cache.real.to(new) if cache.seen else new[:, :0]
    seen = torch.tensor(cache.seen or (0,) * len(ids), device=ids.device)[:, None]
    return {
        "attention_mask": torch.cat([before, new], 1),  # as long as the sequence: seen counts as real
        "position_ids": (seen + new.cumsum(1) - 1).clamp_min(0),
    }
