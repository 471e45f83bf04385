"""Change nothing: the lower bound that erasers are compared with."""

from dataclasses import dataclass
from typing import ClassVar

from vestige.erasers.base import Edit, Eraser, Fate, Scene


@dataclass(frozen=True, kw_only=True)
class Noop(Eraser):
    """Leave the cache as it is."""

    fate: ClassVar[Fate] = Fate.LEFT

    def edit(self, scene: Scene) -> Edit:
        """Do nothing, and say how little the memory is free of the spans."""
        return Edit(memory=scene.memory)
