"""Tables of a report: which columns there are, and what each cell shows and is sorted by."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from vestige.bench.report.methods import MethodKey
from vestige.bench.report.rows import (
    Mean,
    Row,
    budget_key,
    describe_length,
    find_bytes_fraction,
    is_speed,
    length_key,
    read_interval,
    read_length,
    read_number,
)

NOTHING = "–"  # noqa: RUF001  (what an empty cell shows)
WORDS = frozenset({"task", "method", "budget", "model", "split", "note", "reason"})
"""Columns of text, which are aligned on the left."""
_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*[]<>|"})


@dataclass(frozen=True)
class Cell:
    """The text of a cell, and its sort key if that is a number."""

    text: str
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells, each by the names of the columns."""

    columns: tuple[str, ...]
    rows: tuple[dict[str, Cell], ...]


Column = Callable[[Row], Cell]


def _make_text(key: str, otherwise: str = NOTHING) -> Column:
    return lambda row: Cell(str(row.get(key) or otherwise))


def _make_number(key: str, spec: str, scale: float = 1.0) -> Column:
    def cell(row: Row) -> Cell:
        value = read_number(row, key)
        return Cell(NOTHING) if value is None else Cell(format(value * scale, spec), value)

    return cell


def _format_percent(fraction: float | None) -> Cell:
    return Cell(NOTHING) if fraction is None else Cell(f"{100 * fraction:.1f} %", fraction)


def _format_interval(row: Row) -> Cell:
    ends = read_interval(row)
    return Cell(NOTHING) if ends is None else Cell(f"{ends[0]:.2f} to {ends[1]:.2f}", ends[0])


def _format_budget(row: Row) -> Cell:
    text = str(row.get("budget") or NOTHING)
    kind, value, _ = budget_key(text)
    return Cell(text, -value if kind < 2 else None)


_COLUMNS: dict[str, Column] = {
    "task": _make_text("task", "speed"),
    "length": _make_number("length", ",.0f"),
    "method": lambda row: Cell(MethodKey.of(row).label),
    "budget": _format_budget,
    "score": _make_number("score", ".3f"),
    "95 % interval": _format_interval,
    "n": _make_number("n", ".0f"),
    "kept": lambda row: _format_percent(read_number(row, "kept_fraction")),
    "bytes": lambda row: _format_percent(find_bytes_fraction(row)),
    "MB": _make_number("kv_bytes", ",.2f", 1e-6),
    "peak MB": _make_number("peak_kv_bytes", ",.2f", 1e-6),
    "memory MB": _make_number("memory_bytes", ",.2f", 1e-6),
    "decode ms": _make_number("decode_ms", ".1f"),
    "floor ms": _make_number("floor_ms", ".1f"),
    "decode / floor": _make_number("decode_over_floor", ".2f"),
    "speedup": _make_number("decode_speedup", ".2f"),
    "prefill s": _make_number("prefill_s", ".2f"),
    "prefill / full": _make_number("prefill_overhead", ".2f"),
    "evict s": _make_number("evict_s", ".2f"),
    "batch": _make_number("batch", ".0f"),
    "model": _make_text("model"),
    "split": _make_text("split"),
    "note": lambda row: Cell("random weights") if row.get("random_weights") else _make_text("note")(row),
    "reason": _make_text("error", "nothing was measured"),
}
TASK_COLUMNS = ("method", "budget", "score", "95 % interval", "n", "kept", "bytes", "MB", "decode ms")
ALL_COLUMNS = (
    "task", "length", *TASK_COLUMNS, "peak MB", "memory MB", "prefill s", "evict s", "batch", "model", "split", "note",
)  # fmt: skip
SPEED_COLUMNS = (
    "length", "batch", "method", "budget", "decode ms", "floor ms", "decode / floor", "speedup", "prefill s",
    "prefill / full", "evict s", "MB", "peak MB", "model", "note",
)  # fmt: skip


def make_table(rows: Sequence[Row], names: Sequence[str], *, optional: Collection[str] = ()) -> Table:
    """Return the named columns of rows; an optional column with the same text in all rows is left out."""
    cells = [{name: _COLUMNS[name](row) for name in names} for row in sorted(rows, key=row_key)]
    columns = tuple(name for name in names if name not in optional or len({row[name].text for row in cells}) > 1)
    return Table(columns=columns, rows=tuple({name: row[name] for name in columns} for row in cells))


def make_headline(mean: Mean) -> Table:
    """Return scores by method and budget: ``score (95 % interval) · bytes in percent of the full cache``."""
    budgets = sorted({str(row["budget"]) for row in mean.rows}, key=budget_key)
    methods: dict[MethodKey, dict[str, Cell]] = {}
    for row in mean.rows:  # which are in the order of methods
        methods.setdefault(MethodKey.of(row), {})[str(row["budget"])] = _format_headline(row)
    rows = [
        {"method": Cell(method.label)} | {f"budget {budget}": cells.get(budget, Cell(NOTHING)) for budget in budgets}
        for method, cells in methods.items()
    ]
    return Table(columns=("method", *(f"budget {budget}" for budget in budgets)), rows=tuple(rows))


def _format_headline(row: Row) -> Cell:
    score, ends, fraction = read_number(row, "score"), read_interval(row), find_bytes_fraction(row)
    if score is None:
        return Cell(NOTHING)
    text = f"{score:.2f}" + (f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else "")
    return Cell(text + (f" · {100 * fraction:.0f} %" if fraction is not None else ""), score)


def list_provenance(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Return (name, values) of each fact about the origin of rows, every value once."""
    found: dict[str, set[str]] = {}
    for row in rows:
        facts = {key: row.get(key) for key in ("model", "revision", "device", "dtype", "split", "seed")}
        facts |= {"question-aware": row.get("question_aware"), "chunk": row.get("chunk"), "batch": row.get("batch")}
        if isinstance(versions := row.get("versions"), dict):
            facts |= {f"{name} version": value for name, value in sorted(versions.items())}
        for name, value in facts.items():
            if value is not None:
                text = ("yes" if value else "no") if isinstance(value, bool) else str(value)
                found.setdefault(name, set()).add(text)
    return [(name, ", ".join(sorted(values))) for name, values in found.items()]


def title_cell(task: str, length: int | None) -> str:
    """Return the title of one task at one length."""
    return f"{task}, {describe_length(length)}"


def row_key(row: Row) -> tuple[object, ...]:
    """Return the sort key of rows in tables: group, length, task, batch, method, budget."""
    task = "" if is_speed(row) else str(row["task"])
    batch = read_number(row, "batch") or 0.0 if not task else 0.0
    place = task.partition("/")[0], length_key(read_length(row)), task, batch
    return *place, MethodKey.of(row).order, budget_key(str(row.get("budget")))


def format_markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[str] = WORDS) -> str:
    """Return a table in Markdown; the columns named in ``words`` are aligned on the left."""
    rule = "|".join(" --- " if name in words else " ---: " for name in columns)
    lines = [f"| {' | '.join(map(escape_markdown, texts))} |" for texts in (columns, *rows)]
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]]) + "\n"


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return " ".join(text.split()).translate(_SPECIAL)
