"""Free the pairs of the span; everything else stays where it is."""

from dataclasses import dataclass
from typing import ClassVar

from vestige import editing
from vestige.eraser import Edit, Eraser, Fate, Scene


@dataclass(frozen=True, kw_only=True)
class Drop(Eraser):
    """Free the span's pairs and leave a gap in the positions: what masking the span would do, with memory freed.

    What follows the span keeps what it read of it.
    """

    fate: ClassVar[Fate] = Fate.DROPPED

    def edit(self, scene: Scene) -> Edit:
        """Drop the pairs of the spans."""
        editing.drop(scene.cache, scene.spans)
        return Edit(memory=scene.memory)
