"""Tables and plots of result folders: one HTML file with the pictures inside, one Markdown file.

Both depend on the results alone: no dates, no machine paths, the same bytes twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vestige.bench.report import tables
from vestige.bench.report.methods import MethodKey, assign_styles
from vestige.bench.report.page import HTML, MARKDOWN, Part, render_markdown, render_page
from vestige.bench.report.rows import (
    Row,
    average_tasks,
    group_by_cell,
    is_failed,
    is_speed,
    load_rows,
    make_chapters,
    read_commands,
    read_rows,
)
from vestige.bench.report.sections import DYNAMIC, make_sections, make_speed_sections
from vestige.errors import InputError
from vestige.utils.files import write_atomically

__all__ = ["Report", "load_rows", "make_report", "read_rows", "report"]

TITLE = "What KV cache eviction costs and saves"
HEADLINE = "Score (95 % interval) · measured bytes in percent of the full cache, by method and budget."


@dataclass(frozen=True, kw_only=True)
class Report:
    """The two texts."""

    html: str
    markdown: str


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """The files of a report, and the number of its rows."""

    html: Path
    markdown: Path
    rows: int


def report(folders: Sequence[Path], *, out: Path | None = None, title: str = TITLE) -> WrittenReport:
    """Write ``report.html`` and ``report.md`` of some result folders.

    Args:
        folders: Each holds ``rows.json``, ``speed.json``, or folders that do.
        out: Folder for the files, made if it does not exist. None is the first of ``folders``.
        title: Heading of both.

    Raises:
        InputError: No results, a malformed file, matplotlib or jinja2 is missing, or the files cannot be written.
            Nothing is written then; an earlier report is replaced as a whole.
    """
    rows, place = load_rows(folders), out or folders[0]
    if place.exists() and not place.is_dir():
        raise InputError(f"{place} is a file; name a folder for --out")
    made = make_report(rows, title=title, commands=read_commands(folders))
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / HTML, made.html)
        write_atomically(place / MARKDOWN, made.markdown)
    except OSError as error:
        raise InputError(f"cannot write a report to {place}: {error.strerror}") from None
    return WrittenReport(html=place / HTML, markdown=place / MARKDOWN, rows=len(rows))


def make_report(rows: Sequence[Row], *, title: str = TITLE, commands: Sequence[str] = ()) -> Report:
    """Return the two texts for some rows.

    Raises:
        InputError: There are no rows, or matplotlib or jinja2 is missing.
    """
    if not rows:
        raise InputError("no rows to report on")
    measured, failed = [row for row in rows if not is_failed(row)], [row for row in rows if is_failed(row)]
    speed, scored = [row for row in measured if is_speed(row)], [row for row in measured if not is_speed(row)]
    styles = assign_styles({*map(MethodKey.of, measured), *([DYNAMIC] if speed else [])})
    summary = f"{len(rows)} rows" + (f", of which {len(failed)} failed." if failed else ".")
    headlines, pictures, by_task = list[Part](), list[Part](), list[Part]()
    for chapter, part in make_chapters(scored):
        means = average_tasks(part)
        if found := tuple((mean.title, tables.make_headline(mean)) for mean in means if mean.rows):
            headlines.append(Part(title=f"Headline: {chapter}", text=HEADLINE, tables=found))
        pictures.append(Part(title=chapter, sections=tuple(make_sections(part, means, styles))))
        cells = group_by_cell(part).items()
        found = tuple((tables.title_cell(*cell), tables.make_table(rows, tables.TASK_COLUMNS)) for cell, rows in cells)
        by_task.append(Part(title=f"By task: {chapter}", tables=found))
    last = [Part(title="Provenance", facts=tuple(tables.list_provenance(rows)), commands=tuple(commands))]
    if failed:
        text = "These could not be measured; a reason is what the method itself said."
        table = tables.make_table(failed, ("task", "length", "method", "budget", "reason"))
        last.insert(0, Part(title="Failed rows", text=text, tables=(("", table),)))
    if speed:
        table = tables.make_table(speed, tables.SPEED_COLUMNS, optional=("model", "note"))
        sections = tuple(make_speed_sections(speed, styles))
        last.insert(0, Part(title="Speed", tables=(("", table),), sections=sections))
    if scored:
        table = tables.make_table(scored, tables.ALL_COLUMNS, optional=("model", "split", "batch", "memory MB", "note"))
        pictures.append(Part(title="All rows", tables=(("", table),), sortable=True))
    return Report(
        html=render_page(title, summary, [*headlines, *pictures, *last]),
        markdown=render_markdown(title, summary, [*headlines, *by_task, *last]),
    )
