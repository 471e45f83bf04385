"""One eviction: score every layer, select once over all of them, compact each.

Nothing changes before the selection is complete, so an invalid score or an impossible budget leaves the cache intact.
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
from vestige.policies.selection import RowIndex, apportion, count_protected, select
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
    """Evict pairs of every batch row that exceeds its limit; return the batch rows that lost pairs.

    Args:
        layers: The evictable layers; changed in place.
        policy: Scores and protects pairs.
        pair_limits: Average pairs per row that each batch row may hold.
        seen: Tokens of each batch row.
        pins: Spans that no policy may evict.
        phase: Phase passed to the policy.
        coming: Tokens about to be stored; with 0 no row keeps a free slot.
        absorbed: Records the positions that the cache's memory absorbs; None without a memory.

    Raises:
        PolicyError: Scores are NaN or of a wrong shape, or the policy needs a statistic that was not recorded.
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
    layer_scores: dict[int, Tensor] = {}
    layer_positions = []
    for layer, (slots, lengths) in zip(layers, live, strict=True):
        obs = layer.observe(phase, seen, limits.tolist(), slots, lengths)
        layer_scores[layer.layer_idx] = _score(policy, replace(obs, earlier=layer_scores))
        layer_positions.append(obs.positions)
    scores = torch.cat(list(layer_scores.values()))
    positions = torch.cat(layer_positions)
    protected = _find_protected(policy, pins, positions, seen, limits, index) | ~candidates[index.batch][index.row]
    row_limits = torch.where(over, limits, UNLIMITED)
    kept = select(
        scores,
        positions,
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
            absorbed.add(b, positions[~kept & (index.batch == b)[index.row]], seen[b])
    for layer, (slots, lengths), mask in zip(layers, live, masks, strict=True):
        layer.keep(slots[mask], packed.counts_per_row(mask, lengths), coming)
    return tuple(index.batch[index.row][~kept].unique().tolist())


def reset_statistics(layers: Sequence[RaggedLayer], policy: Policy, batch_rows: Sequence[int]) -> None:
    """Let the policy reset the statistics that it keeps with the pairs of these batch rows."""
    if not isinstance(policy, ResetsStatistics):
        return
    for layer in layers:
        for row in (b * layer.kv_heads + head for b in batch_rows for head in range(layer.kv_heads)):
            policy.renew(layer.annotations(row))


def _absorb(layers: Sequence[RaggedLayer], live: Sequence[tuple[Tensor, list[int]]], masks: Sequence[Tensor]) -> None:
    """Let the memory of each layer absorb its evicted pairs; if one fails, none changes."""
    memories = [
        layer.absorb_evicted(slots[~mask], packed.counts_per_row(~mask, lengths))
        for layer, (slots, lengths), mask in zip(layers, live, masks, strict=True)
    ]
    for layer, memory in zip(layers, memories, strict=True):
        layer.remains = memory


def _score(policy: Policy, obs: Observation) -> Float[Tensor, " held"]:
    name = type(policy).__name__
    if "queries" in policy.needs and not obs.queries:
        raise PolicyError(f"policy {name} needs queries, but none were recorded while this cache was filled")
    with torch.no_grad():
        scores = policy.score(obs)
    if scores.shape != obs.positions.shape:
        raise PolicyError(f"policy {name} gave scores {tuple(scores.shape)} for {len(obs.positions)} pairs")
    return scores.float()


def _allocate(
    policy: Policy, scores: Tensor, protected: Tensor, index: RowIndex, pair_limits: Int[Tensor, " batch"], rows: int
) -> Int[Tensor, " rows"] | None:
    """Return the number of pairs that each row keeps, or None if the policy does not allocate rows."""
    if not isinstance(policy, AllocatesRows):
        return None
    wanted = policy.allot(scores, index, pair_limits)
    return apportion(wanted, count_protected(protected, index), index.lengths, index.batch, pair_limits * rows)


def _index_rows(layers: Sequence[RaggedLayer], lengths: Sequence[list[int]]) -> RowIndex:
    rows = [
        (n, layer.layer_idx, row // layer.kv_heads)
        for layer, row_lengths in zip(layers, lengths, strict=True)
        for row, n in enumerate(row_lengths)
    ]
    return RowIndex(*(torch.tensor(x, device=layers[0].device) for x in zip(*rows, strict=True)))


def _count_held(index: RowIndex, batch: int) -> Int[Tensor, " batch"]:
    held = torch.zeros(batch, dtype=torch.long, device=index.lengths.device)
    return held.index_add_(0, index.batch, index.lengths)


def _find_protected(
    policy: Policy, pins: Sequence[Span], positions: Tensor, seen: tuple[int, ...], limits: Tensor, index: RowIndex
) -> Bool[Tensor, " held"]:
    """Return True for pairs that no policy may evict: sink, window, pins."""
    sinks, windows = zip(*map(policy.protected_ends, limits.tolist()), strict=True)
    begins = [end - window for end, window in zip(seen, windows, strict=True)]
    first, last = (torch.tensor(x, device=positions.device)[index.batch][index.row] for x in (sinks, begins))
    return (positions < first) | (positions >= last) | within(positions, pins)
