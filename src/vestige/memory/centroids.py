"""Centroids: the evicted pairs of each row in a few groups, each read as one pair weighted by its count."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import one_hot

from vestige.errors import require_whole
from vestige.kernels.merge import PartialAttention
from vestige.kernels.weighted import attend_weighted
from vestige.memory.base import EvictedPairs, Memory, MemoryQuery, State, log_count
from vestige.memory.storage import Dtype, check_dtype, decode, encode, update_means


@dataclass(frozen=True, kw_only=True)
class Centroids(Memory):
    """Remember group means of the evicted keys and values; each enters the softmax as a pair with its log-count.

    New pairs go to the centroid with the nearest key by Euclidean distance, keys as stored: the logits of two keys
    differ by at most ``|q| |k - k'|``, a bound that neither direction alone nor keys before RoPE give. Empty centroids
    start at pairs spread evenly over the new ones in time, since RoPE's phases follow time. Then centroids move to the
    mean of all their pairs and the new pairs are assigned again, a few times. Counts and means merge exactly; earlier
    pairs stay in their groups. Nothing is random. The first ``centroids`` pairs of a row are stored as they are.

    Source: IndexMem++ (authors' release after arXiv 2605.25475), ResKV. Differs: 16 centroids, not 64; later evictions
    are refined like the first; the initial centroids, which the sources do not define.

    Weighs, at head size 64, as much as 16 pairs in bfloat16 (4,168 bytes a row; 32 pairs with ``dtype="float32"``).
    """

    centroids: int = 16
    """Groups per row."""
    rounds: int = 5
    """Number of assignment rounds of new pairs."""
    dtype: Dtype = "float16"
    """Dtype of the stored means; counts are float32."""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        for name in ("centroids", "rounds"):
            require_whole(name, getattr(self, name), 1)

    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        """Return the state of rows that absorbed nothing."""
        keys, values = (torch.zeros(rows, self.centroids, size, device=device) for size in (head_dim, value_dim))
        return self._make_state(torch.zeros(rows, self.centroids, device=device), keys, values)

    def absorb(self, state: State, evicted: EvictedPairs) -> State:
        """Return the state of rows that absorbed these pairs too."""
        count, keys, values = state["count"], decode(state, "keys"), decode(state, "values")
        fresh, seeds = self._choose_seeds(count, evicted)
        centres = torch.where(fresh[..., None], seeds, keys)
        present = fresh | (count > 0)
        for _ in range(self.rounds):
            members = self._assign_members(centres, present, evicted)
            added = members.sum(1)
            total = (count + added).clamp_min(1)
            moved = update_means(keys, members.mT @ evicted.keys, added, total)
            centres = torch.where((count + added > 0)[..., None], moved, centres)
        values = update_means(values, members.mT @ evicted.values, added, total)
        return self._make_state(count + added, moved, values)

    def recall(self, state: State, query: MemoryQuery) -> PartialAttention:
        """Return attention over the centroids."""
        pairs = decode(state, "keys"), decode(state, "values"), log_count(state["count"])
        return attend_weighted(query.queries, *pairs, query.scale)

    def _make_state(self, count: Tensor, keys: Tensor, values: Tensor) -> State:
        return {"count": count, **encode("keys", keys, self.dtype), **encode("values", values, self.dtype)}

    def _choose_seeds(
        self, count: Float[Tensor, "rows centroids"], evicted: EvictedPairs
    ) -> tuple[Bool[Tensor, "rows centroids"], Float[Tensor, "rows centroids head_dim"]]:
        """Return a mask of the centroids that start with these pairs, and the keys they start at."""
        vacant = count == 0
        rank = vacant.cumsum(1) - 1
        pairs = evicted.counts[:, None]
        seeded = torch.minimum(vacant.sum(1, keepdim=True), pairs)
        fresh = vacant & (rank < seeded)
        at = (rank * pairs // seeded.clamp_min(1)).where(fresh, 0)
        return fresh, evicted.keys.gather(1, at[..., None].expand(-1, -1, evicted.keys.shape[-1]))

    def _assign_members(
        self,
        centres: Float[Tensor, "rows centroids head_dim"],
        present: Bool[Tensor, "rows centroids"],
        new: EvictedPairs,
    ) -> Float[Tensor, "rows longest centroids"]:
        """Return 1 where a new pair belongs to a centroid: the nearest, in a tie the first."""
        distance = centres.square().sum(-1)[:, None] - 2 * new.keys @ centres.mT  # without |key|^2, a constant per pair
        nearest = distance.masked_fill(~present[:, None], torch.inf).argmin(-1)
        return one_hot(nearest, self.centroids).float() * new.valid[..., None]
