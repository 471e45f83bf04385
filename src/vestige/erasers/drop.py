"""Drop: free the pairs of the span and change nothing else."""

from dataclasses import dataclass
from typing import ClassVar

from vestige.cache import edits
from vestige.erasers.base import EditResult, Eraser, EraseRequest, SlotOutcome
from vestige.erasers.forget import MemoryRelease


@dataclass(frozen=True, kw_only=True)
class Drop(Eraser):
    """Free the span's pairs and leave a gap in the positions: what masking the span would do, with memory freed.

    Later pairs keep what they read of the span.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.DROPPED

    forget: bool = False
    """Also release the spans' evicted pairs from a memory that is a sum; reads the text up to their end again."""

    def edit(self, request: EraseRequest) -> EditResult:
        """Drop the pairs of the spans."""
        release = MemoryRelease.of(request.cache, request.spans, request.model, wanted=self.forget)
        edits.drop(request.cache, request.spans)
        release.carry_out()
        return EditResult(recomputed=release.read, memory=release.outcome)
