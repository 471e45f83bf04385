"""Classes that have a short name: listed as ``module:Class``, imported when they are first used."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from vestige.errors import VestigeError, unknown_name_message

Paths = Mapping[str, str | None]
"""``module:Class`` by name; None names nothing."""


def resolve(name: str, paths: Paths, kind: str, error: type[VestigeError]) -> Any:
    """Return the class behind a name, or None if the name stands for nothing.

    Raises:
        VestigeError: No such name (the error that was given); the message gives the nearest and all valid ones.
    """
    if name not in paths:
        raise error(unknown_name_message(kind, name, paths))
    path = paths[name]
    return path and load(path)


def name_of(made: object, paths: Paths) -> str:
    """Return the name under which an object's class is listed, or the class's own."""
    home = f"{type(made).__module__}:{type(made).__name__}"
    return next((name for name, path in paths.items() if path == home), type(made).__name__)


def members(paths: Iterable[str | None]) -> dict[str, str]:
    """Return the paths by what they end in: what a package that lists them offers as attributes."""
    return {path.partition(":")[2]: path for path in paths if path}


def member(name: str, offered: Mapping[str, str], package: str) -> Any:
    """Return an attribute of a package, for its ``__getattr__``."""
    if name not in offered:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return load(offered[name])


def load(path: str) -> Any:
    """Return what ``module:Name`` names."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
