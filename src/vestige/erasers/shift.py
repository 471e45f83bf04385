"""Free the pairs of the span and move what follows up, turning its keys to where they then are."""

from dataclasses import dataclass
from typing import ClassVar

from vestige.cache import edits
from vestige.erasers.base import EditResult, Eraser, EraseRequest, SlotOutcome


@dataclass(frozen=True, kw_only=True)
class Shift(Eraser):
    """Take the span out of the sequence without running the model: exact in the first layer, not in those above.

    Keys of what follows are turned by RoPE to their new positions, in float32; values are untouched, and carry what
    they read of the span. What llama.cpp's cache reuse does.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.DROPPED
    renumbers: ClassVar[bool] = True

    def edit(self, scene: EraseRequest) -> EditResult:
        """Close the cache over the spans."""
        edits.close(scene.cache, scene.spans)
        return EditResult()
