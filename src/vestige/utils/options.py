"""Names with options, ``snapkv(kernel=7, share=layer)``: parsed without running any code."""

import ast
import dataclasses
import re
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from vestige.errors import VestigeError, unknown_name_message


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


def parse_options(text: str, kind: str, error: type[VestigeError]) -> tuple[str, dict[str, Any]]:
    """Return a name and its options, or raise an ``error`` for a text that cannot be read.

    A value is a Python literal, or else text: a word, a path, a hub id. ``kind`` is for messages, such as "policy".
    """
    name, bracket, rest = (part.strip() for part in text.partition("("))
    if not bracket:
        return name, {}
    problem = error(f"cannot read {kind} {text!r}: write it like {name or kind}(option=value)")
    parts = split(rest.removesuffix(")"))
    try:
        options = dict(map(_parse_option, parts))
    except ValueError:
        raise problem from None
    if not name.isidentifier() or not rest.endswith(")") or len(options) < len(parts):
        raise problem
    return name, options


def coerce_options(
    options: dict[str, Any], cls: Any, name: str, kind: str, error: type[VestigeError], *, taken: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return options converted to the types of a dataclass's fields, or raise an ``error`` if one does not fit.

    Name and kind of the class are for messages. Fields that are ``taken`` cannot be options: the caller sets them.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in taken}
    found = {}
    for option, value in options.items():
        if option not in fields:
            raise error(f"{kind} {name!r} has no option {option!r}; available: {', '.join(sorted(fields))}")
        wanted = fields[option].type
        try:
            found[option] = _convert(value, wanted)
        except ValueError:
            if get_origin(wanted) is Literal:
                raise error(f"{kind} {name!r}: {unknown_name_message(option, str(value), get_args(wanted))}") from None
            raise error(f"{kind} {name!r}: {option} takes {_type_name(wanted)}, got {value!r}") from None
    return found


_TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "text", NoneType: "None"}


def _convert(value: Any, wanted: Any) -> Any:
    """Return a parsed value as a type (a whole number may become a float), or raise a ValueError."""
    args = get_args(wanted)
    if get_origin(wanted) is tuple and isinstance(value, tuple):
        return tuple(_convert(item, args[0]) for item in value)
    if isinstance(wanted, UnionType):
        for alternative in args:
            with suppress(ValueError):
                return _convert(value, alternative)
    if type(value) is wanted or (get_origin(wanted) is Literal and value in args):
        return value
    if wanted is float and type(value) is int:
        return float(value)
    raise ValueError(value)


def _type_name(wanted: Any) -> str:
    """Return the name of a type for messages; of a union, those types that an option can have."""
    if get_origin(wanted) is tuple:
        return f"several in brackets, each {_type_name(get_args(wanted)[0])}"
    parts = [part for part in get_args(wanted) or (wanted,) if part in _TYPE_NAMES or get_origin(part) is tuple]
    return " or ".join(_TYPE_NAMES.get(part) or _type_name(part) for part in parts)


def _lists_to_tuples(value: Any) -> Any:
    return tuple(map(_lists_to_tuples, value)) if isinstance(value, tuple | list) else value


_CONSTANTS = {"true": "True", "false": "False", "none": "None"}
"""Python's constants by their spelling in JSON and shells."""


def _parse_option(part: str) -> tuple[str, Any]:
    """Return the name and the value of an option, or raise a ValueError unless the text is ``name=value``."""
    option, _, value = (word.strip() for word in part.partition("="))
    if not option.isidentifier():
        raise ValueError(option)
    try:
        return option, _lists_to_tuples(ast.literal_eval(_CONSTANTS.get(value, value)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        if re.fullmatch(r"[\w./:~@+-]+", value):
            return option, value
        raise ValueError(value) from None
