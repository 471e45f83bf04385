"""A warm start without a backward pass through the model: gates learn what later tokens look at.

Source: the idea of KVzap and FastKVzip: regress a cheap score on KVzip's (arXiv 2505.23416), the attention of a replay
of the text. Our own: the attention of questions about the text and their answers instead, which is all that reads
pairs after an eviction; and how a score becomes a retention.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import smooth_l1_loss
from transformers import PreTrainedModel

from vestige.budget import Budget
from vestige.cache.attach import attach
from vestige.cache.kv_cache import KVCache
from vestige.cache.prefill import prefill, replay
from vestige.nn.retention_gates import Gates
from vestige.policies import Full
from vestige.policies.kvzip import KVzip
from vestige.policies.observation import RowView, attention_weights
from vestige.training.retention.hidden_states import record_hidden_states
from vestige.training.retention.soft_topk import gate_log_beta, log_kept, log_lifetimes

STEEPNESS = 2.0
"""How fast a life grows with what a pair is worth, both logarithmic: above 1 worth counts for more than youth."""
_LEAST_WORTH, _SHORTEST, _LONGEST = 1e-5, -2.0, 14.0


WarmTarget = tuple[Float[Tensor, "rows text"], dict[int, Float[Tensor, "1 text hidden"]]]
"""What each pair of a text is worth, and what entered each layer when it was read."""


def regression_loss(gates: Gates, looked: WarmTarget, capacity: float, groups: Iterable[int]) -> Float[Tensor, ""]:
    """Return how far the logarithms of lives, ``-log(-log beta)``, are from what pairs are worth.

    Args:
        gates: Get the gradients.
        looked: Of :func:`measure_replay` or :func:`measure_answers`.
        capacity: Share of the pairs of a group that shall outlive the text.
        groups: Rows that compete with each other, as in :func:`~vestige.training.retention.soft_topk.log_kept`.
    """
    worth, entered = looked
    wanted = torch.cat([target_lifetimes(rows, capacity) for rows in worth.split(list(groups))])
    return smooth_l1_loss(log_lifetimes(gate_log_beta(gates, entered)), wanted)


def target_lifetimes(worth: Float[Tensor, "rows tokens"], capacity: float) -> Float[Tensor, "rows tokens"]:
    """Return log lives in the order of worth: the share ``capacity`` lives longer than the text.

    Args:
        worth: Not negative.
        capacity: In (0, 1).
    """
    logs = worth.clamp_min(_LEAST_WORTH).log()
    middle = logs.flatten().kthvalue(max(round((1 - capacity) * logs.numel()), 1)).values
    text = torch.tensor(float(worth.shape[1])).log()
    return (text + STEEPNESS * (logs - middle)).clamp(_SHORTEST, _LONGEST)


def ranking_loss(gates: Gates, looked: WarmTarget, share: float, groups: Iterable[int]) -> Float[Tensor, ""]:
    """Return how much of all worth is lost if a share of the pairs is kept: those that live longest for their age.

    Args:
        gates: Get the gradients.
        looked: Of :func:`measure_replay` or :func:`measure_answers`.
        share: Of the pairs that are kept, in (0, 1).
        groups: Rows that compete with each other, as in :func:`~vestige.training.retention.soft_topk.log_kept`.
    """
    worth, entered = looked
    kept = log_kept(gate_log_beta(gates, entered), share, groups).exp()
    counts = worth.clamp_min(_LEAST_WORTH).sqrt()
    return 1 - (kept * counts).sum() / counts.sum()


@torch.no_grad()
def measure_replay(model: PreTrainedModel, ids: Int[Tensor, "1 text"]) -> WarmTarget:
    """Return the most attention that a replay of a text pays to each pair."""
    cache = KVCache(model, KVzip(budget=Budget.fraction(1.0), sink=0, window=0))
    with attach(model), record_hidden_states(model) as entered:
        prefill(model, ids, cache, chunk=ids.shape[1])
    worth = torch.cat([layer.view("asked")[0] for layer in cache.evictable])
    return worth.float(), {layer_idx: x[:, : ids.shape[1]] for layer_idx, x in entered.items()}


@torch.no_grad()
def measure_answers(model: PreTrainedModel, ids: Int[Tensor, "1 tokens"], text: int) -> WarmTarget:
    """Return the most attention that what stands behind a text, its questions and answers, pays to each pair of it.

    Args:
        model: Frozen.
        ids: The text and what stands behind.
        text: Tokens of the text.
    """
    cache = KVCache(model, Full())
    worth: dict[int, list[Tensor]] = {}

    def watch(glance: RowView) -> None:
        paid = attention_weights(glance.queries, glance.at, glance.keys, glance.positions, glance.attention)
        worth.setdefault(glance.layer_idx, []).append(paid.amax((0, 1))[:text])

    with attach(model), record_hidden_states(model) as entered:
        prefill(model, ids[:, :text], cache, chunk=text)
        replay(model, ids[:, text:], cache, watch)
    return torch.stack([row for layer_idx in sorted(worth) for row in worth[layer_idx]]), entered
