"""Tables of a report: which columns there are and what stands in a cell, for the page and for Markdown."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vestige.bench.report.methods import Method
from vestige.bench.report.rows import (
    Mean,
    Row,
    at_length,
    budget_key,
    by_length,
    bytes_fraction,
    interval,
    is_speed,
    length_of,
    number,
    reason,
)

NOTHING = "–"  # noqa: RUF001  (what an empty cell shows)


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and what it is sorted by if that is a number."""

    text: str
    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns and rows of cells."""

    columns: tuple[str, ...]
    words: frozenset[str]
    """Columns that hold words, and so begin on the left."""
    rows: tuple[tuple[Cell, ...], ...]


Column = Callable[[Row], Cell]


def _word(key: str) -> Column:
    return lambda row: Cell(NOTHING if row.get(key) in (None, "") else str(row[key]))


def _number(key: str, spec: str, scale: float = 1.0) -> Column:
    def cell(row: Row) -> Cell:
        value = number(row, key)
        return Cell(NOTHING) if value is None else Cell(format(value * scale, spec), value)

    return cell


def _percent(fraction: float | None) -> Cell:
    return Cell(NOTHING) if fraction is None else Cell(f"{100 * fraction:.1f} %", fraction)


def _interval(row: Row) -> Cell:
    ends = interval(row)
    return Cell(NOTHING) if ends is None else Cell(f"{ends[0]:.2f} to {ends[1]:.2f}", ends[0])


def _budget(row: Row) -> Cell:
    text = str(row.get("budget") or NOTHING)
    kind, value, _ = budget_key(text)
    return Cell(text, -value if kind < 2 else None)


_METHOD: Column = lambda row: Cell(Method.of(row).label)  # noqa: E731
_NUMBERS: dict[str, Column] = {
    "score": _number("score", ".3f"),
    "95 % interval": _interval,
    "n": _number("n", ".0f"),
    "kept": lambda row: _percent(number(row, "kept_fraction")),
    "bytes": lambda row: _percent(bytes_fraction(row)),
    "MB": _number("kv_bytes", ",.2f", 1e-6),
    "decode ms": _number("decode_ms", ".1f"),
}
_ALL: dict[str, Column] = {
    "task": _word("task"),
    "length": _number("length", ",.0f"),
    "method": _METHOD,
    "budget": _budget,
    **_NUMBERS,
    "peak MB": _number("peak_kv_bytes", ",.2f", 1e-6),
    "memory MB": _number("memory_bytes", ",.2f", 1e-6),
    "prefill s": _number("prefill_s", ".2f"),
    "evict s": _number("evict_s", ".2f"),
    "batch": _number("batch", ".0f"),
    "model": _word("model"),
    "split": _word("split"),
    "note": _word("note"),
}
_FAILED: dict[str, Column] = {
    "task": lambda row: Cell(str(row.get("task", "speed"))),
    "length": _number("length", ",.0f"),
    "method": _METHOD,
    "budget": _budget,
    "reason": lambda row: Cell(reason(row)),
}
_SPEED: dict[str, Column] = {
    "length": _number("length", ",.0f"),
    "batch": _number("batch", ".0f"),
    "method": _METHOD,
    "budget": _budget,
    "decode ms": _number("decode_ms", ".1f"),
    "floor ms": _number("floor_ms", ".1f"),
    "decode / floor": _number("decode_over_floor", ".2f"),
    "speedup": _number("decode_speedup", ".2f"),
    "prefill s": _number("prefill_s", ".2f"),
    "prefill / full": _number("prefill_overhead", ".2f"),
    "evict s": _number("evict_s", ".2f"),
    "MB": _number("kv_bytes", ",.2f", 1e-6),
    "peak MB": _number("peak_kv_bytes", ",.2f", 1e-6),
    "model": _word("model"),
    "note": lambda row: Cell("random weights" if row.get("random_weights") else str(row.get("note") or NOTHING)),
}
_WORDS = frozenset({"task", "method", "budget", "model", "split", "note", "reason"})
_MAY_BE_ALIKE = ("model", "split", "batch", "memory MB", "note")


def all_rows(rows: Sequence[Row]) -> Table:
    """Return every row with a score; a column that says the same everywhere is left to the provenance."""
    return _table(_ALL, sorted(rows, key=row_order), drop=_MAY_BE_ALIKE)


def failed_rows(rows: Sequence[Row]) -> Table:
    """Return the rows without a score, with their reasons."""
    return _table(_FAILED, sorted(rows, key=row_order))


def speed_rows(rows: Sequence[Row]) -> Table:
    """Return the rows of ``bench speed``."""
    return _table(_SPEED, sorted(rows, key=row_order), drop=("model", "note"))


def task_rows(rows: Sequence[Row]) -> Table:
    """Return the rows of one task and length."""
    return _table({"method": _METHOD, "budget": _budget, **_NUMBERS}, sorted(rows, key=row_order))


def headline(mean: Mean) -> Table:
    """Return scores by method and budget: ``score (95 % interval) · bytes in percent of the full cache``."""
    budgets = sorted({str(row["budget"]) for row in mean.rows}, key=budget_key)
    arms = {(Method.of(row), str(row["budget"])): row for row in mean.rows}
    methods = sorted({method for method, _ in arms}, key=lambda method: method.order)
    return Table(
        columns=("method", *(f"budget {budget}" for budget in budgets)),
        words=_WORDS,
        rows=tuple((Cell(m.label), *(_headline_cell(arms.get((m, b))) for b in budgets)) for m in methods),
    )


def _headline_cell(row: Row | None) -> Cell:
    score = None if row is None else number(row, "score")
    if row is None or score is None:
        return Cell(NOTHING)
    ends, fraction = interval(row), bytes_fraction(row)
    text = f"{score:.2f}" + (f" ({ends[0]:.2f} to {ends[1]:.2f})" if ends else "")
    return Cell(text + (f" · {100 * fraction:.0f} %" if fraction is not None else ""), score)


def provenance(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Return what is known of the rows' origin, each fact once: (name, values)."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        versions = row.get("versions")
        facts = {key: row.get(key) for key in ("model", "revision", "device", "dtype", "split", "seed")}
        facts |= {"question-aware": row.get("question_aware"), "chunk": row.get("chunk"), "batch": row.get("batch")}
        facts |= (
            {f"{name} version": value for name, value in sorted(versions.items())} if isinstance(versions, dict) else {}
        )
        for name, value in facts.items():
            if value is not None:
                found.setdefault(name, {})[
                    {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
                ] = None
    return [(name, ", ".join(sorted(values))) for name, values in found.items()]


def cell_title(task: str, length: int | None) -> str:
    """Return the title of one task at one length."""
    return f"{task}, {at_length(length)}"


def row_order(row: Row) -> tuple[object, ...]:
    """Return what rows are sorted by in tables."""
    task = "" if is_speed(row) else str(row["task"])
    place = task.partition("/")[0], by_length(length_of(row)), task, number(row, "batch") or 0.0 if not task else 0.0
    return *place, Method.of(row).order, budget_key(str(row.get("budget")))


def _table(columns: dict[str, Column], rows: Sequence[Row], drop: Sequence[str] = ()) -> Table:
    cells = {name: [make(row) for row in rows] for name, make in columns.items()}
    shown = [name for name in columns if name not in drop or len({cell.text for cell in cells[name]}) > 1]
    return Table(columns=tuple(shown), words=_WORDS, rows=tuple(zip(*(cells[name] for name in shown), strict=True)))
