"""Noop: change nothing, the lower bound for erasers."""

from dataclasses import dataclass
from typing import ClassVar

from vestige.erasers.base import EditResult, Eraser, EraseRequest, SlotOutcome


@dataclass(frozen=True, kw_only=True)
class Noop(Eraser):
    """Leave the cache as it is."""

    fate: ClassVar[SlotOutcome] = SlotOutcome.LEFT

    def edit(self, request: EraseRequest) -> EditResult:
        """Change nothing and report the memory's state."""
        return EditResult(memory=request.memory)
