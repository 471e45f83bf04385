"""Shift, then run a share of what follows through the model again: at the cut, or at the end."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vestige.cache import edits
from vestige.cache.overlay import rerun, write
from vestige.erasers.base import EditResult, Eraser, EraseRequest, SlotOutcome
from vestige.errors import InputError

Where = Literal["cut", "end"]


@dataclass(frozen=True, kw_only=True)
class Repair(Eraser):
    """Close the cache over the span and compute the pairs of some later tokens anew; the others stay contaminated.

    Source: after EPIC, arXiv 2410.15332, which computes the first tokens of reused pieces anew; as a baseline of
    KVEraser, arXiv 2606.17034, a share of .15 "erase" (at the cut) or "query" (at the end). With several spans the
    share of what lies between one and the next is run at its own cut.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.DROPPED
    renumbers: ClassVar[bool] = True
    share: float = 0.15
    """Of the tokens behind the span, in (0, 1]."""
    where: Where = "cut"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1 or self.where not in ("cut", "end"):
            raise InputError(
                f"share must lie in (0, 1] and where be 'cut' or 'end', got share={self.share!r}, where={self.where!r}"
            )

    def edit(self, scene: EraseRequest) -> EditResult:
        """Edit a fork, which takes the place of the cache once it is whole."""
        twin = scene.cache.fork()
        closing = edits.close(twin, scene.spans)
        end, pieces = min(twin.seen), []
        cuts = [closing.at(span.start) for span in scene.spans]
        for cut, until in zip(cuts, [*cuts[1:], end], strict=True):
            count = math.ceil(self.share * (until - cut))
            pieces.append(torch.arange(cut, cut + count) if self.where == "cut" else torch.arange(until - count, until))
        at = torch.cat(pieces)
        if len(at):
            write(twin, at, rerun(twin, at))
        scene.cache.replace_with(twin)
        return EditResult(recomputed=len(at), suffix_recomputed=len(at))
