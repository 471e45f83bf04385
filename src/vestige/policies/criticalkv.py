"""Keep half by attention, half by attention times the size of the value after the output projection."""

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

    First come the pairs with the most attention, as many as ``first_stage`` of the room beyond sink and window; they
    are put above the rest, which is ranked by ``(attention + epsilon) * ||v W_O||_1``.

    Source: CriticalKV, arXiv 2502.03805, on SnapKV's score; norms are averaged over the query group, as in the
    authors' code in kvpress. Differs: sink and window have no part in the first stage (kvpress counts the window in,
    so that little of it is left for others where the budget is small). The norm is stored when a pair is written, one
    number a pair, so that room can be made while decoding. Where rows compete, the first stage is one top-k over the
    rows of a layer, and the second goes by the layer's room too; the paper, on AdaKV, fixes each head's budget by
    attention alone and makes both stages within it. For ``share="model"`` both scores are divided by their layer's sum.
    """

    scale: Scale = "calibrated"
    """Scores are shares of their layer's sum already."""
    observed: int = 32
    """Latest queries whose attention is averaged."""
    kernel: int = 5
    """Tokens that are pooled together; odd, 1 switches pooling off."""
    causal: bool = False
    """Pool a token with those before it, not around it. What the question looks at is where an answer begins; what
    follows will be looked at while the answer is written. Ours, not the paper's."""
    first_stage: float = 0.5
    """Part of the room, in [0, 1], that goes by attention alone."""
    epsilon: float = 1e-4
    """Added to the attention in the second stage, so that a large value counts also where attention is nil."""
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
        """What scores the first stage."""
        return SnapKV(budget=None, observed=self.observed, kernel=self.kernel, causal=self.causal)

    def annotate(self, written: NewPairs) -> Mapping[str, Tensor]:
        """Return each value's L1 norm after the output projection, averaged over the query group.

        ``batch kv_heads new``, float32: a sum over the hidden size can be too large for half precision.
        """
        assert written.output is not None
        return {"absolute_output_norms": written.output.absolute_norms(written.values).mean(-1)}

    def score(self, seen: Observation) -> Float[Tensor, " held"]:
        """Return each pair's share of its layer's second-stage scores, plus 2 for those of the first stage."""
        attention = self.attention.score(seen)
        product = (attention + self.epsilon) * seen.annotations["absolute_output_norms"].float()
        grid, guarded = _grid(seen), self._guarded(seen)
        batch = grid.batch[grid.row]
        first, second = (rescale(x, guarded, batch, "mass").clamp_max(1) for x in (attention, product))
        return torch.where(self._chosen(attention, guarded, grid, seen), 2 + first, second)

    def _guarded(self, seen: Observation) -> Bool[Tensor, " held"]:
        """Return which pairs are sink or window; pins are not known here."""
        guarded = torch.zeros_like(seen.positions, dtype=torch.bool)
        for row in seen.rows():
            first, recent = self.protected_ends(seen.pair_limits[row.batch])
            at = seen.positions[row.pairs]
            guarded[row.pairs] = (at < first) | (at >= seen.seen[row.batch] - recent)
        return guarded

    def _chosen(
        self, attention: Float[Tensor, " held"], guarded: Bool[Tensor, " held"], grid: RowIndex, seen: Observation
    ) -> Bool[Tensor, " held"]:
        """Return the pairs of the first stage."""
        groups = grid.groups("head" if self.share == "head" else "layer")
        free = [
            Budget.share_of(max(room - sum(self.protected_ends(room)), 0), self.first_stage)
            for room in seen.pair_limits
        ]
        each = torch.tensor(free, device=groups.device)[grid.batch]
        counts = torch.zeros(int(groups.max()) + 1, dtype=torch.long, device=groups.device)
        counts.index_add_(0, groups, each)
        candidates = attention.masked_fill(guarded, -1.0)  # behind every other
        none = torch.zeros_like(guarded)
        return keep_topk(candidates, seen.positions, none, groups[grid.row], counts) & ~guarded


def _grid(seen: Observation) -> RowIndex:
    """Return whose pairs are whose within one layer."""
    lengths = torch.tensor(seen.cu_seqlens, device=seen.positions.device).diff()
    batch = torch.arange(len(lengths), device=lengths.device) // seen.kv_heads
    return RowIndex(lengths, torch.zeros_like(lengths), batch)
