"""Ways to take a span out of a live cache, one file each, named in one dict.

``ERASERS`` names classes rather than holding them, so that listing is cheap; an own eraser need not be registered: pass
the object to ``vestige.erase``.
"""

from typing import Any

from vestige.erasers.base import Eraser
from vestige.errors import InputError
from vestige.utils import options as called
from vestige.utils import registry

ERASERS: dict[str, str] = {
    "blend": "vestige.erasers.blend:Blend",
    "drop": "vestige.erasers.drop:Drop",
    "erratum": "vestige.erasers.erratum:Erratum",
    "learned": "vestige.erasers.learned:Learned",
    "noop": "vestige.erasers.noop:Noop",
    "recompute": "vestige.erasers.recompute:Recompute",
    "repair": "vestige.erasers.repair:Repair",
    "shift": "vestige.erasers.shift:Shift",
}

_CLASSES = registry.members(ERASERS.values())
__all__ = ["ERASERS", "make", "name_of", "resolve", *sorted(_CLASSES)]  # pyright: ignore[reportUnsupportedDunderAll]


def resolve(name: str) -> type[Eraser]:
    """Return the class of a named eraser.

    Raises:
        InputError: No such name; the message gives the nearest and all valid ones.
    """
    found: type[Eraser] = registry.resolve(name, ERASERS, "eraser", InputError)
    return found


def make(name: str) -> Eraser:
    """Return a named eraser, as the command line makes it.

    Args:
        name: A key of ``ERASERS``, with options if wanted: ``"repair(share=0.3)"``.

    Raises:
        InputError: An unknown name or option, or a value out of range.
    """
    name, options = called.parse_options(name, "eraser", InputError)
    cls = resolve(name)
    return cls(**called.coerce_options(options, cls, name, "eraser", InputError))


def name_of(eraser: Eraser) -> str:
    """Return the name under which an eraser is listed, or its class name."""
    return registry.name_of(eraser, ERASERS)


def __getattr__(name: str) -> Any:
    return registry.member(name, _CLASSES, __name__)
