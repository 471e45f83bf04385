"""Rows of results of erasers, one a task, length, eviction and eraser, from records, one a sample and eraser."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vestige.bench.erasing.sample import Kind
from vestige.bench.results.aggregate import (
    Record,
    Row,
    bootstrap_interval,
    find_mean,
    find_median,
    group_by,
    wilson_interval,
)

MEANS = (
    "slots_dropped", "slots_replaced", "slots_left", "suffix_left", "tokens_recomputed", "held", "context_tokens",
)  # fmt: skip

Figure = Callable[[Record], float | None]
"""A function from a record to one number, the mean over its questions of a kind; None if it has no such question."""


def aggregate(
    records: Iterable[Record], facts: Mapping[str, Any], *, by: Sequence[str] = ("task", "length")
) -> list[Row]:
    """Return a row per cell and eraser, in the order in which they first appear.

    Args:
        records: Those of samples, and of erasers that failed (with ``error``).
        facts: Columns that all rows share: model, split, seed, versions, ...
        by: Keys that make a cell, beside the eviction; ``("task",)`` pools lengths, and rows then have length None.
    """
    cells = group_by(
        records, lambda record: (*(record[name] for name in by), *_eviction(record).values(), record["method"])
    )
    rows = []
    for key, group in cells.items():
        bound = {_sample(record): record for record in cells.get((*key[:-1], "recompute"), []) if "error" not in record}
        head = {"task": None, "length": None} | dict(zip(by, key, strict=False))
        rows.append({**facts, **head, **_eviction(group[0]), "method": key[-1], **_make_row(group, bound)})
    return rows


def _make_row(group: list[Record], bound: Mapping[tuple[Any, ...], Record]) -> Row:
    """Return the figures of one cell and eraser, beside the bound's records of the same samples."""
    errors = [record["error"] for record in group if "error" in record]
    done = [record for record in group if "error" not in record and record["questions"]]
    kept = [record for record in done if record["kept"]]
    row: Row = {"error": errors[0] if errors else None, "n": len(done), "n_kept": len(kept)}
    row["kept_only"] = any(record["kept_only"] for record in done)
    row |= _score(done, bound, "") | _score(kept, bound, "_kept")
    row |= {name: find_mean([float(record[name]) for record in done]) for name in MEANS}
    row["span_tokens"] = find_mean([float(sum(record["span_tokens"])) for record in done])
    return row | {"edit_s": find_median([record["edit_s"] for record in done])}


def _score(records: list[Record], bound: Mapping[tuple[Any, ...], Record], end: str) -> Row:
    """Return the scores of records, under names that end in ``end``."""
    row: Row = {}
    for name, figure in FIGURES.items():
        found = [value for record in records if (value := figure(record)) is not None]
        row[name + end] = find_mean(found)
        if name in WITH_INTERVAL:
            row[f"{name}{end}_ci95"] = wilson_interval(found) if found else None
    for name in PAIRED:
        pairs = [
            (FIGURES[name](record), FIGURES[name](bound[_sample(record)]))
            for record in records
            if _sample(record) in bound
        ]
        differences = [value - most for value, most in pairs if value is not None and most is not None]
        row[f"{name}_over_recompute{end}"] = find_mean(differences)
        row[f"{name}_over_recompute{end}_ci95"] = bootstrap_interval(differences)
    return row


def _mean_over(kind: Kind, name: str) -> Figure:
    """Return the figure that is the mean of one key over a sample's questions of one kind."""

    def figure(record: Record) -> float | None:
        values = [reply[name] for reply in record["questions"] if reply["kind"] == kind and reply[name] is not None]
        return find_mean([float(value) for value in values])

    return figure


def _any_leak(record: Record) -> float | None:
    """Return 1 if any reply to a sample's leak questions says what was erased."""
    leaks = [reply["leak"] for reply in record["questions"] if reply["kind"] == "leak"]
    return float(any(leaks)) if leaks else None


FIGURES: dict[str, Figure] = {
    "exact": _mean_over("target", "exact"),
    "f1": _mean_over("target", "f1"),
    "correct": _mean_over("target", "correct"),
    "clean_correct": _mean_over("target", "clean_correct"),
    "stale": _mean_over("target", "leak"),
    "kl": _mean_over("target", "kl"),
    "top1": _mean_over("target", "top1"),
    "retained_exact": _mean_over("retained", "exact"),
    "retained_correct": _mean_over("retained", "correct"),
    "retained_clean_correct": _mean_over("retained", "clean_correct"),
    "retained_kl": _mean_over("retained", "kl"),
    "leak_rate": _any_leak,
}
"""``stale``: a target reply says what was erased. ``leak_rate``: so does a reply to any leak question."""
WITH_INTERVAL = frozenset({"exact", "f1", "correct", "retained_exact", "retained_correct", "leak_rate"})
PAIRED = ("exact", "f1", "retained_exact")


def _eviction(record: Record) -> dict[str, Any]:
    return {"policy": record["arm"]["policy"], "budget": record["arm"]["budget"]}


def _sample(record: Record) -> tuple[Any, ...]:
    return record["task"], record["length"], record["index"]
