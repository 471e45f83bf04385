"""A report's parts, and the two texts made of them by the templates: a page of HTML, and Markdown without pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vestige.bench.report.figure import separate_ids
from vestige.bench.report.plots import draw_swatch
from vestige.bench.report.sections import Section
from vestige.bench.report.tables import WORDS, Table, escape_markdown, format_markdown
from vestige.errors import InputError

HTML, MARKDOWN = "report.html", "report.md"
HOW_TO_READ = (
    "A score is between 0 and 1; each comes with its 95 % interval. With few samples intervals are wide: two methods "
    "whose intervals overlap may be equally good.",
    "Bytes are measured on the cache, memories and side arrays included, and divided by what a cache that keeps "
    "everything takes. A method that only masks what it evicts frees nothing, and stands at 100 % whatever its budget.",
    "Budget is what was asked for: 0.25 is a quarter of the pairs, 512 is tokens per KV head. Kept is what was held.",
    "The full cache is black. Random and streaming_llm are controls, in grey: a method that is not above them has "
    "learned nothing from the text.",
    "A colour and a marker belong to one family of methods throughout. Solid lines are vestige's, dashed ones other "
    "packages'. An open marker: every head keeps the same number. Half filled: heads of a layer compete. Filled: all "
    "heads of the model compete.",
    "In the headline, a mean is over all tasks of a group; its interval takes the tasks as independent.",
    "Points of neighbouring lines are moved sideways by a hair so that their intervals can be told apart.",
)
"""What a reader must know; the Markdown, which has no pictures, takes the first four."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Contents below one heading of the report."""

    title: str
    text: str = ""
    tables: tuple[tuple[str, Table], ...] = ()
    """(caption, table); an empty caption is not shown."""
    sortable: bool = False
    """Readers may sort and filter the tables."""
    sections: tuple[Section, ...] = ()
    """Pictures, on the page only."""
    facts: tuple[tuple[str, str], ...] = ()
    commands: tuple[str, ...] = ()


def render_page(title: str, summary: str, parts: Sequence[Part]) -> str:
    """Return the HTML of all parts, below a title and a line of summary; all text that comes from results is escaped.

    Raises:
        InputError: jinja2 is missing.
    """
    return separate_ids(_render(HTML, title=title, summary=summary, parts=parts))


def render_markdown(title: str, summary: str, parts: Sequence[Part]) -> str:
    """Return the Markdown of all parts that have tables, facts or commands; raise as :func:`render_page` does."""
    return _render(MARKDOWN, title=title, summary=summary, parts=parts, page=HTML)


def _format_table(table: Table) -> str:
    return format_markdown(table.columns, [[cell.text for cell in row.values()] for row in table.rows])


def _render(name: str, **values: Any) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
    except ImportError:
        raise InputError('reports need jinja2: pip install "vestige[bench]"') from None
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"swatch": draw_swatch, "plain": escape_markdown, "markdown": _format_table}
    return environment.get_template(f"{name}.j2").render(how=HOW_TO_READ, words=WORDS, **values)
