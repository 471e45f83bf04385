"""Answer probabilities after a soft eviction: the training signal of gates for evictions at the end of a text.

Our own alternative to attention that fades with age, which the papers use. An eviction after a text changes nothing
before the questions. So the text is read without gradients, and the backward pass runs through the questions only.
"""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from vestige.kernels import AttentionScale, reference
from vestige.models.compat import CACHE_NAME
from vestige.training.retention.soft_attention import (
    BLOCK,
    AttentionOutput,
    Keys,
    Queries,
    Values,
    record_hidden_states,
    use_attention,
)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text that was read in full.

    Args:
        cache: Its pairs.
        states: Hidden states that entered each evictable layer.
    """

    cache: Cache
    states: Mapping[int, Float[Tensor, "1 text hidden"]]


@dataclass(frozen=True, eq=False)
class SoftEviction:
    """Attention in which each pair of a text counts as far as it is kept: ``softmax(q.k + log kept)``.

    Args:
        log_kept: Log of the kept degree of each pair, by evictable layer.
    """

    log_kept: Mapping[int, Float[Tensor, "_kv_heads text"]]

    def attend(
        self, query: Queries, keys: Keys, values: Values, layer_idx: int, scale: AttentionScale
    ) -> AttentionOutput:
        """Attend causally, in blocks of queries that the backward pass recomputes."""
        log_kept = self.log_kept[layer_idx].repeat_interleave(query.shape[1] // keys.shape[1], 0)
        before = keys.shape[2] - query.shape[2]
        blocks = [
            checkpoint(_block, block, keys, values, log_kept, before + i * BLOCK, scale, use_reentrant=False)
            for i, block in enumerate(query.split(BLOCK, 2))
        ]
        return torch.cat(blocks, 2)


def _block(query: Tensor, keys: Tensor, values: Tensor, log_kept: Tensor, start: int, scale: AttentionScale) -> Tensor:
    end = start + query.shape[2]
    text, lowest = log_kept.shape[1], torch.finfo(query.dtype).min
    hidden = ~reference.lower_right(query.shape[2], end, query.device)
    mask = torch.zeros(hidden.shape, device=query.device).masked_fill(hidden, lowest).repeat(len(log_kept), 1, 1)
    mask = torch.cat([mask[..., :text] + log_kept[:, None], mask[..., text:]], -1)
    return reference.written_out(query, keys[:, :, :end], values[:, :, :end], mask, scale)


@torch.no_grad()
def read_text(model: PreTrainedModel, ids: Int[Tensor, "1 text"]) -> Text:
    """Return a text with its pairs and hidden states."""
    with record_hidden_states(model) as states:
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return Text(cache=out[CACHE_NAME], states=states)


def answer_log_probs(
    model: PreTrainedModel,
    text: Text,
    ids: Int[Tensor, "1 following"],
    at: Int[Tensor, " positions"],
    eviction: SoftEviction | None = None,
) -> Float[Tensor, "positions vocab"]:
    """Return log probabilities of the next token at some positions after a text. The text's cache is not changed.

    Args:
        model: Frozen; gradients pass through it.
        text: Read by this model.
        ids: Tokens after the text.
        at: Positions in ``ids``.
        eviction: Soft eviction of the text's pairs; None keeps all.
    """
    inputs: dict[str, Any] = {"input_ids": ids, CACHE_NAME: copy.deepcopy(text.cache), "logits_to_keep": at}
    with nullcontext() if eviction is None else use_attention(model, eviction.attend):
        out = model(**inputs, use_cache=True)
    logits: Tensor = out.logits[0]
    return logits.float().log_softmax(-1)
