"""Centroids: the evicted pairs of each row in a few groups; each is read as one pair that weighs as many as it is."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import one_hot

from vestige.errors import require_whole
from vestige.kernels.merge import PartialAttention
from vestige.kernels.weighted import attend_weighted
from vestige.memory.base import EvictedPairs, Memory, MemoryQuery, State, log_count
from vestige.memory.storage import Dtype, check_dtype, restored, stored


@dataclass(frozen=True, kw_only=True)
class Centroids(Memory):
    """Remember group means of the evicted keys and values; each enters the softmax as a pair with its log-count.

    New pairs go to the nearest centroid by key, Euclid, keys as stored: a query reads two keys alike up to
    ``|q| |k - k'|``, and neither direction alone nor a key before RoPE bounds that. Centroids that are still empty
    begin at pairs spread evenly over the batch in time, as phases under RoPE are; then centroids move to the mean
    of all their pairs and the new pairs choose again, a few times. Counts and means merge exactly; earlier pairs stay
    in their groups. Nothing is drawn. The first ``centroids`` pairs of a row are remembered as they are.

    Source: IndexMem++ (authors' release after arXiv 2605.25475), ResKV. Differs: 16 centroids, not 64; later evictions
    are refined like the first; the seeds, which the sources do not say.

    Weighs, at head size 64, as much as 16 pairs in bfloat16 (4,168 bytes a row; 32 pairs with ``dtype="float32"``).
    """

    centroids: int = 16
    """Groups per row."""
    rounds: int = 5
    """How often new pairs choose their centroid."""
    dtype: Dtype = "float16"
    """Of the stored means; counts are float32."""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        for name in ("centroids", "rounds"):
            require_whole(name, getattr(self, name), 1)

    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        """Return the state of rows that absorbed nothing."""
        keys, values = (torch.zeros(rows, self.centroids, size, device=device) for size in (head_dim, value_dim))
        return self._state(torch.zeros(rows, self.centroids, device=device), keys, values)

    def absorb(self, state: State, evicted: EvictedPairs) -> State:
        """Return the state of rows that absorbed these pairs too."""
        count, keys, values = state["count"], restored(state, "keys"), restored(state, "values")
        fresh, seeds = self._seeds(count, evicted)
        centres = torch.where(fresh[..., None], seeds, keys)
        present = fresh | (count > 0)
        for _ in range(self.rounds):
            members = self._members(centres, present, evicted)
            moved = _merged(count, keys, members, evicted.keys)
            filled = count + members.sum(1) > 0
            centres = torch.where(filled[..., None], moved, centres)
        values = _merged(count, values, members, evicted.values)
        return self._state(count + members.sum(1), moved, values)

    def recall(self, state: State, asked: MemoryQuery) -> PartialAttention:
        """Return attention over the centroids."""
        pairs = restored(state, "keys"), restored(state, "values"), log_count(state["count"])
        return attend_weighted(asked.queries, *pairs, asked.scale)

    def _state(self, count: Tensor, keys: Tensor, values: Tensor) -> State:
        return {"count": count, **stored("keys", keys, self.dtype), **stored("values", values, self.dtype)}

    def _seeds(
        self, count: Float[Tensor, "rows centroids"], evicted: EvictedPairs
    ) -> tuple[Bool[Tensor, "rows centroids"], Float[Tensor, "rows centroids head_dim"]]:
        """Return which centroids begin with this batch, and the keys they begin at."""
        vacant = count == 0
        rank = vacant.cumsum(1) - 1
        pairs = evicted.counts[:, None]
        seeded = torch.minimum(vacant.sum(1, keepdim=True), pairs)
        fresh = vacant & (rank < seeded)
        at = (rank * pairs // seeded.clamp_min(1)).where(fresh, 0)
        return fresh, evicted.keys.gather(1, at[..., None].expand(-1, -1, evicted.keys.shape[-1]))

    def _members(
        self,
        centres: Float[Tensor, "rows centroids head_dim"],
        present: Bool[Tensor, "rows centroids"],
        new: EvictedPairs,
    ) -> Float[Tensor, "rows longest centroids"]:
        """Return 1 where a new pair belongs to a centroid: the nearest, the first of those that are equally near."""
        distance = centres.square().sum(-1)[:, None] - 2 * new.keys @ centres.mT  # less |key|^2, the same for all
        nearest = distance.masked_fill(~present[:, None], torch.inf).argmin(-1)
        return one_hot(nearest, self.centroids).float() * new.valid[..., None]


def _merged(
    count: Float[Tensor, "rows centroids"],
    means: Float[Tensor, "rows centroids dim"],
    members: Float[Tensor, "rows longest centroids"],
    new: Float[Tensor, "rows longest dim"],
) -> Float[Tensor, "rows centroids dim"]:
    """Return the means of what groups held and of their new members; groups that got none stay bit for bit."""
    added = members.sum(1)
    total = (count + added).clamp_min(1)[..., None]
    return means + (members.mT @ new - added[..., None] * means) / total
