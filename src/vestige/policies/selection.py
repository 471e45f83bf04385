"""Select the pairs to keep from scores, protection and limits.

Rows compete in one of three ways: not at all (``share="head"``: each row keeps the same number), within a layer
(``"layer"``), or across all layers of a batch row (``"model"``, after the policy's scale made the scores of layers
comparable). Batch rows never compete.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.budget import Budget
from vestige.errors import BudgetError, PolicyError, unknown_name_message

Share = Literal["head", "layer", "model"]
Scale = Literal["calibrated", "mass", "signed"]
SHARES: tuple[str, ...] = get_args(Share)
SCALES: tuple[str, ...] = get_args(Scale)


def parse_share(name: str) -> Share:
    """Return a name as a `Share`.

    Raises:
        PolicyError: No share has this name.
    """
    if name not in SHARES:
        raise PolicyError(unknown_name_message("share", str(name), SHARES))
    return cast(Share, name)


@dataclass(frozen=True)
class RowIndex:
    """Length, layer and batch row of every packed row, layer by layer, in (batch, kv_head) order within a layer."""

    lengths: Int[Tensor, " rows"]
    layer: Int[Tensor, " rows"]
    batch: Int[Tensor, " rows"]

    @cached_property
    def row(self) -> Int[Tensor, " held"]:
        """The row of each pair."""
        return torch.repeat_interleave(torch.arange(len(self.lengths), device=self.lengths.device), self.lengths)

    def groups(self, share: Share) -> Int[Tensor, " rows"]:
        """Return the group in which each row competes, numbered from 0."""
        if share == "head":
            return torch.arange(len(self.lengths), device=self.lengths.device)
        if share == "layer":
            return self.layer * (int(self.batch.max()) + 1) + self.batch
        return self.batch


def select(
    scores: Float[Tensor, " held"],
    positions: Int[Tensor, " held"],
    protected: Bool[Tensor, " held"],
    index: RowIndex,
    pair_limits: Int[Tensor, " batch"],
    *,
    share: Share,
    scale: Scale,
    floor: float = 0.0,
    counts: Int[Tensor, " rows"] | None = None,
    threshold: float | None = None,
) -> Bool[Tensor, " held"]:
    """Return a mask of the pairs to keep: every protected one, then the highest scores of each group.

    Inputs are not modified. Without a threshold a group keeps exactly its limit, or all pairs if it has fewer. Ties go
    to the later token.

    Args:
        scores: Importance, larger means keep.
        positions: Position of each pair, for ties.
        protected: True where a pair must stay.
        index: Row, layer and batch row of each pair.
        pair_limits: Average pairs per row that each batch row may keep, protected ones included.
        share: Which rows compete.
        scale: How layers are made comparable for ``share="model"`` and ``threshold``; see :func:`rescale`.
        floor: Share of the average that each row keeps before rows compete (AdaKV's safeguard), in [0, 1].
        counts: Pairs that each row keeps, if the policy allocates rows; ``share`` and ``floor`` are then ignored.
        threshold: Unprotected pairs with a lower comparable score are evicted even within the limit.

    Raises:
        PolicyError: A score is NaN.
        BudgetError: A group protects more pairs than it may keep; the message gives both.
    """
    refuse_nan(scores, index)
    worthy = torch.ones_like(protected)
    if share == "model" or threshold is not None:
        comparable = rescale(scores, protected, index.groups("layer")[index.row], scale)
        worthy = worthy if threshold is None else (comparable >= threshold) | protected
        scores = comparable if share == "model" else scores
    first, groups, totals = None, index.row, counts
    if totals is None:
        if floor and share != "head":
            floors = torch.tensor([Budget.share_of(int(n), floor) for n in pair_limits], device=scores.device)
            least = torch.maximum(floors[index.batch], count_protected(protected, index))
            first = keep_topk(scores, positions, protected, index.row, least)
        of_row = index.groups(share)
        groups = of_row[index.row]
        totals = torch.zeros(int(of_row.max()) + 1, dtype=torch.long, device=scores.device)
        totals.index_add_(0, of_row, pair_limits[index.batch])
    return keep_topk(scores, positions, protected, groups, totals, first) & worthy


def keep_topk(
    scores: Float[Tensor, " held"],
    positions: Int[Tensor, " held"],
    protected: Bool[Tensor, " held"],
    groups: Int[Tensor, " held"],
    counts: Int[Tensor, " groups"],
    first: Bool[Tensor, " held"] | None = None,
) -> Bool[Tensor, " held"]:
    """Return a mask of ``counts[g]`` pairs in each group g (all, if it has fewer): the protected ones, then the best.

    Pairs of ``first`` come directly after the protected ones.

    Raises:
        BudgetError: A group protects more pairs than its count; the message gives both.
    """
    fixed = torch.zeros_like(counts).index_add_(0, groups, protected.to(counts))
    if bool((fixed > counts).any()):
        worst = int((fixed - counts).argmax())
        raise BudgetError(f"{int(fixed[worst])} pairs are protected, the budget has room for {int(counts[worst])}")
    # Protected pairs come first in their group, whatever their score; then the order is by score, then by position.
    tier = 2 - (protected if first is None else protected | first).long() - protected.long()
    order = torch.argsort(_make_sort_keys(scores, positions), descending=True, stable=True)
    order = order[torch.argsort(groups[order] * 3 + tier[order], stable=True)]
    sizes = torch.zeros_like(counts).index_add_(0, groups, torch.ones_like(groups))
    begins = sizes.cumsum(0) - sizes
    ranked = groups[order]
    rank = torch.arange(len(order), device=order.device) - begins[ranked]
    kept = torch.zeros_like(protected)
    kept[order] = rank < counts[ranked]
    return kept


def _make_sort_keys(scores: Float[Tensor, " held"], positions: Int[Tensor, " held"]) -> Int[Tensor, " held"]:
    """Return integers that sort by float32 score, then by position: one sort instead of two."""
    bits = (scores.float() + 0.0).view(torch.int32).long()  # adding 0 turns -0.0 into 0.0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats have descending bits
    return (ascending << 32) + positions


def apportion(
    wanted: Float[Tensor, " rows"],
    least: Int[Tensor, " rows"],
    most: Int[Tensor, " rows"],
    batch: Int[Tensor, " rows"],
    totals: Int[Tensor, " batch"],
) -> Int[Tensor, " rows"]:
    """Return integers proportional to ``wanted``, clamped to [least, most], that sum to the total of each batch row.

    The excess of a clamped row goes to the other rows in proportion. If the total is out of reach, all rows get their
    least, or their most. The largest remainders are rounded up. ``wanted`` is not negative.
    """
    counts = torch.zeros_like(least)
    for b, total in enumerate(totals.tolist()):
        rows = (batch == b).nonzero()[:, 0]
        low, high = least[rows].double(), torch.maximum(most[rows], least[rows]).double()
        target = min(max(total, int(low.sum())), int(high.sum()))
        share = wanted[rows].double().clamp_min(1e-9)
        exact = (share * _find_factor(share, low, high, target)).clamp(low, high)
        whole = exact.floor()
        by_remainder = torch.argsort(exact - whole, descending=True, stable=True)
        whole[by_remainder[: target - int(whole.sum())]] += 1
        counts[rows] = whole.long()
    return counts


def _find_factor(share: Tensor, low: Tensor, high: Tensor, target: int) -> float:
    """Return the factor at which the clamped shares sum to the target, found by bisection."""
    below, above = 0.0, float((high / share).max())
    for _ in range(200):
        middle = (below + above) / 2
        if float((share * middle).clamp(low, high).sum()) < target:
            below = middle
        else:
            above = middle
    return above


def count_protected(protected: Bool[Tensor, " held"], index: RowIndex) -> Int[Tensor, " rows"]:
    """Return the number of protected pairs in each row."""
    return torch.zeros_like(index.lengths).index_add_(0, index.row, protected.to(index.lengths))


def rescale(
    scores: Float[Tensor, " held"],
    protected: Bool[Tensor, " held"],
    layers: Int[Tensor, " held"],
    scale: Scale,
) -> Float[Tensor, " held"]:
    """Return scores that can be compared between layers; the order within a layer stays.

    ``calibrated`` leaves them. ``mass`` divides by the layer's sum over unprotected pairs. ``signed`` takes the z-score
    over the layer's unprotected pairs. Protected pairs do not count: the large scores of sinks would deflate their
    layer. ``layers`` is the layer (of a batch row) of each pair.
    """
    if scale == "calibrated":
        return scores
    num_layers = int(layers.max()) + 1 if len(layers) else 0
    left_out = protected | ~scores.isfinite()  # an infinite score must not make its layer NaN

    def total(values: Float[Tensor, " held"]) -> Float[Tensor, " layers"]:
        return values.new_zeros(num_layers).index_add_(0, layers, values.masked_fill(left_out, 0.0))

    tiny = torch.finfo(scores.dtype).tiny
    if scale == "mass":
        return scores / total(scores).clamp_min(tiny)[layers]
    count = total(torch.ones_like(scores)).clamp_min(1)
    centred = scores - (total(scores) / count)[layers]
    deviation = (total(centred.square()) / count).sqrt().clamp_min(tiny)
    return centred / deviation[layers]


def refuse_nan(scores: Float[Tensor, " held"], index: RowIndex) -> None:
    """Raise a PolicyError that names the first layer with a NaN score."""
    bad = torch.isnan(scores)
    if bool(bad.any()):
        layer = int(index.layer[index.row[bad.nonzero()[0, 0]]])
        raise PolicyError(f"{int(bad.sum())} scores are NaN, the first in layer {layer}; nothing was evicted")
