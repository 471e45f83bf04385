"""Names with options, ``snapkv(kernel=7, share=layer)``: read, never run."""

import ast
import dataclasses
from typing import Any, get_args

from vestige.errors import VestigeError, unknown


def split(text: str) -> list[str]:
    """Split a list of names at its commas, but not within parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse(text: str, kind: str, error: type[VestigeError]) -> tuple[str, dict[str, Any]]:
    """Return a name and its options; a bare word is text, everything else a Python literal.

    Args:
        text: What was written.
        kind: What it names, for messages: "policy".
        error: Raised where the text cannot be read.
    """
    name, bracket, _ = text.partition("(")
    if not bracket:
        return text.strip(), {}
    problem = error(f"cannot read {kind} {text!r}: write it like {name.strip() or kind}(option=value)")
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise problem
        return call.func.id, {keyword.arg or "**": _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise problem from None


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


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)
