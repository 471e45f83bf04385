"""Tables and plots of result folders: one HTML file with the pictures inside, one Markdown file.

Both depend on the results alone: no dates, no machine paths, the same bytes twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vestige.bench.report import tables
from vestige.bench.report.markdown import markdown
from vestige.bench.report.methods import Method, looks
from vestige.bench.report.page import Part, page
from vestige.bench.report.rows import (
    Row,
    cells,
    chapters,
    commands,
    failed,
    is_speed,
    load_rows,
    means,
    read_rows,
)
from vestige.bench.report.sections import sections, speed_methods, speed_sections
from vestige.errors import InputError
from vestige.utils.files import write_atomically

__all__ = ["Report", "load_rows", "make_report", "read_rows", "report"]

HTML, MARKDOWN = "report.html", "report.md"
TITLE = "What KV cache eviction costs and saves"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The two texts."""

    html: str
    markdown: str


@dataclass(frozen=True, kw_only=True)
class Written:
    """Where a report is, and how many rows it tells of."""

    html: Path
    markdown: Path
    rows: int


def report(folders: Sequence[Path], *, out: Path | None = None, title: str = TITLE) -> Written:
    """Write ``report.html`` and ``report.md`` of some result folders.

    Args:
        folders: Each holds ``rows.json``, ``speed.json``, or folders that do.
        out: Where the files go; made if it is not there. None is the first folder.
        title: Stands above both.

    Raises:
        InputError: No results, a malformed file, matplotlib is missing, or the files cannot be written. Nothing is
            written then; a report that is there already is replaced as a whole.
    """
    rows, place = load_rows(folders), out or folders[0]
    if place.exists() and not place.is_dir():
        raise InputError(f"{place} is a file; name a folder for --out")
    made = make_report(rows, title=title, commands=commands(folders))
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / HTML, made.html)
        write_atomically(place / MARKDOWN, made.markdown)
    except OSError as error:
        raise InputError(f"cannot write a report to {place}: {error.strerror}") from None
    return Written(html=place / HTML, markdown=place / MARKDOWN, rows=len(rows))


def make_report(rows: Sequence[Row], *, title: str = TITLE, commands: Sequence[str] = ()) -> Report:
    """Return the two texts for some rows.

    Raises:
        InputError: There are no rows, or matplotlib is missing.
    """
    if not rows:
        raise InputError("no rows to report on")
    speed = [row for row in rows if is_speed(row) and not failed(row)]
    scored = [row for row in rows if not is_speed(row) and not failed(row)]
    broken = [row for row in rows if failed(row)]
    drawn = looks({*map(Method.of, scored), *speed_methods(speed)})
    count = f"{len(rows)} rows" + (f", of which {len(broken)} failed" if broken else "")
    chaptered = chapters(rows)
    top = [part for chapter in chaptered for part in _headlines(chapter.title, chapter.rows)]
    pictures = [Part(title=chapter.title, sections=tuple(sections(chapter, drawn))) for chapter in chaptered]
    every = Part(title="All rows", tables=(("", tables.all_rows(scored)),), sortable=True)
    by_task = [_by_task(chapter.title, chapter.rows) for chapter in chaptered]
    fast = Part(title="Speed", tables=(("", tables.speed_rows(speed)),), sections=tuple(speed_sections(speed, drawn)))
    last = [*([fast] if speed else []), *([_failures(broken)] if broken else []), _origin(rows, commands)]
    return Report(
        html=page(title, f"{count}.", [*top, *pictures, *([every] if scored else []), *last]),
        markdown=markdown(title, f"{count}.", [*top, *by_task, *last], page=HTML),
    )


def _headlines(title: str, rows: Sequence[Row]) -> list[Part]:
    found = [(mean.title, tables.headline(mean)) for mean in means(rows) if mean.rows]
    text = "Score (95 % interval) · measured bytes in percent of the full cache, by method and budget."
    return [Part(title=f"Headline: {title}", text=text, tables=tuple(found))] if found else []


def _by_task(title: str, rows: Sequence[Row]) -> Part:
    found = [(tables.cell_title(*cell), tables.task_rows(part)) for cell, part in cells(rows).items()]
    return Part(title=f"By task: {title}", tables=tuple(found))


def _failures(rows: Sequence[Row]) -> Part:
    text = "These could not be measured; a reason is what the method itself said."
    return Part(title="Failed rows", text=text, tables=(("", tables.failed_rows(rows)),))


def _origin(rows: Sequence[Row], commands: Sequence[str]) -> Part:
    return Part(title="Provenance", facts=tuple(tables.provenance(rows)), commands=tuple(commands))
