"""PyramidKV: SnapKV's scores, with larger budgets in lower layers than in higher ones."""

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

    Every row keeps sink and window. The rest of the average budget, ``b`` pairs a row, is spread so that the last layer
    has ``b / beta``, the first ``2 b - b / beta``, and the mean over layers is ``b``; the first layer is capped at the
    number of seen tokens, which raises the last. Rows of a layer have equal budgets (one may differ by one pair because
    of rounding); they never compete, so ``share`` and ``floor`` have no effect.

    Source: PyramidKV, arXiv 2406.02069; the cap is that of the authors' code. Differs: the score is :class:`SnapKV`'s,
    with its differences; ``sink`` tokens stay too; only evictable layers count. kvpress includes the window in ``b``
    and falls back to equal budgets where ``b / beta`` is below it.
    """

    beta: float = 20.0
    """Steepness: the average budget beyond sink and window over that of the last layer; 1 makes all layers equal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise PolicyError(f"beta must be a number of at least 1, got {self.beta!r}")

    def allot(
        self, scores: Float[Tensor, " held"], index: RowIndex, pair_limits: Int[Tensor, " batch"]
    ) -> Float[Tensor, " rows"]:
        """Return the pairs wanted for each row: linear over the layers, whatever the scores."""
        layers, depth = torch.unique(index.layer, return_inverse=True)
        last = len(layers) - 1
        base = (pair_limits - self.protected).clamp_min(0).float()
        longest = torch.zeros_like(pair_limits).scatter_reduce(0, index.batch, index.lengths, "amax")
        most = torch.minimum(2 * base - base / self.beta, (longest - self.protected).clamp_min(0))
        most = torch.maximum(most, base)  # a budget above the seen tokens keeps all
        level = 1 - 2 * depth / last if last > 0 else torch.zeros_like(depth)  # 1 first, -1 last
        return self.protected + base[index.batch] + level * (most - base)[index.batch]
