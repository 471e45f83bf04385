"""Arithmetic on packed tensors: rows of different lengths laid out one after another in one flat buffer.

Row r owns the slots ``[starts[r], starts[r] + lengths[r])``; the slots from there to ``starts[r + 1]`` are slack.
*Packed* means without slack: row r is ``[cu_seqlens[r], cu_seqlens[r + 1])``. Every change of a layout (growth,
eviction, reordering) is one gather by :func:`layout_index`, so nothing is copied twice.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

PAIR = ("keys", "values", "positions")
"""Columns that every layer has; further columns are side arrays."""


def cumulative(lengths: Sequence[int]) -> list[int]:
    """Return ``[0, l0, l0 + l1, ...]``: the start of each packed row, and the total last."""
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return ends


def row_ids(lengths: Sequence[int], device: torch.device | str = "cpu") -> Int[Tensor, " held"]:
    """Return the row that each packed pair belongs to."""
    return torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, dtype=torch.long, device=device)
    )


def packed_slots(
    starts: Sequence[int], lengths: Sequence[int], device: torch.device | str = "cpu"
) -> Int[Tensor, " held"]:
    """Return the slot of each packed pair, row by row in time order."""
    rows = row_ids(lengths, device)
    shift = torch.tensor(starts, dtype=torch.long) - torch.tensor(cumulative(lengths)[:-1], dtype=torch.long)
    return torch.arange(len(rows), device=device) + shift.to(device)[rows]


def counts_per_row(kept: Bool[Tensor, " held"], lengths: Sequence[int]) -> list[int]:
    """Return the number of marked pairs in each row."""
    totals = torch.zeros(len(lengths), dtype=torch.long, device=kept.device)
    return totals.index_add_(0, row_ids(lengths, kept.device), kept.long()).tolist()


def layout_index(
    source: Int[Tensor, " held"], lengths: Sequence[int], capacities: Sequence[int]
) -> Int[Tensor, " slots"]:
    """Return the gather index of a new flat buffer: row r takes its next ``lengths[r]`` sources, then slack.

    Args:
        source: Old slots, packed in the order of the new rows.
        lengths: Pairs of each new row; they add up to ``len(source)``.
        capacities: Slots of each new row, ``capacities[r] >= lengths[r]``. Slack slots point at old slot 0, because
            their content is never read.
    """
    index = torch.zeros(sum(capacities), dtype=torch.long, device=source.device)
    index[packed_slots(cumulative(capacities)[:-1], lengths, source.device)] = source
    return index


def gather(column: Shaped[Tensor, "slots *rest"], index: Int[Tensor, " gathered"]) -> Shaped[Tensor, "gathered *rest"]:
    """Return slots of a column by index; a column without any pair gives a buffer of zeros of that length."""
    if column.shape[0] == 0:
        return column.new_zeros(len(index), *column.shape[1:])
    return column.index_select(0, index)


def append(
    column: Shaped[Tensor, "slots *rest"], slots: Int[Tensor, " new"], new: Shaped[Tensor, "new *rest"]
) -> Shaped[Tensor, "slots *rest"]:
    """Write new pairs at their slots and return the column: in place, or a copy where autograd needs the old one."""
    if torch.is_grad_enabled() and (new.requires_grad or column.requires_grad):
        return column.index_copy(0, slots, new)
    return column.index_copy_(0, slots, new)
