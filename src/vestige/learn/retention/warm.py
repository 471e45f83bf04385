"""A warm start without a backward pass through the model: gates learn what a pair is worth when the text is replayed.

Source: the idea of KVzap and FastKVzip: regress a cheap score on KVzip's (arXiv 2505.23416). How a score becomes a
retention is our own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from transformers import PreTrainedModel

from vestige.attachment import attach
from vestige.budget import Budget
from vestige.cache import KVCache
from vestige.gates import Gates
from vestige.models import check
from vestige.policies.kvzip import KVzip
from vestige.reading import prefill

STEEPNESS = 2.0
"""How fast a life grows with what a pair is worth, both logarithmic: above 1 worth counts for more than youth."""
_LEAST_WORTH, _SHORTEST, _LONGEST = 1e-5, -2.0, 14.0


def regression(
    model: PreTrainedModel, gates: Gates, ids: Int[Tensor, "1 tokens"], capacity: float
) -> Float[Tensor, ""]:
    """Return how far the logarithms of lives, ``-log(-log beta)``, are from what a replay of the text says.

    Args:
        model: Frozen.
        gates: Get the gradients.
        ids: A text.
        capacity: Share of all pairs that shall outlive the text.
    """
    worth, entered = replayed(model, ids)
    wanted = lives(worth, capacity)
    said = torch.cat([gates(layer_idx, hidden)[0] for layer_idx, hidden in sorted(entered.items())])
    return smooth_l1_loss(-torch.log(-said.clamp_max(-1e-9)), wanted)


def lives(worth: Float[Tensor, "rows tokens"], capacity: float) -> Float[Tensor, "rows tokens"]:
    """Return log lives in the order of worth: the share ``capacity`` lives longer than the text.

    Args:
        worth: Not negative.
        capacity: In (0, 1).
    """
    logs = worth.clamp_min(_LEAST_WORTH).log()
    middle = logs.flatten().kthvalue(max(round((1 - capacity) * logs.numel()), 1)).values
    text = torch.tensor(float(worth.shape[1])).log()
    return (text + STEEPNESS * (logs - middle)).clamp(_SHORTEST, _LONGEST)


@torch.no_grad()
def replayed(
    model: PreTrainedModel, ids: Int[Tensor, "1 tokens"]
) -> tuple[Float[Tensor, "rows tokens"], dict[int, Float[Tensor, "1 tokens hidden"]]]:
    """Return the most attention that a replay of a text pays to each pair, and what entered each layer at first."""
    cache = KVCache(model, KVzip(budget=Budget.fraction(1.0), sink=0, window=0))
    with attach(model), _entering(model) as entered:
        prefill(model, ids, cache, chunk=ids.shape[1])
    worth = torch.cat([layer.view("asked")[0] for layer in cache.evictable])
    return worth.float(), {layer_idx: x[:, : ids.shape[1]] for layer_idx, x in entered.items()}


@contextmanager
def _entering(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Note what enters the evictable layers in the first forward."""
    entered: dict[int, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer_idx: Any = module.layer_idx
        entered.setdefault(layer_idx, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in check(model).attentions.values()]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()
