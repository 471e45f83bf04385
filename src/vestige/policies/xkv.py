"""XKV: layer budgets from the distribution of importance within each layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.errors import PolicyError
from vestige.policies.base import Policy
from vestige.policies.observation import Observation
from vestige.policies.scoring import average_over_heads
from vestige.policies.selection import RowIndex, Scale, rescale
from vestige.policies.snapkv import SnapKV

_MAX_PROFILE = 2.0**60  # refuses infinity and NaN


@dataclass(frozen=True, kw_only=True)
class XKV(Policy):
    """Keep in each layer as many tokens as hold the largest shares of its attention, the same ones in all its heads.

    The budget is spent pair by pair on the layer whose next most important token has the largest share of the layer's
    importance; this greedy rule maximises the sum of the kept shares. Importance is that of `SnapKV`, averaged over the
    KV heads that hold a token. A layer that attends to few tokens gets a small budget.

    Source: the abstract of XKV, arXiv 2412.05896: layers differ in their distribution of importance, so cache sizes
    are set layer by layer, as a combinatorial problem with a greedy solution, after a small inference that samples the
    differences. Inferred by us: the definition of importance, and the use of its share of the layer. Differs: layers
    are sized again for each text unless a ``profile`` is given, and ``pipelines.calibrate.profile_layers`` samples with
    the model itself, where the authors use a light variant of it. Rows of a layer may differ by one pair because of
    rounding; they never compete, so ``share`` and ``floor`` have no effect.
    """

    scale: Scale = "mass"
    profile: tuple[float, ...] | None = None
    """Relative budget of each evictable layer, from ``profile_layers``; None measures each text."""
    observed: int = 32
    """Latest queries whose attention is averaged."""
    kernel: int = 5
    """Tokens averaged by pooling; odd, 1 switches pooling off."""
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._scorer  # refuses observed and kernel
        if self.profile is not None and not (
            min(self.profile, default=-1) >= 0 and 0 < sum(self.profile) < _MAX_PROFILE
        ):
            raise PolicyError(f"profile needs a number of at least 0 for each layer, not all 0, got {self.profile!r}")

    @property
    def _scorer(self) -> SnapKV:
        return SnapKV(budget=None, observed=self.observed, kernel=self.kernel)

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return SnapKV's score of each token, the same for every KV head that holds it."""
        return average_over_heads(obs, self._scorer.score(obs))

    def allot(
        self, scores: Float[Tensor, " held"], index: RowIndex, pair_limits: Int[Tensor, " batch"]
    ) -> Float[Tensor, " rows"]:
        """Return for each row the window plus its layer's part of the best pairs of all layers."""
        layers, order = torch.unique(index.layer, return_inverse=True)
        if self.profile is not None:
            if len(self.profile) != len(layers):
                raise PolicyError(
                    f"profile is for {len(self.profile)} layers, but the model has {len(layers)} that can be evicted"
                )
            return torch.tensor(self.profile, device=scores.device)[order]
        guarded = index.lengths.clamp_max(self.window)  # observed tokens have no score and stay
        wanted = guarded.float()
        shares = rescale(scores, torch.zeros_like(scores, dtype=torch.bool), index.groups("layer")[index.row], "mass")
        for b, average in enumerate(pair_limits.tolist()):
            rows = (index.batch == b).nonzero()[:, 0]
            pairs = (index.batch[index.row] == b).nonzero()[:, 0]
            spare = average * len(rows) - int(guarded[rows].sum())
            best = pairs[torch.argsort(shares[pairs], descending=True, stable=True)[: max(spare, 0)]]
            per_layer = torch.bincount(order[index.row[best]], minlength=len(layers))
            heads = torch.bincount(order[rows], minlength=len(layers))
            wanted[rows] += (per_layer / heads.clamp_min(1))[order[rows]]
        return wanted
