"""Names of peers: ``kvpress:SnapKVPress(window_size=32)``, ``transformers:quantized(nbits=2)``, parsed, never run."""

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from vestige.errors import InputError, unknown_name_message

AVAILABLE = ("kvpress:<press class>", "transformers:dynamic", "transformers:quantized")
QUANTIZED_OPTIONS = ("backend", "nbits", "axis_key", "axis_value", "q_group_size", "residual_length")
BACKENDS = ("quanto", "hqq")

Call = dict[str, Any]
"""``{"name": class, "args": [...], "options": {...}}``; a value is plain, a list of values, or another call."""


@dataclass(frozen=True)
class PeerName:
    """A parsed name of a peer."""

    text: str
    kind: str
    """``kvpress`` or ``transformers``."""
    call: Call


def parse(text: str) -> PeerName:
    """Parse a name, without a check that kvpress has the press.

    Raises:
        InputError: The name has no known shape; the message has the known ones, or the part that is not plain.
    """
    kind, _, rest = text.partition(":")
    if kind not in ("kvpress", "transformers") or not rest.strip():
        raise InputError(unknown_name_message("peer", text, AVAILABLE))
    try:
        call = _parse_call(ast.parse(rest.strip(), mode="eval").body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read peer {text!r}: write it like kvpress:SnapKVPress(window_size=32)") from None
    if kind == "transformers":
        _check_transformers(text, call)
    else:
        _check_press(text, call)
    return PeerName(text, kind, call)


def _parse_call(node: ast.expr, text: str) -> Call:
    if isinstance(node, ast.Name):
        return {"name": node.id, "args": [], "options": {}}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise InputError(f"peer {text!r}: {ast.unparse(node)} is not a class with plain arguments")
    options = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise InputError(f"peer {text!r}: arguments must be written out, got {ast.unparse(node)}")
        options[keyword.arg] = _parse_value(keyword.value, text)
    return {"name": node.func.id, "args": [_parse_value(arg, text) for arg in node.args], "options": options}


def _parse_value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name | ast.Call):
        call = _parse_call(node, text)
        _check_press(text, call)
        return call
    if isinstance(node, ast.List | ast.Tuple):
        return [_parse_value(element, text) for element in node.elts]
    try:
        value = ast.literal_eval(node)
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError):
        value = ...
    if not isinstance(value, bool | int | float | str | None):
        raise InputError(f"peer {text!r}: {ast.unparse(node)} is not a plain value")
    return value


def _check_press(text: str, call: Call) -> None:
    if not re.fullmatch(r"[A-Z]\w*Press", call["name"]):
        raise InputError(f"peer {text!r}: {call['name']} does not name a press class, such as SnapKVPress")
    if "compression_ratio" in call["options"]:
        raise InputError(f"peer {text!r}: compression_ratio follows from --budget; leave it out")


def _check_transformers(text: str, call: Call) -> None:
    name, options = call["name"], call["options"]
    if name not in ("dynamic", "quantized"):
        raise InputError(unknown_name_message("peer", text, AVAILABLE))
    known = QUANTIZED_OPTIONS if name == "quantized" else ()
    if call["args"] or set(options) - set(known):
        raise InputError(f"peer {text!r}: transformers:{name} takes {', '.join(known) or 'no options'}, by name")
    if (backend := options.get("backend", BACKENDS[0])) not in BACKENDS:
        raise InputError(unknown_name_message("backend", str(backend), BACKENDS))
    for option in set(options) - {"backend"}:
        if type(options[option]) is not int:
            raise InputError(f"peer {text!r}: {option} must be a whole number, got {options[option]!r}")
