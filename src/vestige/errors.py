"""The errors that vestige raises on purpose.

VestigeError
├── InputError        a file, text or option that cannot be used
├── ModelError        a model that cannot be found, loaded or served
├── BudgetError       a budget that cannot be met, with both numbers
├── PolicyError       an unknown policy, a score that is not a number, a need that was not observed
└── CacheError        a cache that is not attached, does not fit its input, or broke midway
    └── CacheFileError    a saved cache that is missing, damaged, or made for another model

The command line prints any of them as one line and exits with 2.
"""

import difflib
from collections.abc import Iterable


class VestigeError(Exception):
    """Base of all errors below: catch it to catch them all."""


class InputError(VestigeError, ValueError):
    """A file, text or option that cannot be used."""


class ModelError(VestigeError):
    """A model that cannot be found, loaded or served."""


class BudgetError(VestigeError, ValueError):
    """A budget that cannot be met."""


class PolicyError(VestigeError, ValueError):
    """An unknown policy, a broken score, or a need that was not observed."""


class CacheError(VestigeError, RuntimeError):
    """A cache that is not attached, does not fit its input, or broke midway."""


class CacheFileError(CacheError):
    """A saved cache that is missing, damaged, or made for another model."""


def unknown_name_message(kind: str, name: str, valid: Iterable[str]) -> str:
    """Return a one-line message with an unknown name, its likely meaning and the valid names."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {kind} {name!r}{hint} available: {', '.join(valid)}"


def require_whole(name: str, value: object, least: int) -> None:
    """Raise a PolicyError unless an option is a whole number that is large enough."""
    if not (isinstance(value, int) and value >= least):
        raise PolicyError(f"{name} must be an integer of at least {least}, got {value!r}")
