"""Blend: shift, then recompute the later tokens whose keys changed most."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vestige.cache import edits
from vestige.cache.kv_cache import KVCache
from vestige.cache.overlay import find_slots, rerun, write
from vestige.erasers.base import EditResult, Eraser, EraseRequest, SlotOutcome
from vestige.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Blend(Eraser):
    """Close the cache over the span and compute the pairs of the most changed later tokens anew.

    The change of a token is the squared distance between its held and its recomputed key in the second evictable layer,
    which is computed for all later tokens; an evicted pair has no change.

    Source: CacheBlend, arXiv 2405.16444. Differs: one selection serves all layers, where the paper may narrow it layer
    by layer.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.DROPPED
    renumbers: ClassVar[bool] = True
    share: float = 0.15
    """Share of the tokens after the first span that is recomputed, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share must lie in (0, 1], got {self.share!r}")

    def edit(self, request: EraseRequest) -> EditResult:
        """Edit a fork, which replaces the cache at the end."""
        copy = request.cache.fork()
        position_map = edits.close(copy, request.spans)
        suffix = torch.arange(position_map.at(request.spans[0].start), min(copy.seen))
        count = math.ceil(self.share * len(suffix))
        if count:
            at = suffix[_measure_changes(request, copy, suffix).topk(count).indices.cpu().sort().values]
            write(copy, at, rerun(copy, at))
        request.cache.replace_with(copy)
        return EditResult(recomputed=len(suffix), suffix_recomputed=count)


def _measure_changes(request: EraseRequest, cache: KVCache, at: Tensor) -> Tensor:
    """Return the squared distance of each token's held and recomputed keys in the probed layer, summed over rows."""
    layer = cache.evictable[min(1, len(cache.evictable) - 1)]
    fresh = rerun(cache, at, until=layer.layer_idx)[layer.layer_idx].keys
    slots, source = find_slots(layer, at.to(layer.device))
    flat = fresh.reshape(-1, fresh.shape[-1])
    far = (layer.columns["keys"][slots].float() - flat[source].float()).square().sum(-1)
    return torch.zeros(len(at), device=far.device).index_add_(0, source % len(at), far)
