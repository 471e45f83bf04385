"""Shift: free the pairs of the span and move later pairs up, with their keys rotated to the new positions."""

from dataclasses import dataclass
from typing import ClassVar

from vestige.cache import edits
from vestige.erasers.base import EditResult, Eraser, EraseRequest, SlotOutcome


@dataclass(frozen=True, kw_only=True)
class Shift(Eraser):
    """Take the span out of the sequence without running the model: exact in the first layer, not in those above.

    RoPE rotates later keys to their new positions, in float32; values are untouched and carry what they read of the
    span. llama.cpp's cache reuse does the same.
    """

    fate: ClassVar[SlotOutcome] = SlotOutcome.DROPPED
    renumbers: ClassVar[bool] = True

    def edit(self, request: EraseRequest) -> EditResult:
        """Close the cache over the spans."""
        edits.close(request.cache, request.spans)
        return EditResult()
