"""The surrogate cache with gradients, as plain tensors: read a text, erase spans, answer questions.

It does what :mod:`vestige.cache.overlay` does on a live cache, on full keys and values, fast enough for training.
Attention is eager where gradients flow, because the backward passes of fused kernels are slow on CPUs.
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
    """Return the keys and values of all layers for some ids, without gradients.

    Args:
        model: Without an adapter.
        ids: At least one.
        before: Keys and values of the ids before them.
    """
    cache = _cache(model, before)
    with torch.no_grad():
        model.base_model(input_ids=ids, **cache_argument(cache))
    return _layers(cache)


def steer(
    model: PreTrainedModel, adapter: Adapter, ids: Int[Tensor, "1 seen"], layers: Sequence[Layer], spans: Sequence[Span]
) -> list[Layer]:
    """Return the layers with the spans' pairs replaced by the adapter's. Gradients reach the adapter.

    Args:
        model: Frozen.
        adapter: Active while the spans are run.
        ids: The text.
        layers: From :func:`read`.
        spans: Ascending and disjoint; each span sees the replaced pairs of those before it.
    """
    current = list(layers)
    for span in spans:
        cache = _cache(model, [(keys[:, :, : span.start], values[:, :, : span.start]) for keys, values in current])
        with use_attention(model, "eager"), adapter.applied(model):
            model.base_model(input_ids=ids[:, span.start : span.end], **cache_argument(cache))
        current = [
            (torch.cat([keys, old_keys[:, :, span.end :]], 2), torch.cat([values, old_values[:, :, span.end :]], 2))
            for (keys, values), (old_keys, old_values) in zip(_layers(cache), current, strict=True)
        ]
    return current


def compute_logits(
    model: PreTrainedModel, layers: Sequence[Layer], ids: Int[Tensor, "1 new"], last: int
) -> Float[Tensor, "last vocab"]:
    """Return the logits of the last few ids that follow the layers' tokens, with gradients.

    Args:
        model: Without an adapter.
        layers: Not changed.
        ids: A question, and a reply without its last token.
        last: Number of ids whose logits are returned.
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
    """Return the greedy reply to a question, up to ``limit`` tokens or the first of ``stop``, which it includes."""
    cache, ids = _cache(model, layers), question
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < limit:
            token = int(model(input_ids=ids, **cache_argument(cache), logits_to_keep=1).logits[0, -1].argmax())
            tokens.append(token)
            if token in stop:
                break
            ids = question.new_tensor([[token]])
    return tokens


@contextmanager
def use_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another attention implementation of transformers within the block."""
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
    """Return a cache that holds these tensors and never changes them in place."""
    cache = DynamicCache(config=model.config)
    for i, (keys, values) in enumerate(layers):
        cache.update(keys, values, i)
    return cache
