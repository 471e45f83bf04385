"""Free the pairs of the span; everything else stays where it is."""

from dataclasses import dataclass
from typing import ClassVar

from vestige.cache import edits
from vestige.erasers.base import EditResult, Eraser, EraseRequest, SlotOutcome
from vestige.erasers.forget import MemoryRelease


@dataclass(frozen=True, kw_only=True)
class Drop(Eraser):
    """Free the span's pairs and leave a gap in the positions: what masking the span would do, with memory freed.

    What follows the span keeps what it read of it.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.DROPPED

    forget: bool = False
    """Also take the spans' evicted pairs out of a memory that is a sum, by reading up to their end once more."""

    def edit(self, scene: EraseRequest) -> EditResult:
        """Drop the pairs of the spans."""
        release = MemoryRelease.of(scene.cache, scene.spans, scene.model, wanted=self.forget)
        edits.drop(scene.cache, scene.spans)
        release.carry_out()
        return EditResult(recomputed=release.read, memory=release.outcome)
