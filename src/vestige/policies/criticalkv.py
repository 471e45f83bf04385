"""CriticalKV: a first stage by attention, a second by attention times the projected value's norm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vestige.budget import Budget
from vestige.errors import PolicyError
from vestige.policies.base import NewPairs, Policy
from vestige.policies.observation import Observation
from vestige.policies.selection import RowIndex, Scale, keep_topk, rescale
from vestige.policies.snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class CriticalKV(Policy):
    """Keep pairs in two stages that bound how far the layer's output can move when the others go.

    The first stage takes the pairs with the most attention, a share ``first_stage`` of the budget beyond sink and
    window. The second stage ranks the rest by ``(attention + epsilon) * ||v W_O||_1``.

    Source: CriticalKV, arXiv 2502.03805, on SnapKV's score; norms are averaged over the query group, as in the
    authors' code in kvpress. Differs: sink and window have no part in the first stage (kvpress includes the window,
    which leaves little for other pairs under a small budget). The norm is stored when a pair is written, one number a
    pair, so that the cache can evict while decoding. Where rows compete, the first stage is one top-k over the rows of
    a layer, and the second follows the layer's budget too; the paper, on AdaKV, fixes each head's budget by attention
    alone and runs both stages within it. For ``share="model"`` both scores are divided by their layer's sum.
    """

    scale: Scale = "calibrated"
    """Scores are shares of their layer's sum already."""
    observed: int = 32
    """Latest queries whose attention is averaged."""
    kernel: int = 5
    """Tokens averaged by pooling; odd, 1 switches pooling off."""
    causal: bool = False
    """Pool a token with those before it, not around it: the question attends to the beginning of an answer, the reply
    will attend to the tokens that follow. Ours, not the paper's."""
    first_stage: float = 0.5
    """Share of the budget, in [0, 1], that is kept by attention alone."""
    epsilon: float = 1e-4
    """Added to the attention in the second stage, so that a large value counts even with no attention."""
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "output"})
    annotations: ClassVar[frozenset[str]] = frozenset({"absolute_output_norms"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.attention  # checks observed and kernel
        if not (0 <= self.first_stage <= 1 and 0 <= self.epsilon < float("inf")):
            raise PolicyError(
                "first_stage must lie in [0, 1] and epsilon must be a number of at least 0, "
                f"got first_stage={self.first_stage!r}, epsilon={self.epsilon!r}"
            )

    @property
    def attention(self) -> SnapKV:
        """The policy that scores the first stage."""
        return SnapKV(budget=None, observed=self.observed, kernel=self.kernel, causal=self.causal)

    def annotate(self, new: NewPairs) -> Mapping[str, Tensor]:
        """Return each value's L1 norm after the output projection, averaged over the query group.

        ``batch kv_heads new``, float32: a sum over the hidden size can be too large for half precision.
        """
        assert new.output is not None
        return {"absolute_output_norms": new.output.absolute_norms(new.values).mean(-1)}

    def score(self, obs: Observation) -> Float[Tensor, " held"]:
        """Return each pair's share of its layer's second-stage scores; first-stage pairs get 2 plus their attention."""
        attention = self.attention.score(obs)
        product = (attention + self.epsilon) * obs.annotations["absolute_output_norms"].float()
        index, protected = _make_row_index(obs), self._find_protected(obs)
        batch = index.batch[index.row]
        first, second = (rescale(x, protected, batch, "mass").clamp_max(1) for x in (attention, product))
        return torch.where(self._select_first_stage(attention, protected, index, obs), 2 + first, second)

    def _find_protected(self, obs: Observation) -> Bool[Tensor, " held"]:
        """Return a mask of the sink and window pairs; pins are not known here."""
        protected = torch.zeros_like(obs.positions, dtype=torch.bool)
        for row in obs.rows():
            first, recent = self.protected_ends(obs.pair_limits[row.batch])
            at = obs.positions[row.pairs]
            protected[row.pairs] = (at < first) | (at >= obs.seen[row.batch] - recent)
        return protected

    def _select_first_stage(
        self, attention: Float[Tensor, " held"], protected: Bool[Tensor, " held"], index: RowIndex, obs: Observation
    ) -> Bool[Tensor, " held"]:
        """Return a mask of the first-stage pairs."""
        groups = index.groups("head" if self.share == "head" else "layer")
        free = [Budget.share_of(max(n - sum(self.protected_ends(n)), 0), self.first_stage) for n in obs.pair_limits]
        each = torch.tensor(free, device=groups.device)[index.batch]
        counts = torch.zeros(int(groups.max()) + 1, dtype=torch.long, device=groups.device)
        counts.index_add_(0, groups, each)
        candidates = attention.masked_fill(protected, -1.0)  # after all others
        none = torch.zeros_like(protected)
        return keep_topk(candidates, obs.positions, none, groups[index.row], counts) & ~protected


def _make_row_index(obs: Observation) -> RowIndex:
    """Return the row index of one layer."""
    lengths = torch.tensor(obs.cu_seqlens, device=obs.positions.device).diff()
    batch = torch.arange(len(lengths), device=lengths.device) // obs.kv_heads
    return RowIndex(lengths, torch.zeros_like(lengths), batch)
