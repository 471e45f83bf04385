"""Erasers: ways to take a span out of a live cache, one file each, and a dict of their names.

``ERASERS`` holds paths of classes instead of classes, so that listing is cheap. An eraser of your own need not be
registered: pass the object to ``vestige.erase``.
"""

from vestige.erasers.base import Eraser
from vestige.errors import InputError
from vestige.utils.registry import Registry

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

_REGISTRY = Registry[type[Eraser], Eraser]("eraser", ERASERS, InputError, __name__)
resolve, make, name_of, __getattr__ = _REGISTRY.resolve, _REGISTRY.make, _REGISTRY.name_of, _REGISTRY.attribute
__all__ = ["ERASERS", "make", "name_of", "resolve", *sorted(_REGISTRY.members)]  # pyright: ignore[reportUnsupportedDunderAll]
