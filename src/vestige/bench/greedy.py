"""The greedy loop over any transformers cache: read, then reply; plain forwards, batch size 1, timed."""

import time
from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache


@torch.no_grad()
def read(model: PreTrainedModel, cache: Cache, ids: Int[Tensor, "1 new"]) -> Float[Tensor, "1 vocab"]:
    """Feed ids in one forward and return the logits after the last one. The cache is changed."""
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1]


def reply(
    model: PreTrainedModel,
    cache: Cache,
    question: Int[Tensor, "1 question"],
    *,
    max_new_tokens: int,
    stop: Collection[int],
) -> tuple[tuple[int, ...], float]:
    """Feed a question and return the greedy reply, and the seconds of its decode steps.

    Every token of the reply but the last is in the cache afterwards; so there are ``len(reply) - 1`` decode steps.

    Args:
        model: Any causal model; attached, if the cache is a :class:`~vestige.KVCache`.
        cache: Holds what was read so far; changed.
        question: At least one id; the logits after its last one give the first token. Its forward is not timed.
        max_new_tokens: At least 1.
        stop: Ids that end the reply; the one that did is part of it.
    """
    token = read(model, cache, question).argmax(-1, keepdim=True)
    ids, started = [int(token)], now(model.device)
    while len(ids) < max_new_tokens and ids[-1] not in stop:
        token = read(model, cache, token).argmax(-1, keepdim=True)
        ids.append(int(token))
    return tuple(ids), now(model.device) - started


def now(device: torch.device) -> float:
    """Return a clock in seconds that waits for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
