"""What can remain of the evicted, one file each, named in one dict.

``MEMORIES`` names classes rather than holding them, so that listing is cheap; an own memory need not be registered:
pass the object to ``KVCache(model, policy, memory=...)``.
"""

from typing import Any

from vestige.errors import PolicyError
from vestige.memory.base import Memory
from vestige.utils import options as called
from vestige.utils import registry

MEMORIES: dict[str, str | None] = {
    "none": None,
    "centroids": "vestige.memory.centroids:Centroids",
    "linear": "vestige.memory.linear:Linear",
    "moments": "vestige.memory.moments:Moments",
    "slots": "vestige.memory.slots:Slots",
}

_CLASSES = registry.members(MEMORIES.values())
__all__ = ["MEMORIES", "make", "name_of", "resolve", *sorted(_CLASSES)]  # pyright: ignore[reportUnsupportedDunderAll]


def resolve(name: str) -> type[Memory] | None:
    """Return the class of a named memory; None for "none".

    Raises:
        PolicyError: No such name; the message gives the nearest and all valid ones.
    """
    found: type[Memory] | None = registry.resolve(name, MEMORIES, "memory", PolicyError)
    return found


def make(name: str) -> Memory | None:
    """Return a named memory, as the command line makes it; None for "none".

    Args:
        name: A key of ``MEMORIES``, with options if wanted: ``"moments(mass=4, dtype=float32)"``.

    Raises:
        PolicyError: An unknown name or option, or a value out of range.
    """
    name, options = called.parse_options(name, "memory", PolicyError)
    cls = resolve(name)
    if cls is None and options:
        raise PolicyError(f"memory {name!r} takes no options, got {', '.join(options)}")
    return None if cls is None else cls(**called.coerce_options(options, cls, name, "memory", PolicyError))


def name_of(memory: Memory | None) -> str:
    """Return the name under which a memory is listed, or its class name."""
    return "none" if memory is None else registry.name_of(memory, MEMORIES)


def __getattr__(name: str) -> Any:
    return registry.member(name, _CLASSES, __name__)
