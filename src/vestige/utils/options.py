"""Names with options, ``snapkv(kernel=7, share=layer)``: read, never run."""

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


def coerce_options(
    options: dict[str, Any], cls: Any, name: str, kind: str, error: type[VestigeError], *, taken: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return options as the fields of a dataclass want them: known, of the field's type, whole numbers as floats.

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
        wanted = fields[option].type
        try:
            found[option] = _as(value, wanted)
        except ValueError:
            if get_origin(wanted) is Literal:
                raise error(f"{kind} {name!r}: {unknown_name_message(option, str(value), get_args(wanted))}") from None
            raise error(f"{kind} {name!r}: {option} takes {_type_name(wanted)}, got {value!r}") from None
    return found


_SAID = {bool: "True or False", int: "a whole number", float: "a number", str: "text", NoneType: "None"}


def _as(value: Any, wanted: Any) -> Any:
    """Return a value that was written down as one of a type; a whole number is a number, too.

    Raises:
        ValueError: It is none.
    """
    args = get_args(wanted)
    if get_origin(wanted) is tuple and isinstance(value, tuple):
        return tuple(_as(one, args[0]) for one in value)
    if isinstance(wanted, UnionType):
        for one in args:
            with suppress(ValueError):
                return _as(value, one)
    if type(value) is wanted or (get_origin(wanted) is Literal and value in args):
        return value
    if wanted is float and type(value) is int:
        return float(value)
    raise ValueError(value)


def _type_name(wanted: Any) -> str:
    """Return what a type is called, of a union what can be written down."""
    if get_origin(wanted) is tuple:
        return f"several in brackets, each {_type_name(get_args(wanted)[0])}"
    alternatives = [one for one in get_args(wanted) or (wanted,) if one in _SAID or get_origin(one) is tuple]
    return " or ".join(_SAID.get(one) or _type_name(one) for one in alternatives)


def _tupled(value: Any) -> Any:
    """Return tuples for lists."""
    return tuple(map(_tupled, value)) if isinstance(value, tuple | list) else value


_CONSTANTS = {"true": "True", "false": "False", "none": "None"}
"""As JSON and many a shell write them."""


def _option(part: str) -> tuple[str, Any]:
    """Return an option and its value.

    Raises:
        ValueError: They cannot be told.
    """
    option, _, value = (word.strip() for word in part.partition("="))
    if not option.isidentifier():
        raise ValueError(option)
    try:
        return option, _tupled(ast.literal_eval(_CONSTANTS.get(value, value)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        if re.fullmatch(r"[\w./:~@+-]+", value):
            return option, value
        raise ValueError(value) from None
