"""Keep what the latest queries attend to, more of it in lower layers than in higher ones."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import PolicyError
from vestige.policies.selection import RowIndex
from vestige.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Keep SnapKV's tokens under budgets that fall linearly from the first layer to the last.

    Every row keeps sink and window. What is left of the average room, ``b`` pairs a row, is spread so that the last
    layer has ``b / beta``, the first ``2 b - b / beta``, and the mean over layers is ``b``; where the first would have
    more than was seen, it has that, and the last the more. Rows of a layer have equally many (one may differ by one,
    where whole numbers do not add up); they never compete, so ``share`` and ``floor`` have no effect.

    Source: PyramidKV, arXiv 2406.02069; the cap is that of the authors' code. Differs: the score is :class:`SnapKV`'s,
    with its differences; ``sink`` tokens stay too; layers are counted among those whose pairs can be evicted. kvpress
    counts the window in ``b`` and falls back to equal budgets where ``b / beta`` is below it.
    """

    beta: float = 20.0
    """Steepness: the average budget beyond sink and window over that of the last layer; 1 makes all layers equal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise PolicyError(f"beta must be a number of at least 1, got {self.beta!r}")

    def allot(
        self, scores: Float[Tensor, " held"], grid: RowIndex, room: Int[Tensor, " batch"]
    ) -> Float[Tensor, " rows"]:
        """Return the pairs wanted for each row: a straight line over the layers. Scores do not matter."""
        depth, layers = _depth(grid)
        base = (room - self.protected).clamp_min(0).float()
        longest = torch.zeros_like(room).scatter_reduce(0, grid.batch, grid.lengths, "amax")
        most = torch.minimum(2 * base - base / self.beta, (longest - self.protected).clamp_min(0))
        most = torch.maximum(most, base)  # where even the average is more than was seen, all are held
        level = 1 - 2 * depth / max(layers - 1, 1) if layers > 1 else torch.zeros_like(depth)  # 1 first, -1 last
        return self.protected + base[grid.batch] + level * (most - base)[grid.batch]


def _depth(grid: RowIndex) -> tuple[Int[Tensor, " rows"], int]:
    """Return how many evictable layers are below each row's, and how many there are."""
    layers, depth = torch.unique(grid.layer, return_inverse=True)
    return depth, len(layers)
