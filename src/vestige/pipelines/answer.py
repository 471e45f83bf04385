"""Answer a question from a cache, greedily, by the model's own ``generate``."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill
from vestige.errors import InputError
from vestige.models.compat import cache_argument


@dataclass(frozen=True)
class Answer:
    """A greedy reply and its cost."""

    text: str
    ids: tuple[int, ...]
    """Generated tokens, the end token included."""
    decode_s: float
    """Seconds of decoding, without reading the question."""

    @property
    def tokens(self) -> int:
        """Generated tokens, the end token included."""
        return len(self.ids)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: KVCache,
    question: Int[Tensor, "1 question"],
    *,
    max_new_tokens: int = 64,
) -> Answer:
    """Read a question into a cache (it stays whole) and reply greedily. The cache is changed: fork it to ask again.

    Args:
        model: An attached model.
        tokenizer: Tokenizer of the model.
        cache: Holds the context.
        question: Ids that follow the context.
        max_new_tokens: Longest reply in tokens; it ends earlier where the model's positions end.

    Raises:
        InputError: Context and question leave no position for a reply, or there is no question.
    """
    longest = limit_reply(cache, max(cache.seen) + question.shape[1], max_new_tokens)
    if question.shape[1] > 1:
        prefill(model, question[:, :-1].to(model.device), cache, chunk=cache.state.schedule.chunk, settle=False)
    started = time.perf_counter()
    new = generate(model, tokenizer, cache, question[:, -1:], max_new_tokens=longest)
    text = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
    return Answer(text, tuple(new), time.perf_counter() - started)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: KVCache,
    new: Int[Tensor, "1 new"],
    /,
    **options: Any,
) -> list[int]:
    """Generate from a cache, greedily unless the options say otherwise, and return the ids of the reply.

    Args:
        model: An attached model.
        tokenizer: Tokenizer of the model.
        cache: Holds all ids before ``new``.
        new: Ids between those of the cache and the reply.
        options: For ``model.generate``.
    """
    ids = torch.cat([cache.ids, new], 1).to(model.device)
    generator: Any = model
    out = generator.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_argument(cache),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **({"do_sample": False} | options),
    )
    reply: list[int] = out[0, ids.shape[1] :].tolist()
    return reply


def limit_reply(cache: KVCache, length: int, max_new_tokens: int) -> int:
    """Return the longest reply that the model's positions allow after ``length`` tokens, or raise an InputError."""
    limit = cache.layout.max_positions
    require_room_for_reply(limit, length)
    return max_new_tokens if limit is None else min(max_new_tokens, limit - length)


def require_room_for_reply(limit: int | None, length: int) -> None:
    """Raise an InputError if context and question leave no position for a reply."""
    if limit is not None and length >= limit:
        raise InputError(f"context and question are {length} tokens; the model has {limit} positions, a reply included")
