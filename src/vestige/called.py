"""Names with options, ``snapkv(kernel=7, share=layer)``: read, never run."""

import ast
import dataclasses
import re
from typing import Any, get_args

from vestige.errors import VestigeError, unknown


def split(text: str) -> list[str]:
    """Split a list at its commas, but not within brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote or character in "'\"":
            quote = "" if character == quote else quote or character
        else:
            depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse(text: str, kind: str, error: type[VestigeError]) -> tuple[str, dict[str, Any]]:
    """Return a name and its options; a value is a Python literal, or else text: a word, a path, a hub id.

    Args:
        text: What was written.
        kind: What it names, for messages: "policy".
        error: Raised where the text cannot be read.
    """
    name, bracket, rest = (part.strip() for part in text.partition("("))
    if not bracket:
        return name, {}
    problem = error(f"cannot read {kind} {text!r}: write it like {name or kind}(option=value)")
    parts = split(rest.removesuffix(")"))
    try:
        options = dict(map(_option, parts))
    except ValueError:
        raise problem from None
    if not name.isidentifier() or not rest.endswith(")") or len(options) < len(parts):
        raise problem
    return name, options


def fitted(
    options: dict[str, Any], cls: Any, name: str, kind: str, error: type[VestigeError], *, taken: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return options as the fields of a dataclass want them: known, of the default's type, whole numbers as floats.

    Args:
        options: By name.
        cls: A dataclass.
        name: Of the class, for messages.
        kind: What it is, for messages.
        error: Raised where an option does not fit.
        taken: Fields that are given in another way.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in taken}
    found = {}
    for option, value in options.items():
        if option not in fields:
            raise error(f"{kind} {name!r} has no option {option!r}; available: {', '.join(sorted(fields))}")
        choices, default = get_args(fields[option].type), fields[option].default
        if isinstance(default, str) and choices and value not in choices:
            raise error(f"{kind} {name!r}: {unknown(option, str(value), choices)}")
        value = float(value) if isinstance(default, float) and type(value) is int else value
        if isinstance(default, bool | int | float | str) and type(value) is not type(default):
            raise error(f"{kind} {name!r}: {option} is of the kind of {default!r}, got {value!r}")
        found[option] = value
    return found


def _option(part: str) -> tuple[str, Any]:
    """Return an option and its value.

    Raises:
        ValueError: They cannot be told.
    """
    option, _, value = (word.strip() for word in part.partition("="))
    if not option.isidentifier():
        raise ValueError(option)
    try:
        return option, ast.literal_eval(value)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        if re.fullmatch(r"[\w./:~@+-]+", value):
            return option, value
        raise ValueError(value) from None
