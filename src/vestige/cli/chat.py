"""``vestige chat``: a conversation in the terminal, with commands to erase, to report on the cache, and to save."""

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from vestige.cli import render
from vestige.errors import InputError, VestigeError
from vestige.pipelines.message import Message
from vestige.pipelines.session import Session

HELP = """/erase N         take message N out (see /messages)
/erase some words   take this passage out; it must occur once
/messages        what was said, numbered
/report          what the cache holds and costs
/save FOLDER     keep the conversation; `vestige chat --load FOLDER` goes on with it
/quit            leave (also Ctrl-D)"""


def chat(
    session: Session, lines: Iterable[str], console: Console, *, max_new_tokens: int = 256, prompt: Callable[[], None]
) -> None:
    """Run a conversation until the lines end or ``/quit``.

    Args:
        session: The conversation; changed in place.
        lines: Lines of the user.
        console: Console for the replies.
        max_new_tokens: Longest reply in tokens.
        prompt: Called before each line is read.
    """
    prompt()
    for line in lines:
        try:
            if line.strip() in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                _run_command(session, line.strip(), console)
            elif line.strip():
                session.send(line.strip(), max_new_tokens=max_new_tokens, on_text=lambda text: _print(console, text))
                console.print()
        except KeyboardInterrupt:
            console.print("\n[dim](stopped; this turn is taken back)[/dim]")
        except VestigeError as error:
            console.print(f"[red]{escape(str(error))}[/red]")
        prompt()


def _print(console: Console, text: str) -> None:
    console.print(escape(text), end="", soft_wrap=True)


def _run_command(session: Session, line: str, console: Console) -> None:
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/erase" and rest:
        number = int(rest) if rest.lstrip("-").isdecimal() else None
        done = session.erase(message=number) if number is not None else session.erase(text=rest)
        console.print(render.erase_table(done))
    elif word == "/messages":
        for number, message in enumerate(session.messages):
            console.print(f"[dim]{number} {message.role}[/dim] {escape(_mask_erased(message))}", soft_wrap=True)
    elif word == "/report":
        report = session.report()
        held = f"{report.held:,} of {report.full:,} pairs" if report.full else "nothing yet"
        console.print(
            f"{held}, {render.megabytes(report.kv_bytes)} instead of {render.megabytes(report.full_kv_bytes)}"
        )
    elif word == "/save" and rest:
        session.save(Path(rest).expanduser())
        console.print(f"[dim]saved to {escape(rest)}[/dim]")
    elif word == "/help":
        console.print(HELP, markup=False)
    else:
        raise InputError(f"no such command, or it lacks something: {line}; /help lists them")


def _mask_erased(message: Message) -> str:
    """Return the text of a message with its erased parts replaced by dots."""
    text = message.text
    for start, end in message.erased:
        text = text[:start] + "·" * (end - start) + text[end:]
    return text
