"""Slots: the evicted pairs of each row spread over a few slots by a trained projection; a slot is read as a pair."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.kernels.merge import PartialAttention
from vestige.kernels.weighted import attend_weighted
from vestige.memory.base import EvictedPairs, MemoryQuery, State, log_count
from vestige.memory.learned import LearnedMemory
from vestige.memory.storage import restored, stored
from vestige.nn.latent_memory import Kind

_GONE = 1e-4  # of a slot: what is left when all of it was released is rounding


@dataclass(frozen=True, kw_only=True)
class Slots(LearnedMemory):
    """Spread each pair over slots by ``softmax(W k + c)``; each slot keeps its weight, mean key and mean value.

    A slot takes part in the softmax as one pair that weighs as much as it holds, as centroids do; but which pairs go
    together is trained, one projection for each layer, so that attention comes out as it was. Nothing is clustered: a
    pair's shares follow from its key alone, the state is a sum, the order of evictions does not matter, and pairs can
    be taken out again: up to rounding, which in float16 is a few percent once nine tenths of a slot are out, so take
    ``dtype="float32"`` to forget much.

    Our own: IndexMem's latent memory (arXiv 2605.25475) with positive features and merged by log-sum-exp, since what is
    added outside the softmax ignores its denominator; the features also carry the keys. Weights: ``vestige train
    indexmem``.

    Weighs, at head size 64, as much as 16 pairs in bfloat16 (4,172 bytes a row; 32 pairs with ``dtype="float32"``).
    """

    kind: ClassVar[Kind] = "slots"

    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        """Return the state of rows that absorbed nothing."""
        width = self.weights.config.width
        keys, values = (torch.zeros(rows, width, size, device=device) for size in (head_dim, value_dim))
        nothing = self._state(log_count(torch.zeros(rows, width, device=device)), keys, values)
        return {**nothing, **self._clock(rows, device)}

    def recall(self, state: State, asked: MemoryQuery) -> PartialAttention:
        """Return attention over the slots."""
        pairs = restored(state, "keys"), restored(state, "values"), state["log_mass"]
        return attend_weighted(asked.queries, *pairs, asked.scale)

    def _changed(self, state: State, evicted: EvictedPairs, sign: float) -> State:
        layer = self.weights.at(evicted.layer_idx)
        assert layer.reading is not None, "linear memories have a gate instead"
        factor, offset = layer.reading.unbind()
        before, lives, clock = self._advanced(layer, state, evicted, sign)
        shares = layer.project(evicted.keys).softmax(-1) * lives
        mass, added = before[:, None] * (state["log_mass"] - offset).exp(), sign * shares.sum(1)
        total = mass + added
        gone = (total <= _GONE * mass) | (clock["count"] == 0)[:, None]
        keys, values = (
            _moved(restored(state, name), sign * shares.mT @ new, added, total).masked_fill(gone[..., None], 0.0)
            for name, new in (("keys", evicted.keys * factor), ("values", evicted.values))
        )
        return {**self._state(log_count(total.masked_fill(gone, 0.0)) + offset, keys, values), **clock}

    def _state(self, log_mass: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Return slots as they are read, trained factor and offset included, since that happens at every token."""
        return {"log_mass": log_mass, **stored("keys", keys, self.dtype), **stored("values", values, self.dtype)}


def _moved(
    means: Float[Tensor, "rows width dim"],
    sums: Float[Tensor, "rows width dim"],
    added: Float[Tensor, "rows width"],
    total: Float[Tensor, "rows width"],
) -> Float[Tensor, "rows width dim"]:
    """Return means after so much more, or less, came in; where nothing did they stay bit for bit."""
    tiny = torch.finfo(total.dtype).tiny
    return means + (sums - added[..., None] * means) / total.clamp_min(tiny)[..., None]
