"""The Markdown of a report: the tables, for reading in a repository. Pictures are in the page beside it."""

from collections.abc import Sequence

from vestige.bench.report.page import HOW_TO_READ, Part
from vestige.bench.report.tables import Table

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*[]<>|"})


def markdown(title: str, summary: str, parts: Sequence[Part], *, page: str) -> str:
    """Return the whole text.

    Args:
        title: Stands above everything.
        summary: One line below it.
        parts: Those whose tables are wanted.
        page: The name of the HTML file.
    """
    how = "\n".join(f"* {line}" for line in HOW_TO_READ[:4])
    body = "\n".join(filter(None, map(_part, parts)))
    pictures = (  # no link: people commit the tables and leave the page out
        f"Pictures, and a table that can be sorted, are in the {_plain(page)} that `vestige report` writes beside this "
        "file."
    )
    return f"# {_plain(title)}\n\n{_plain(summary)} {pictures}\n\n{how}\n\n{body}"


def _part(part: Part) -> str:
    made = [f"### {_plain(caption)}\n\n{_table(table)}" if caption else _table(table) for caption, table in part.tables]
    if part.facts:
        made.append("".join(f"* {_plain(name)}: {_plain(value)}\n" for name, value in part.facts))
    made += [f"```\n{' '.join(command.split()).replace('```', '')}\n```\n" for command in part.commands]
    text = f"{_plain(part.text)}\n\n" if part.text else ""
    return f"## {_plain(part.title)}\n\n{text}" + "\n".join(made) if made else ""


def _table(table: Table) -> str:
    rule = "|".join(" --- " if name in table.words else " ---: " for name in table.columns)
    lines = [_line([name for name in table.columns]), f"|{rule}|"]
    lines += [_line([cell.text for cell in row]) for row in table.rows]
    return "\n".join(lines) + "\n"


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(map(_plain, texts))} |"


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return " ".join(text.split()).translate(_SPECIAL)
