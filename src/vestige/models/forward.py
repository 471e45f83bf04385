"""One forward of a model over token ids, with the positions and the mask that padded batch rows need."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.models.compat import cache_argument


@runtime_checkable
class FedCache(Protocol):
    """What a forward asks of a cache."""

    @property
    def seen(self) -> tuple[int, ...]:
        """Tokens of each batch row, pads left out."""

    @property
    def real(self) -> Bool[Tensor, "batch padded_seen"]:
        """False where a pad was fed."""

    @property
    def padded(self) -> bool:
        """Whether any batch row was ever fed pads."""


class RollbackCache(FedCache, Protocol):
    """A cache that can take back what it was fed."""

    def rolled_back(self, watch: Callable[[Any], None] | None = None) -> AbstractContextManager[None]:
        """Take back at the end whatever is fed inside; ``watch`` is called with each row as the queries attend."""


def forward(
    model: PreTrainedModel, ids: Int[Tensor, "batch new"], cache: FedCache, mask: Int[Tensor, "batch new"] | None = None
) -> Float[Tensor, "batch vocab"]:
    """Feed ids and return the logits after the last one.

    Args:
        model: An attached model.
        ids: What follows the tokens that the cache has seen.
        cache: Changed in place; settles when one is due, as under ``generate``.
        mask: 0 for pads, which must be at the left.
    """
    inputs: dict[str, Tensor | int] = {**padding_inputs(ids, cache, mask)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    given: Any = cache
    out = model(input_ids=ids, **cache_argument(given), use_cache=True, **inputs)
    logits: Tensor = out.logits
    return logits[:, -1]


def padding_inputs(
    ids: Int[Tensor, "batch new"], cache: FedCache, mask: Int[Tensor, "batch new"] | None = None
) -> dict[str, Tensor]:
    """Return the mask and the positions that a forward needs where batch rows are padded; else nothing.

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


def pad_left(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch longest"], Int[Tensor, "batch longest"] | None]:
    """Return ids as one tensor with zeros at the left, and its mask, or None if no row needs pads."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    if all(len(row) == width for row in rows):
        return ids, None
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)


def replay(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch new"],
    cache: RollbackCache,
    watch: Callable[[Any], None],
    mask: Int[Tensor, "batch new"] | None = None,
) -> None:
    """Feed ids after what the cache holds, let ``watch`` look at every row that they attend to, and take them back.

    What ``watch`` wrote into side arrays of older pairs stays, nothing else does.

    Args:
        model: An attached model.
        ids: What each batch row attends with; rows may differ.
        cache: Holds what the ids attend to.
        watch: Called with each row of each layer, but not for batch rows that have only pads.
        mask: 0 for pads, which must be at the left.
    """
    with torch.no_grad(), cache.rolled_back(watch):
        forward(model, ids, cache, mask)
