"""IndexMem's latent memory: a sum of outer products of projected keys and their values for each row."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vestige.kernels.merge import AdditiveOutput
from vestige.memory.base import EvictedPairs, MemoryQuery, State
from vestige.memory.learned import LearnedMemory
from vestige.memory.storage import restored, stored
from vestige.nn.latent_memory import Kind

_LEAST = 1e-6  # of what is divided by


@dataclass(frozen=True, kw_only=True)
class Linear(LearnedMemory):
    """Remember the evicted as ``M = sum phi(k) v^T`` and ``b = sum phi(k)^2``; read ``phi(q)^T M / (phi(q)^2)^T b``.

    ``phi`` is a trained linear projection, one for each layer. What is read is added to attention over what is kept,
    times a trained gate between 0 and 1; it takes no part in the softmax, so a gate of 0 changes nothing.

    Source: IndexMem, arXiv 2605.25475, after its authors' code: one projection for keys and queries, after RoPE, one
    scalar gate and one decay for each layer. The rate of writing, which cancels in what is read, is left out. Ours: the
    decay is by tokens between pairs, not by writes, so that nothing hangs on when pairs were evicted, and may be left
    out; a gate may look at the query. Weights: ``vestige train indexmem``.

    Weighs, at head size 64 and width 32, as much as 16 pairs in bfloat16 (4,232 bytes a row; 32 pairs with
    ``dtype="float32"``).
    """

    kind: ClassVar[Kind] = "linear"

    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        """Return the state of rows that absorbed nothing."""
        width = self.weights.config.width
        matrix = stored("matrix", torch.zeros(rows, width, value_dim, device=device), self.dtype)
        return {**matrix, "mass": torch.zeros(rows, width, device=device), **self._clock(rows, device)}

    def recall(self, state: State, asked: MemoryQuery) -> AdditiveOutput:
        """Return what is added to attention."""
        layer = self.weights.at(asked.layer_idx)
        projected = layer.project(asked.queries)
        weighed = torch.bmm(projected.square(), state["mass"][..., None])
        found = torch.bmm(projected, restored(state, "matrix"))
        return AdditiveOutput(found * (layer.gate_value(asked.queries) / (weighed + _LEAST)))

    def _changed(self, state: State, evicted: EvictedPairs, sign: float) -> State:
        layer = self.weights.at(evicted.layer_idx)
        before, lives, clock = self._advanced(layer, state, evicted, sign)
        projected = layer.project(evicted.keys)
        weighed = sign * projected * lives
        left = (clock["count"] > 0)[:, None]  # where all were released, what rounding leaves is no memory
        mass = left * (before[:, None] * state["mass"] + (weighed * projected).sum(1)).clamp_min(0.0)
        matrix = before[:, None, None] * restored(state, "matrix") + weighed.mT @ evicted.values
        return {**stored("matrix", left[..., None] * matrix, self.dtype), "mass": mass, **clock}
