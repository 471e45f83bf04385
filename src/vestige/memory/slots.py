"""Slots: the evicted pairs of each row, spread over a few slots by a trained projection, each read as one pair."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vestige.kernels.merge import PartialAttention
from vestige.kernels.weighted import attend_weighted
from vestige.memory.base import EvictedPairs, MemoryQuery, State, log_count
from vestige.memory.learned import LearnedMemory
from vestige.memory.storage import decode, encode, update_means
from vestige.nn.latent_memory import Kind

_GONE = 1e-4  # share of a slot below which a release leaves only rounding errors


@dataclass(frozen=True, kw_only=True)
class Slots(LearnedMemory):
    """Spread each pair over slots by ``softmax(W k + c)``; each slot keeps its weight, mean key and mean value.

    A slot enters the softmax as one pair weighted by its mass, as centroids do, but the grouping is trained, with one
    projection for each layer, to preserve the attention output. Nothing is clustered: a pair's shares depend on its key
    alone, the state is a sum, the order of evictions does not matter, and pairs can be removed up to rounding. In
    float16 the error is a few percent once 90 % of a slot is removed: use ``dtype="float32"`` to forget much.

    Our own: IndexMem's latent memory (arXiv 2605.25475) with positive features, merged by log-sum-exp, since a term
    added outside the softmax ignores its denominator; the features also carry the keys. Weights: ``vestige train
    indexmem``.

    Weighs, at head size 64, as much as 16 pairs in bfloat16 (4,172 bytes a row; 32 pairs with ``dtype="float32"``).
    """

    kind: ClassVar[Kind] = "slots"

    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        """Return the state of rows that absorbed nothing."""
        width = self.weights.config.width
        keys, values = (torch.zeros(rows, width, size, device=device) for size in (head_dim, value_dim))
        nothing = self._make_state(log_count(torch.zeros(rows, width, device=device)), keys, values)
        return {**nothing, **self._empty_clock(rows, device)}

    def recall(self, state: State, query: MemoryQuery) -> PartialAttention:
        """Return attention over the slots."""
        pairs = decode(state, "keys"), decode(state, "values"), state["log_mass"]
        return attend_weighted(query.queries, *pairs, query.scale)

    def _update(self, state: State, evicted: EvictedPairs, sign: float) -> State:
        layer = self.weights.at(evicted.layer_idx)
        assert layer.reading is not None, "linear memories have a gate instead"
        factor, offset = layer.reading.unbind()
        before, lives, clock = self._advance(layer, state, evicted, sign)
        shares = layer.project(evicted.keys).softmax(-1) * lives
        mass, added = before[:, None] * (state["log_mass"] - offset).exp(), sign * shares.sum(1)
        total = mass + added
        gone = (total <= _GONE * mass) | (clock["count"] == 0)[:, None]
        keys, values = (
            update_means(decode(state, name), sign * shares.mT @ new, added, total).masked_fill(gone[..., None], 0.0)
            for name, new in (("keys", evicted.keys * factor), ("values", evicted.values))
        )
        return {**self._make_state(log_count(total.masked_fill(gone, 0.0)) + offset, keys, values), **clock}

    def _make_state(self, log_mass: Tensor, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Return slots in the layout that `recall` needs, trained factor and offset included."""
        return {"log_mass": log_mass, **encode("keys", keys, self.dtype), **encode("values", values, self.dtype)}
