"""Registries: classes with a short name, listed as ``module:Class`` and imported on first use."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

from vestige.errors import VestigeError, unknown_name_message
from vestige.utils.options import coerce_options, parse_options

Class = TypeVar("Class")
"""Type of a resolved name: ``type[Policy]``, or ``type[Memory] | None`` where a name may have no class."""
Made = TypeVar("Made")
"""Type of the objects: ``Policy``, or ``Memory | None``."""


class Registry(Generic[Class, Made]):
    """Named classes of one kind, whose package offers them as attributes; listing the names imports nothing.

    Args:
        kind: Kind of the classes in messages, such as "policy".
        paths: ``module:Class`` by name; None for a name without a class.
        error: Exception for an unknown name or an option that does not fit.
        package: Name of the package that offers the classes.
        unnamed: Further ``module:name`` paths that the package offers, which have no short name.
    """

    def __init__(
        self,
        kind: str,
        paths: Mapping[str, str | None],
        error: type[VestigeError],
        package: str,
        *,
        unnamed: Iterable[str] = (),
    ) -> None:
        self.kind, self.paths, self.error, self.package = kind, paths, error, package
        self.members = {path.partition(":")[2]: path for path in (*paths.values(), *unnamed) if path}
        """Path of each attribute of the package."""

    def resolve(self, name: str) -> Class:
        """Return the class of a name; None for a name without a class.

        Raises:
            VestigeError: An unknown name, raised as the registry's error; the message gives the nearest and all valid
                names.
        """
        if name not in self.paths:
            raise self.error(unknown_name_message(self.kind, name, self.paths))
        path = self.paths[name]
        found: Class = path and load(path)  # type: ignore[assignment]  # None is part of Class where a path is None
        return found

    def parse(self, text: str, *, given: tuple[str, ...] = ()) -> tuple[str, Class, dict[str, Any]]:
        """Return the name, the class and the options of a text such as ``"snapkv(kernel=7)"``.

        Fields of the class that are ``given`` cannot be options: the caller sets them.

        Raises:
            VestigeError: An unknown name or option, or a value of another type, raised as the registry's error.
        """
        name, options = parse_options(text, self.kind, self.error)
        cls = self.resolve(name)
        if cls is None and options:
            raise self.error(f"{self.kind} {name!r} takes no options, got {', '.join(options)}")
        return name, cls, coerce_options(options, cls, name, self.kind, self.error, taken=given) if options else {}

    def make(self, text: str) -> Made:
        """Return a new object for a text such as ``"moments(mass=4, dtype=float32)"``; None for a name without a class.

        Raises:
            VestigeError: An unknown name or option, or a value out of range.
        """
        _, cls, options = self.parse(text)
        made: Made = cls(**options) if callable(cls) else None  # type: ignore[assignment]
        return made

    def name_of(self, made: Made) -> str:
        """Return the short name of an object's class, or the name of the class itself if it has none."""
        home = None if made is None else f"{type(made).__module__}:{type(made).__name__}"
        return next((name for name, path in self.paths.items() if path == home), type(made).__name__)

    def attribute(self, name: str) -> Any:
        """Return a class by its own name: the ``__getattr__`` of the package."""
        if name not in self.members:
            raise AttributeError(f"module {self.package!r} has no attribute {name!r}")
        return load(self.members[name])


def load(path: str) -> Any:
    """Import the object of a ``module:name`` path."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
