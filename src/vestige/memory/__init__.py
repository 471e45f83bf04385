"""Memories of evicted pairs: one file each, and a dict of their names.

``MEMORIES`` holds paths of classes instead of classes, so that listing is cheap. A memory of your own need not be
registered: pass the object to ``KVCache(model, policy, memory=...)``.
"""

from vestige.errors import PolicyError
from vestige.memory.base import Memory
from vestige.utils.registry import Registry

MEMORIES: dict[str, str | None] = {
    "none": None,
    "centroids": "vestige.memory.centroids:Centroids",
    "linear": "vestige.memory.linear:Linear",
    "moments": "vestige.memory.moments:Moments",
    "slots": "vestige.memory.slots:Slots",
}

_REGISTRY = Registry[type[Memory] | None, Memory | None]("memory", MEMORIES, PolicyError, __name__)
resolve, make, name_of, __getattr__ = _REGISTRY.resolve, _REGISTRY.make, _REGISTRY.name_of, _REGISTRY.attribute
__all__ = ["MEMORIES", "make", "name_of", "resolve", *sorted(_REGISTRY.members)]  # pyright: ignore[reportUnsupportedDunderAll]
