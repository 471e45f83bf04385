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
    """The part of a cache that a forward needs."""

    @property
    def seen(self) -> tuple[int, ...]:
        """Number of tokens of each batch row, without pads."""

    @property
    def real(self) -> Bool[Tensor, "batch padded_seen"]:
        """False where a pad was fed."""

    @property
    def padded(self) -> bool:
        """Whether any batch row was ever fed pads."""


class RollbackCache(FedCache, Protocol):
    """A cache that can undo a forward."""

    def rolled_back(self, watch: Callable[[Any], None] | None = None) -> AbstractContextManager[None]:
        """Undo at the end all forwards inside; ``watch`` is called with each row as the queries attend."""


def forward(
    model: PreTrainedModel, ids: Int[Tensor, "batch new"], cache: FedCache, mask: Int[Tensor, "batch new"] | None = None
) -> Float[Tensor, "batch vocab"]:
    """Feed ids, which follow the tokens of the cache, to an attached model and return the logits after the last one.

    The cache is changed in place; it settles when due, as under ``generate``. ``mask`` is 0 for pads, which must be at
    the left.
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
    """Return the mask and the positions for a forward of padded batch rows; nothing if no row is padded.

    The ids follow the tokens of the cache; ``mask`` is 0 for pads among them.
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
    """Feed ids to a cache, call ``watch`` with every row that they attend to, and undo the forward.

    Only the values that ``watch`` wrote into side arrays of older pairs stay. It is called with each row of each layer
    of the attached model, but not for batch rows that have only pads. ``mask`` is 0 for pads, which must be left.
    """
    with torch.no_grad(), cache.rolled_back(watch):
        forward(model, ids, cache, mask)
