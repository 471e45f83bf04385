"""Shift, then run those later tokens through the model again whose keys changed most."""

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

    How much a token changed is the squared distance of its key in the second evictable layer, computed anew for all
    that follows, from the one held; a pair that was evicted did not change.

    Source: CacheBlend, arXiv 2405.16444. Differs: one selection serves all layers, where the paper may narrow it layer
    by layer.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.DROPPED
    renumbers: ClassVar[bool] = True
    share: float = 0.15
    """Of the tokens behind the first span, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InputError(f"share must lie in (0, 1], got {self.share!r}")

    def edit(self, scene: EraseRequest) -> EditResult:
        """Edit a fork, which takes the place of the cache once it is whole."""
        twin = scene.cache.fork()
        closing = edits.close(twin, scene.spans)
        suffix = torch.arange(closing.at(scene.spans[0].start), min(twin.seen))
        count = math.ceil(self.share * len(suffix))
        if count:
            at = suffix[_changes(scene, twin, suffix).topk(count).indices.cpu().sort().values]
            write(twin, at, rerun(twin, at))
        scene.cache.replace_with(twin)
        return EditResult(recomputed=len(suffix), suffix_recomputed=count)


def _changes(scene: EraseRequest, cache: KVCache, at: Tensor) -> Tensor:
    """Return how far each token's keys in the probed layer are from those held, summed over rows."""
    layer = cache.evictable[min(1, len(cache.evictable) - 1)]
    fresh = rerun(cache, at, until=layer.layer_idx)[layer.layer_idx].keys
    slots, source = find_slots(layer, at.to(layer.device))
    flat = fresh.reshape(-1, fresh.shape[-1])
    far = (layer.columns["keys"][slots].float() - flat[source].float()).square().sum(-1)
    return torch.zeros(len(at), device=far.device).index_add_(0, source % len(at), far)
