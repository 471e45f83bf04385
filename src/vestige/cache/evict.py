"""One eviction: show every layer to the policy, select once over all of them, compact each.

Nothing is changed before the selection stands, so a broken score or an impossible budget leaves the cache as it was.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vestige.budget import UNLIMITED
from vestige.cache.layer import RaggedLayer
from vestige.errors import PolicyError
from vestige.kernels import packed
from vestige.memory.base import AbsorbedRanges
from vestige.policies.base import AllocatesRows, Policy, ResetsStatistics
from vestige.policies.observation import Observation, Phase
from vestige.policies.selection import RowIndex, apportion, protected_per_row, select
from vestige.spans import Span, within


def evict(
    layers: Sequence[RaggedLayer],
    policy: Policy,
    pair_limits: Sequence[int],
    seen: tuple[int, ...],
    pins: Sequence[Span],
    phase: Phase,
    coming: int = 0,
    absorbed: AbsorbedRanges | None = None,
) -> tuple[int, ...]:
    """Bring every batch row that holds too much down to its pair_limits; return the batch rows of which pairs went.

    Args:
        layers: The evictable layers; changed in place.
        policy: Scores and protects.
        pair_limits: Average pairs per row that each batch row may hold.
        seen: Tokens of each batch row.
        pins: Spans that no policy may evict.
        phase: What the policy is told.
        coming: Tokens that are about to be stored; with 0 no row keeps a free slot.
        absorbed: Where to note which positions the cache's memory took in, if it has one.

    Raises:
        PolicyError: Scores are NaN or of a wrong shape, or the policy needs what was not recorded.
        BudgetError: The protected pairs do not fit.
    """
    live = [layer.live_slots() for layer in layers]
    index = _index_rows(layers, [lengths for _, lengths in live])
    limits = torch.tensor([min(n, UNLIMITED) for n in pair_limits], device=index.lengths.device)
    rows = sum(layer.kv_heads for layer in layers)
    over = _count_held(index, len(pair_limits)) > limits * rows
    candidates = over if policy.threshold is None else torch.ones_like(over)
    if not bool(candidates.any()):
        return ()
    parts, positions = dict[int, Tensor](), []
    for layer, (slots, lengths) in zip(layers, live, strict=True):
        observation = layer.observe(phase, seen, limits.tolist(), slots, lengths)
        parts[layer.layer_idx] = _score(policy, replace(observation, earlier=parts))
        positions.append(observation.positions)
    scores, at = torch.cat(list(parts.values())), torch.cat(positions)
    protected = _find_protected(policy, pins, at, seen, limits, index) | ~candidates[index.batch][index.row]
    row_limits = torch.where(over, limits, UNLIMITED)
    kept = select(
        scores,
        at,
        protected,
        index,
        row_limits,
        share=policy.share,
        scale=policy.scale,
        floor=policy.floor,
        counts=_allocate(policy, scores, protected, index, row_limits, rows),
        threshold=policy.threshold,
    )
    if bool(kept.all()):
        return ()
    masks = kept.split([len(slots) for slots, _ in live])
    if absorbed is not None:
        _absorb(layers, live, masks)
        for b in range(len(pair_limits)):
            absorbed.add(b, at[~kept & (index.batch == b)[index.row]], seen[b])
    for layer, (slots, lengths), mask in zip(layers, live, masks, strict=True):
        layer.keep(slots[mask], packed.counts_per_row(mask, lengths), coming)
    return tuple(index.batch[index.row][~kept].unique().tolist())


def reset_statistics(layers: Sequence[RaggedLayer], policy: Policy, batch_rows: Sequence[int]) -> None:
    """Let the policy reset the statistics that it keeps beside the pairs of these batch rows, if it wants to."""
    if not isinstance(policy, ResetsStatistics):
        return
    for layer in layers:
        for row in (b * layer.kv_heads + head for b in batch_rows for head in range(layer.kv_heads)):
            policy.renew(layer.annotations(row))


def _absorb(layers: Sequence[RaggedLayer], live: Sequence[tuple[Tensor, list[int]]], masks: Sequence[Tensor]) -> None:
    """Hand the pairs that go to the memory of each layer: to all of them, or to none if one fails."""
    remains = [
        layer.absorb_evicted(slots[~mask], packed.counts_per_row(~mask, lengths))
        for layer, (slots, lengths), mask in zip(layers, live, masks, strict=True)
    ]
    for layer, left in zip(layers, remains, strict=True):
        layer.remains = left


def _score(policy: Policy, seen: Observation) -> Float[Tensor, " held"]:
    name = type(policy).__name__
    if "queries" in policy.needs and not seen.queries:
        raise PolicyError(f"policy {name} needs queries, but none were recorded while this cache was filled")
    with torch.no_grad():
        scores = policy.score(seen)
    if scores.shape != seen.positions.shape:
        raise PolicyError(f"policy {name} gave scores {tuple(scores.shape)} for {len(seen.positions)} pairs")
    return scores.float()


def _allocate(
    policy: Policy, scores: Tensor, protected: Tensor, index: RowIndex, pair_limits: Int[Tensor, " batch"], rows: int
) -> Int[Tensor, " rows"] | None:
    """Return how many pairs each row keeps, if the policy says so."""
    if not isinstance(policy, AllocatesRows):
        return None
    wanted = policy.allot(scores, index, pair_limits)
    return apportion(wanted, protected_per_row(protected, index), index.lengths, index.batch, pair_limits * rows)


def _index_rows(layers: Sequence[RaggedLayer], lengths: Sequence[list[int]]) -> RowIndex:
    layer = [one.layer_idx for one, rows in zip(layers, lengths, strict=True) for _ in rows]
    batch = [row // one.kv_heads for one, rows in zip(layers, lengths, strict=True) for row in range(len(rows))]
    flat = [n for rows in lengths for n in rows]
    return RowIndex(*(torch.tensor(x, device=layers[0].device) for x in (flat, layer, batch)))


def _count_held(index: RowIndex, batch: int) -> Int[Tensor, " batch"]:
    held = torch.zeros(batch, dtype=torch.long, device=index.lengths.device)
    return held.index_add_(0, index.batch, index.lengths)


def _find_protected(
    policy: Policy, pins: Sequence[Span], positions: Tensor, seen: tuple[int, ...], limits: Tensor, index: RowIndex
) -> Bool[Tensor, " held"]:
    """Return which pairs no policy may evict: sink, window, pins."""
    sinks, windows = zip(*map(policy.protected_ends, limits.tolist()), strict=True)
    begins = [end - window for end, window in zip(seen, windows, strict=True)]
    first, last = (torch.tensor(x, device=positions.device)[index.batch][index.row] for x in (sinks, begins))
    return (positions < first) | (positions >= last) | within(positions, pins)
