"""Give each layer the room that its importance distribution asks for."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import PolicyError
from vestige.policies.base import Policy
from vestige.policies.observation import Observation, over_heads
from vestige.policies.selection import RowIndex, Scale, rescale
from vestige.policies.snapkv import SnapKV

_MOST = 2.0**60  # any number, but neither infinite nor NaN


@dataclass(frozen=True, kw_only=True)
class XKV(Policy):
    """Keep in each layer as many tokens as hold the largest shares of its attention, the same ones in all its heads.

    Room is given out pair by pair to the layer in which the next most important token has the largest share of the
    layer's importance: greedy, and the best that can be done for the sum of the shares kept. Importance is that of
    `SnapKV`, averaged over the KV heads that hold a token. A layer that looks at few tokens needs little room.

    Source: XKV, arXiv 2412.05896, as far as its abstract goes: layers differ in how importance is spread, so caches
    are sized layer by layer, as a combinatorial problem with a greedy solution, after a small inference that samples
    the differences. Inferred by us: what importance is, and that its share of the layer is what counts. Differs:
    layers are sized again from each text unless a ``profile`` is given, and ``pipelines.calibrate.profile_layers``
    samples with the model itself, where the authors take a light variant of it. Rows of a layer may differ by one pair,
    where whole numbers do not add up; they never compete, so ``share`` and ``floor`` have no effect.
    """

    scale: Scale = "mass"
    profile: tuple[float, ...] | None = None
    """Room of each evictable layer relative to the others, from ``profile_layers``; None measures each text."""
    observed: int = 32
    """Latest queries whose attention is averaged."""
    kernel: int = 5
    """Tokens that are pooled together; odd, 1 switches pooling off."""
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._scorer  # refuses observed and kernel
        if self.profile is not None and not (min(self.profile, default=-1) >= 0 and 0 < sum(self.profile) < _MOST):
            raise PolicyError(f"profile needs a number of at least 0 for each layer, not all 0, got {self.profile!r}")

    @property
    def _scorer(self) -> SnapKV:
        return SnapKV(budget=None, observed=self.observed, kernel=self.kernel)

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return SnapKV's score of each token, the same for every KV head that holds it."""
        return over_heads(seen, self._scorer.score(seen))

    def allot(
        self, scores: Float[Tensor, " held"], grid: RowIndex, room: Int[Tensor, " batch"]
    ) -> Float[Tensor, " rows"]:
        """Return the window's pairs and those among the best of all layers, the same for each row of a layer."""
        layers, order = torch.unique(grid.layer, return_inverse=True)
        if self.profile is not None:
            if len(self.profile) != len(layers):
                raise PolicyError(
                    f"profile is for {len(self.profile)} layers, but the model has {len(layers)} that can be evicted"
                )
            return torch.tensor(self.profile, device=scores.device)[order]
        guarded = grid.lengths.clamp_max(self.window)  # observed tokens have no score, and stay
        wanted = guarded.float()
        shares = rescale(scores, torch.zeros_like(scores, dtype=torch.bool), grid.groups("layer")[grid.row], "mass")
        for b, average in enumerate(room.tolist()):
            rows = (grid.batch == b).nonzero()[:, 0]
            pairs = (grid.batch[grid.row] == b).nonzero()[:, 0]
            spare = average * len(rows) - int(guarded[rows].sum())
            best = pairs[torch.argsort(shares[pairs], descending=True, stable=True)[: max(spare, 0)]]
            per_layer = torch.bincount(order[grid.row[best]], minlength=len(layers))
            heads = torch.bincount(order[rows], minlength=len(layers))
            wanted[rows] += (per_layer / heads.clamp_min(1))[order[rows]]
        return wanted
