"""The surrogate cache with gradients: plain tensors, one model for reading, erasing and answering.

What :mod:`vestige.cache.overlay` does on a live cache, done on keys and values that nothing was evicted from, fast
enough to train through. Attention is eager where gradients flow: fused kernels are slow in their backward pass on CPUs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from vestige.models.compat import cache_argument
from vestige.nn.lora import Adapter
from vestige.spans import Span

Layer = tuple[Float[Tensor, "1 kv_heads _seen head_dim"], Float[Tensor, "1 kv_heads _seen value_dim"]]
"""Keys and values of one layer."""


def read(model: PreTrainedModel, ids: Int[Tensor, "1 seen"], before: Sequence[Layer] = ()) -> list[Layer]:
    """Return the keys and values of all layers after reading ids. No gradients.

    Args:
        model: Without an adapter.
        ids: At least one.
        before: What was read before them, if anything.
    """
    cache = _cache(model, before)
    with torch.no_grad():
        model.base_model(input_ids=ids, **cache_argument(cache))
    return _layers(cache)


def steer(
    model: PreTrainedModel, adapter: Adapter, ids: Int[Tensor, "1 seen"], layers: Sequence[Layer], spans: Sequence[Span]
) -> list[Layer]:
    """Return the layers with the spans' pairs replaced by what the adapter writes. Gradients reach the adapter.

    Args:
        model: Frozen.
        adapter: Switched on while the spans are run.
        ids: What was read.
        layers: From :func:`read`.
        spans: Ascending and disjoint; each reads what the ones before it wrote.
    """
    current = list(layers)
    for span in spans:
        cache = _cache(model, [(keys[:, :, : span.start], values[:, :, : span.start]) for keys, values in current])
        with use_attention(model, "eager"), adapter.applied(model):
            model.base_model(input_ids=ids[:, span.start : span.end], **cache_argument(cache))
        current = [
            (
                torch.cat([new[0], old[0][:, :, span.end :]], 2),
                torch.cat([new[1], old[1][:, :, span.end :]], 2),
            )
            for new, old in zip(_layers(cache), current, strict=True)
        ]
    return current


def compute_logits(
    model: PreTrainedModel, layers: Sequence[Layer], ids: Int[Tensor, "1 new"], last: int
) -> Float[Tensor, "last vocab"]:
    """Return the logits of the last of some ids that are fed behind what the layers hold, with gradients.

    Args:
        model: Without an adapter.
        layers: Left as they are.
        ids: A question and all of a reply but its last token.
        last: Logits wanted.
    """
    with use_attention(model, "eager"):
        out = model(input_ids=ids, **cache_argument(_cache(model, layers)), logits_to_keep=last)
    logits: Tensor = out.logits[0]
    return logits.float()


def greedy_reply(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    question: Int[Tensor, "1 question"],
    limit: int,
    stop: Sequence[int],
) -> list[int]:
    """Return the greedy reply to a question, up to a limit or the first of ``stop``, which is part of it."""
    cache, fed = _cache(model, layers), question
    said: list[int] = []
    with torch.no_grad():
        while len(said) < limit:
            token = int(model(input_ids=fed, **cache_argument(cache), logits_to_keep=1).logits[0, -1].argmax())
            said.append(token)
            if token in stop:
                break
            fed = question.new_tensor([[token]])
    return said


@contextmanager
def use_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another attention of transformers for a while."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _layers(cache: DynamicCache) -> list[Layer]:
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _cache(model: PreTrainedModel, layers: Sequence[Layer]) -> DynamicCache:
    """Return a cache that holds these tensors; it concatenates what is fed and changes none of them."""
    cache = DynamicCache(config=model.config)
    for i, (keys, values) in enumerate(layers):
        cache.update(keys, values, i)
    return cache
