"""The HTML of a report: one file, with its pictures and a few lines of script inside and nothing from elsewhere.

The script sorts and filters the table; without it the page reads the same. All text that comes from results is escaped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from vestige.bench.report import plots
from vestige.bench.report.sections import Section
from vestige.bench.report.tables import Cell, Table

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light; --ink: #1b1b1b; --quiet: #555; --line: #d8d8d8; --wash: #f5f5f3; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink); background: #fff;
  max-width: 1240px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-bottom: 2px solid var(--ink); overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 2rem 0 .25rem; overflow-wrap: anywhere; }
p, ul, dl { max-width: 75ch; margin: .4rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .75rem 0; }
a { color: #0b57a4; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem 1.25rem; align-items: flex-start; margin: .75rem 0; }
.pictures svg { max-width: 100%; height: auto; display: block; overflow: visible; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; font-size: .875rem; padding: 0; margin: .5rem 0;
  list-style: none; max-width: none; }
.legend li { display: flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; }
.legend svg { flex: none; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { border-bottom: 2px solid var(--ink); vertical-align: bottom; background: #fff; }
.word { text-align: left; }
td.reason, td.note { white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
tbody tr:nth-child(even) { background: var(--wash); }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th button::after { content: " \\2195"; color: #999; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--ink); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--ink); }
input { font: inherit; padding: .2rem .5rem; width: 100%; max-width: 24rem; }
dt { font-weight: 600; } dd { margin: 0 0 .3rem 1rem; overflow-wrap: anywhere; }
code { background: var(--wash); padding: .1rem .3rem; overflow-wrap: anywhere; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, input, label { display: none; }
  .pictures svg { max-width: 48%; break-inside: avoid; }
  h2, h3 { break-after: avoid; } tr { break-inside: avoid; } thead { display: table-header-group; }
  .wide { overflow: visible; } table { font-size: 6.5pt; } th, td { padding: .1rem .25rem; white-space: normal; }
  th button::after { content: ""; }
}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const cell = row.cells[i];
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
  };
  const compare = (a, b) => {
    const words = typeof a === "string", other = typeof b === "string";
    if (words && other) return a.localeCompare(b);
    return words ? 1 : other ? -1 : a - b;
  };
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(each => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => compare(value(a, i), value(b, i)) * (down ? -1 : 1));
      body.append(...rows);
    });
  });
  const label = document.createElement("label"), input = document.createElement("input");
  label.textContent = "Show rows with ";
  input.placeholder = "snapkv 0.25";
  label.append(input);
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
    for (const row of body.rows) {
      const text = [...row.cells].map(cell => cell.textContent.toLowerCase());
      row.hidden = !words.every(word => text.some(cell => cell.includes(word)));
    }
  });
  table.parentElement.before(label);
}
"""

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
"""What a reader must know, in plain words."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What stands below one heading of the page."""

    title: str
    text: str = ""
    tables: tuple[tuple[str, Table], ...] = ()
    """Tables with their captions; an empty caption is none."""
    sortable: bool = False
    sections: tuple[Section, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    commands: tuple[str, ...] = ()


def page(title: str, summary: str, parts: Sequence[Part]) -> str:
    """Return the whole page.

    Args:
        title: Stands above everything.
        summary: One line below it.
        parts: In their order.
    """
    links = "".join(f'<a href="#part{i}">{escape(part.title)}</a>' for i, part in enumerate(parts))
    how = "".join(f"<li>{escape(line)}</li>" for line in HOW_TO_READ)
    body = "\n".join(_part(i, part) for i, part in enumerate(parts))
    return plots.separate_ids(f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{escape(summary)}</p>
<nav aria-label="Sections">{links}</nav>
<h2 id="how">How to read this</h2>
<ul>{how}</ul>
{body}
<script>{SCRIPT}</script>
</body>
</html>
""")


def _part(i: int, part: Part) -> str:
    made = [f'<h2 id="part{i}">{escape(part.title)}</h2>']
    if part.text:
        made.append(f"<p>{escape(part.text)}</p>")
    made += [_table(caption, table, sortable=part.sortable) for caption, table in part.tables]
    made += map(_section, part.sections)
    if part.facts:
        facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in part.facts)
        made.append(f"<dl>{facts}</dl>")
    made += [f"<p><code>{escape(command)}</code></p>" for command in part.commands]
    return "\n".join(made)


def _section(section: Section) -> str:
    legend = "".join(f"<li>{plots.swatch(look)}{escape(label)}</li>" for look, label in section.legend)
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    pictures = "\n".join(section.pictures)
    return (
        f"<section>\n<h3>{escape(section.title)}</h3>\n<p>{escape(section.text)}</p>\n{legend}\n"
        f'<div class="pictures">\n{pictures}\n</div>\n</section>'
    )


def _table(caption: str, table: Table, *, sortable: bool) -> str:
    kinds = ["word" if name in table.words else "" for name in table.columns]
    named = [
        f"{kind} {name}".strip() if name in ("note", "reason") else kind
        for kind, name in zip(kinds, table.columns, strict=True)
    ]
    classes = [f' class="{name}"' if name else "" for name in named]
    head = "".join(
        f'<th scope="col"{css}>{escape(name)}</th>' for css, name in zip(classes, table.columns, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(map(_cell, row, classes))}</tr>" for row in table.rows)
    above = f"<h3>{escape(caption)}</h3>\n" if caption else ""
    start = '<table class="sortable">' if sortable else "<table>"
    return f'{above}<div class="wide">{start}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _cell(cell: Cell, css: str) -> str:
    sorted_by = "" if cell.value is None else f' data-v="{cell.value:.9g}"'
    return f"<td{css}{sorted_by}>{escape(cell.text)}</td>"
