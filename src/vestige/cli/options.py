"""Options, consoles and JSON output that all commands share."""

import json
import shlex
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Option

out, err = Console(highlight=False, emoji=False), Console(stderr=True, highlight=False)

Model = Annotated[str, Option(help="A named model (see `vestige models`), a folder, or a hub id.")]
Json = Annotated[bool, Option("--json", help="Print one JSON object as the last line, and nothing for people.")]
Seed = Annotated[int, Option(help="For everything that is drawn.")]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu.")]
Dtype = Annotated[str | None, Option(help="bfloat16, float16, float32, or auto: the checkpoint's.")]
PolicyName = Annotated[str, Option(help="What to keep: snapkv, or snapkv(kernel=7); see `vestige policies`.")]
BudgetText = Annotated[
    str | None,
    Option(help="Pairs to keep: 512 is tokens, 0.1 (with a point) a fraction of the length, 64MB bytes."),
]
ShareName = Annotated[
    str | None, Option(help="Who competes for room: head, layer or model; default: the method's own choice.")
]
MemoryName = Annotated[str, Option(help="What remains of the evicted: moments(mass=1); see `vestige memories`.")]
Chunk = Annotated[int, Option(help="Tokens per forward while reading.", min=1)]
NewTokens = Annotated[int, Option(help="Longest answer, in tokens.", min=1)]


def print_json(row: dict[str, Any]) -> None:
    """Print a row as JSON in one line."""
    print(json.dumps(row), flush=True)


def split_list(text: str) -> tuple[str, ...]:
    """Split a list at its commas, but not within brackets or quotes."""
    from vestige.utils.options import split

    return tuple(split(text))


def command_line() -> str:
    """Return the command line as the user wrote it."""
    return shlex.join(["vestige", *sys.argv[1:]])


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Return the whole numbers of a list, or raise a BadParameter that names the option."""
    try:
        return tuple(int(word) for word in split_list(text))
    except ValueError:
        raise typer.BadParameter(f"{option} takes whole numbers separated by commas, got {text!r}") from None


def escape_markup(text: str) -> str:
    """Return a text that rich prints as it is."""
    from rich.markup import escape

    return escape(text)
