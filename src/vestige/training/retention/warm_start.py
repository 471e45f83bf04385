"""A warm start of gates by the attention of later tokens, without a backward pass through the model.

Source: the idea of KVzap and FastKVzip: regress a cheap score on KVzip's (arXiv 2505.23416), the attention that a
replay of the text pays. Our own: the attention of questions about the text and their answers, since only these read
pairs after an eviction; and the map from importance to lifetime.
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
from vestige.cache.prefill import prefill
from vestige.models.forward import replay
from vestige.nn.retention_gates import Gates
from vestige.policies import Full
from vestige.policies.kvzip import KVzip
from vestige.policies.observation import RowView
from vestige.policies.scoring import compute_attention
from vestige.training.retention.soft_attention import record_hidden_states
from vestige.training.retention.soft_topk import gate_log_beta, log_kept, log_lifetimes

STEEPNESS = 2.0
"""Slope of log lifetime over log importance; above 1 importance outweighs youth."""
_MIN_IMPORTANCE, _SHORTEST, _LONGEST = 1e-5, -2.0, 14.0


WarmTarget = tuple[Float[Tensor, "rows text"], dict[int, Float[Tensor, "1 text hidden"]]]
"""Importance of each pair of a text, and the hidden states that entered each layer."""


def regression_loss(gates: Gates, target: WarmTarget, capacity: float, groups: Iterable[int]) -> Float[Tensor, ""]:
    """Return the smooth L1 distance of the gates' log lifetimes, ``-log(-log beta)``, from those of the importance.

    Args:
        gates: Receive the gradients.
        target: From :func:`measure_replay` or :func:`measure_answers`.
        capacity: Share of a group's pairs that shall outlive the text.
        groups: Number of rows in each group that competes.
    """
    importance, states = target
    wanted = torch.cat([target_lifetimes(rows, capacity) for rows in importance.split(list(groups))])
    return smooth_l1_loss(log_lifetimes(gate_log_beta(gates, states)), wanted)


def target_lifetimes(importance: Float[Tensor, "rows tokens"], capacity: float) -> Float[Tensor, "rows tokens"]:
    """Return log lifetimes in the order of importance; the share ``capacity`` exceeds the length of the text.

    Args:
        importance: Not negative.
        capacity: In (0, 1).
    """
    logs = importance.clamp_min(_MIN_IMPORTANCE).log()
    middle = logs.flatten().kthvalue(max(round((1 - capacity) * logs.numel()), 1)).values
    text = torch.tensor(float(importance.shape[1])).log()
    return (text + STEEPNESS * (logs - middle)).clamp(_SHORTEST, _LONGEST)


def ranking_loss(gates: Gates, target: WarmTarget, share: float, groups: Iterable[int]) -> Float[Tensor, ""]:
    """Return the share of importance lost if the gates keep a share of the pairs: those with most lifetime left.

    Args:
        gates: Receive the gradients.
        target: From :func:`measure_replay` or :func:`measure_answers`.
        share: Share of the pairs that are kept, in (0, 1).
        groups: Number of rows in each group that competes.
    """
    importance, states = target
    kept = log_kept(gate_log_beta(gates, states), share, groups).exp()
    weights = importance.clamp_min(_MIN_IMPORTANCE).sqrt()
    return 1 - (kept * weights).sum() / weights.sum()


@torch.no_grad()
def measure_replay(model: PreTrainedModel, ids: Int[Tensor, "1 text"]) -> WarmTarget:
    """Return the largest attention that a replay of a text pays to each pair."""
    cache = KVCache(model, KVzip(budget=Budget.fraction(1.0), sink=0, window=0))
    with attach(model), record_hidden_states(model) as states:
        prefill(model, ids, cache, chunk=ids.shape[1])
    importance = torch.cat([layer.view("asked")[0] for layer in cache.evictable])
    return importance.float(), {layer_idx: x[:, : ids.shape[1]] for layer_idx, x in states.items()}


@torch.no_grad()
def measure_answers(model: PreTrainedModel, ids: Int[Tensor, "1 tokens"], text: int) -> WarmTarget:
    """Return the largest attention that the questions and answers after a text pay to each of its pairs.

    Args:
        model: Frozen.
        ids: The text, questions and answers.
        text: Number of tokens of the text.
    """
    cache = KVCache(model, Full())
    importance: dict[int, list[Tensor]] = {}

    def watch(glance: RowView) -> None:
        paid = compute_attention(
            glance.queries, glance.query_positions, glance.keys, glance.positions, glance.attention
        )
        importance.setdefault(glance.layer_idx, []).append(paid.amax((0, 1))[:text])

    with attach(model), record_hidden_states(model) as states:
        prefill(model, ids[:, :text], cache, chunk=text)
        replay(model, ids[:, text:], cache, watch)
    return torch.stack([row for layer_idx in sorted(importance) for row in importance[layer_idx]]), states
