"""IndexMem's latent memory: for each row a sum of outer products of projected keys and values."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vestige.kernels.merge import AdditiveOutput
from vestige.memory.base import EvictedPairs, MemoryQuery, State
from vestige.memory.learned import LearnedMemory
from vestige.memory.storage import decode, encode
from vestige.nn.latent_memory import Kind

_LEAST = 1e-6  # added to the divisor


@dataclass(frozen=True, kw_only=True)
class Linear(LearnedMemory):
    """Remember the evicted as ``M = sum phi(k) v^T`` and ``b = sum phi(k)^2``; read ``phi(q)^T M / (phi(q)^2)^T b``.

    ``phi`` is a trained linear projection, one for each layer. The result, times a trained gate between 0 and 1, is
    added to the attention over the kept pairs; it takes no part in the softmax, so a gate of 0 changes nothing.

    Source: IndexMem, arXiv 2605.25475, after its authors' code: one projection for keys and queries, after RoPE, one
    scalar gate and one decay for each layer. The rate of writing, which cancels in the result, is left out. Ours: the
    decay is optional and counts tokens between pairs, not writes, so the time of an eviction does not matter; a gate
    may depend on the query. Weights: ``vestige train indexmem``.

    Weighs, at head size 64 and width 32, as much as 16 pairs in bfloat16 (4,232 bytes a row; 32 pairs with
    ``dtype="float32"``).
    """

    kind: ClassVar[Kind] = "linear"

    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        """Return the state of rows that absorbed nothing."""
        width = self.weights.config.width
        matrix = encode("matrix", torch.zeros(rows, width, value_dim, device=device), self.dtype)
        return {**matrix, "mass": torch.zeros(rows, width, device=device), **self._empty_clock(rows, device)}

    def recall(self, state: State, query: MemoryQuery) -> AdditiveOutput:
        """Return the output to add to attention."""
        layer = self.weights.at(query.layer_idx)
        projected = layer.project(query.queries)
        weighed = torch.bmm(projected.square(), state["mass"][..., None])
        found = torch.bmm(projected, decode(state, "matrix"))
        return AdditiveOutput(found * (layer.gate_value(query.queries) / (weighed + _LEAST)))

    def _update(self, state: State, evicted: EvictedPairs, sign: float) -> State:
        layer = self.weights.at(evicted.layer_idx)
        before, lives, clock = self._advance(layer, state, evicted, sign)
        projected = layer.project(evicted.keys)
        weighed = sign * projected * lives
        left = (clock["count"] > 0)[:, None]  # a row without pairs gets exact zeros, not rounding errors
        mass = left * (before[:, None] * state["mass"] + (weighed * projected).sum(1)).clamp_min(0.0)
        matrix = before[:, None, None] * decode(state, "matrix") + weighed.mT @ evicted.values
        return {**encode("matrix", left[..., None] * matrix, self.dtype), "mass": mass, **clock}
