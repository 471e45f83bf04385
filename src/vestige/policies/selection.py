"""Who stays: scores, protection and room in, kept pairs out.

One question, *who competes with whom for room*, has three answers: ``share="head"`` (each row keeps as many as every
other), ``"layer"`` (the rows of a layer compete) and ``"model"`` (all rows of a batch row compete, over all layers,
after their scores were made comparable by the policy's scale). Batch rows never compete.
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


def share_of(name: str) -> Share:
    """Return the share of that name.

    Raises:
        PolicyError: There is none.
    """
    if name not in SHARES:
        raise PolicyError(unknown_name_message("share", str(name), SHARES))
    return cast(Share, name)


@dataclass(frozen=True)
class RowIndex:
    """The packed rows of all evictable layers, layer by layer, each layer's rows in (batch, kv_head) order.

    Args:
        lengths: Pairs of each row.
        layer: Layer of each row.
        batch: Batch row of each row.
    """

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
    grid: RowIndex,
    room: Int[Tensor, " batch"],
    *,
    share: Share,
    scale: Scale,
    floor: float = 0.0,
    counts: Int[Tensor, " rows"] | None = None,
    threshold: float | None = None,
) -> Bool[Tensor, " held"]:
    """Return which pairs stay: every protected one, then the highest scores of each group.

    Nothing is modified. A group keeps exactly its room, or all it has if that is less, but for a threshold. Ties go to
    the later token.

    Args:
        scores: Importance, larger means keep.
        positions: Position of each pair, for ties.
        protected: True where a pair must stay.
        grid: Which row, layer and batch row a pair belongs to.
        room: Average pairs per row that each batch row may keep, protected ones included.
        share: Who competes with whom.
        scale: How layers are made comparable for ``share="model"``; see :func:`rescale`.
        floor: Share of the average that each row keeps before rows compete (AdaKV's safeguard), in [0, 1].
        counts: Pairs that each row keeps, if they are fixed beforehand; then ``share`` and ``floor`` do not matter.
        threshold: Unprotected pairs whose comparable score is below it go even where there is room.

    Raises:
        PolicyError: A score is NaN.
        BudgetError: A group protects more pairs than it may keep; the message gives both.
    """
    refuse_nan(scores, grid)
    worthy = torch.ones_like(protected)
    if share == "model" or threshold is not None:
        comparable = rescale(scores, protected, grid.groups("layer")[grid.row], scale)
        worthy = worthy if threshold is None else (comparable >= threshold) | protected
        scores = comparable if share == "model" else scores
    first, groups, totals = None, grid.row, counts
    if totals is None:
        first = _floored(scores, positions, protected, grid, room, floor) if floor and share != "head" else None
        of_row = grid.groups(share)
        groups = of_row[grid.row]
        totals = torch.zeros(int(of_row.max()) + 1, dtype=torch.long, device=scores.device)
        totals.index_add_(0, of_row, room[grid.batch])
    return keep_topk(scores, positions, protected, groups, totals, first) & worthy


def _floored(
    scores: Tensor, positions: Tensor, protected: Tensor, grid: RowIndex, room: Int[Tensor, " batch"], floor: float
) -> Bool[Tensor, " held"]:
    """Return the pairs that rows keep before they compete."""
    floors = torch.tensor([Budget.share_of(int(n), floor) for n in room], device=scores.device)[grid.batch]
    return keep_topk(scores, positions, protected, grid.row, torch.maximum(floors, protected_per_row(protected, grid)))


def keep_topk(
    scores: Float[Tensor, " held"],
    positions: Int[Tensor, " held"],
    protected: Bool[Tensor, " held"],
    groups: Int[Tensor, " held"],
    counts: Int[Tensor, " groups"],
    first: Bool[Tensor, " held"] | None = None,
) -> Bool[Tensor, " held"]:
    """Return the protected pairs and the best others, ``counts[g]`` in each group g (all, if it has fewer).

    Pairs of ``first`` come next after the protected ones, as far as there is room.

    Raises:
        BudgetError: A group protects more pairs than its count; the message gives both.
    """
    guarded = _protected_per(groups, protected, len(counts))
    if bool((guarded > counts).any()):
        worst = int((guarded - counts).argmax())
        raise BudgetError(f"{int(guarded[worst])} pairs are protected, the budget has room for {int(counts[worst])}")
    # Protected pairs come first in their group, whatever their score; then the order is by score, then by position.
    tier = 2 - (protected if first is None else protected | first).long() - protected.long()
    order = torch.argsort(_by_score_and_position(scores, positions), descending=True, stable=True)
    order = order[torch.argsort(groups[order] * 3 + tier[order], stable=True)]
    sizes = torch.zeros_like(counts).index_add_(0, groups, torch.ones_like(groups))
    begins = sizes.cumsum(0) - sizes
    ranked = groups[order]
    rank = torch.arange(len(order), device=order.device) - begins[ranked]
    kept = torch.zeros_like(protected)
    kept[order] = rank < counts[ranked]
    return kept


def _by_score_and_position(scores: Float[Tensor, " held"], positions: Int[Tensor, " held"]) -> Int[Tensor, " held"]:
    """Return integers in the order of the float32 scores, ties in that of the positions: one sort instead of two."""
    bits = (scores.float() + 0.0).view(torch.int32).long()  # adding 0 makes -0.0 equal 0.0, as numbers are
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # the bits of negative floats run backwards
    return (ascending << 32) + positions


def apportion(
    wanted: Float[Tensor, " rows"],
    least: Int[Tensor, " rows"],
    most: Int[Tensor, " rows"],
    batch: Int[Tensor, " rows"],
    totals: Int[Tensor, " batch"],
) -> Int[Tensor, " rows"]:
    """Return whole numbers in proportion to what was wanted that add up, for each batch row, to its total.

    No row gets less than its least or more than its most: what one cannot take goes to the others in proportion. If
    that leaves the total out of reach, all rows have their least, or their most. The largest remainders are rounded up.

    Args:
        wanted: Pairs wanted, non-negative; only their proportions matter.
        least: Pairs that each row must keep.
        most: Pairs that each row has.
        batch: Batch row of each row.
        totals: Pairs of each batch row, over its rows.
    """
    counts = torch.zeros_like(least)
    for b, total in enumerate(totals.tolist()):
        rows = (batch == b).nonzero()[:, 0]
        low, high = least[rows].double(), torch.maximum(most[rows], least[rows]).double()
        target = min(max(total, int(low.sum())), int(high.sum()))
        share = wanted[rows].double().clamp_min(1e-9)
        exact = (share * _level(share, low, high, target)).clamp(low, high)
        whole = exact.floor()
        by_remainder = torch.argsort(exact - whole, descending=True, stable=True)
        whole[by_remainder[: target - int(whole.sum())]] += 1
        counts[rows] = whole.long()
    return counts


def _level(share: Tensor, low: Tensor, high: Tensor, target: int) -> float:
    """Return the factor at which clamped shares add up to the target: their sum grows with it, so halving finds it."""
    below, above = 0.0, float((high / share).max())
    for _ in range(200):
        middle = (below + above) / 2
        if float((share * middle).clamp(low, high).sum()) < target:
            below = middle
        else:
            above = middle
    return above


def protected_per_row(protected: Bool[Tensor, " held"], grid: RowIndex) -> Int[Tensor, " rows"]:
    """Return how many pairs of each row are protected."""
    return _protected_per(grid.row, protected, len(grid.lengths))


def rescale(
    scores: Float[Tensor, " held"],
    protected: Bool[Tensor, " held"],
    layers: Int[Tensor, " held"],
    scale: Scale,
) -> Float[Tensor, " held"]:
    """Return scores that can be compared between layers; the order within a layer stays.

    ``calibrated`` leaves them. ``mass`` divides by the layer's sum over unprotected pairs: a score becomes a share of
    what its layer has to give away. ``signed`` takes the z-score over the layer's unprotected pairs.

    Args:
        scores: Importance, larger means keep.
        protected: True where a pair stays anyway: sinks would otherwise deflate their whole layer.
        layers: The layer (of a batch row) that each pair belongs to.
        scale: One of the three.
    """
    if scale == "calibrated":
        return scores
    num_layers = int(layers.max()) + 1 if len(layers) else 0
    left_out = protected | ~scores.isfinite()  # an infinite score keeps its place and does not make its layer NaN

    def total(values: Float[Tensor, " held"]) -> Float[Tensor, " layers"]:
        return values.new_zeros(num_layers).index_add_(0, layers, values.masked_fill(left_out, 0.0))

    tiny = torch.finfo(scores.dtype).tiny
    if scale == "mass":
        return scores / total(scores).clamp_min(tiny)[layers]
    count = total(torch.ones_like(scores)).clamp_min(1)
    centred = scores - (total(scores) / count)[layers]
    deviation = (total(centred.square()) / count).sqrt().clamp_min(tiny)
    return centred / deviation[layers]


def refuse_nan(scores: Float[Tensor, " held"], grid: RowIndex) -> None:
    """Raise a PolicyError that names the first layer with a score that is not a number."""
    bad = torch.isnan(scores)
    if bool(bad.any()):
        layer = int(grid.layer[grid.row[bad.nonzero()[0, 0]]])
        raise PolicyError(f"{int(bad.sum())} scores are NaN, the first in layer {layer}; nothing was evicted")


def _protected_per(
    groups: Int[Tensor, " held"], protected: Bool[Tensor, " held"], num_groups: int
) -> Int[Tensor, " groups"]:
    return torch.zeros(num_groups, dtype=torch.long, device=groups.device).index_add_(0, groups, protected.long())
