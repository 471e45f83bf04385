"""Change nothing: the lower bound that erasers are compared with."""

from dataclasses import dataclass
from typing import ClassVar

from vestige.erasers.base import EditResult, Eraser, EraseRequest, SlotOutcome


@dataclass(frozen=True, kw_only=True)
class Noop(Eraser):
    """Leave the cache as it is."""

    fate: ClassVar[SlotOutcome] = SlotOutcome.LEFT

    def edit(self, scene: EraseRequest) -> EditResult:
        """Do nothing, and say how little the memory is free of the spans."""
        return EditResult(memory=scene.memory)
