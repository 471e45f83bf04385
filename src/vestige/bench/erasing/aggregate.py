"""From records, one a sample and method, to rows, one a task, length, method and eviction."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vestige.bench.erasing.sample import Kind
from vestige.bench.results.aggregate import Record, Row, interval, median, resampled

MEANS = (
    "slots_dropped", "slots_replaced", "slots_left", "suffix_left", "tokens_recomputed", "held", "context_tokens",
)  # fmt: skip

Figure = Callable[[Record], float | None]
"""From a record to its sample's figure, the mean over its questions of a kind; None if it has no such question."""


def aggregate(
    records: Iterable[Record], facts: Mapping[str, Any], *, by: Sequence[str] = ("task", "length")
) -> list[Row]:
    """Return a row per cell and method, in the order in which they first appear.

    Args:
        records: Of samples, and of methods that failed (with ``error``).
        facts: What all rows share: model, split, seed, versions, ...
        by: What makes a cell beside the eviction; ``("task",)`` pools lengths, whose rows then have length None.
    """
    cells: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = (*(record[name] for name in by), *_eviction(record).values(), record["method"])
        cells.setdefault(key, []).append(record)
    rows = []
    for key, group in cells.items():
        bound = {_sample(one): one for one in cells.get((*key[:-1], "recompute"), []) if "error" not in one}
        head = {"task": None, "length": None} | dict(zip(by, key, strict=False))
        rows.append({**facts, **head, **_eviction(group[0]), "method": key[-1], **_row(group, bound)})
    return rows


def _row(group: list[Record], bound: Mapping[tuple[Any, ...], Record]) -> Row:
    """Return the figures of one cell and method."""
    errors = [record["error"] for record in group if "error" in record]
    done = [record for record in group if "error" not in record and record["questions"]]
    kept = [record for record in done if record["kept"]]
    row: Row = {"error": errors[0] if errors else None, "n": len(done), "n_kept": len(kept)}
    row["kept_only"] = any(record["kept_only"] for record in done)
    for end, some in (("", done), ("_kept", kept)):
        row |= _scored(some, bound, end)
    row |= {name: _mean([float(record[name]) for record in done]) for name in MEANS}
    row["span_tokens"] = _mean([float(sum(record["span_tokens"])) for record in done])
    return row | {"edit_s": median([record["edit_s"] for record in done])}


def _scored(records: list[Record], bound: Mapping[tuple[Any, ...], Record], end: str) -> Row:
    """Return scores of records, whose names end in ``end``."""
    row: Row = {}
    for name, figure in FIGURES.items():
        found = [value for record in records if (value := figure(record)) is not None]
        row[name + end] = _mean(found)
        if name in WITH_INTERVAL:
            row[f"{name}{end}_ci95"] = interval(found) if found else None
    for name in PAIRED:
        pairs = [
            (FIGURES[name](record), FIGURES[name](bound[_sample(record)]))
            for record in records
            if _sample(record) in bound
        ]
        differences = [one - other for one, other in pairs if one is not None and other is not None]
        row[f"{name}_over_recompute{end}"] = _mean(differences)
        row[f"{name}_over_recompute{end}_ci95"] = resampled(differences)
    return row


def _over(kind: Kind, name: str) -> Figure:
    """Return the mean over a sample's questions of one kind, of what one key of them says."""

    def figure(record: Record) -> float | None:
        values = [reply[name] for reply in record["questions"] if reply["kind"] == kind and reply[name] is not None]
        return _mean([float(value) for value in values])

    return figure


def _any_leak(record: Record) -> float | None:
    """Return whether any reply to a sample's leak questions says what was erased."""
    asked = [reply["leak"] for reply in record["questions"] if reply["kind"] == "leak"]
    return float(any(asked)) if asked else None


FIGURES: dict[str, Figure] = {
    "exact": _over("target", "exact"),
    "f1": _over("target", "f1"),
    "correct": _over("target", "correct"),
    "clean_correct": _over("target", "clean_correct"),
    "stale": _over("target", "leak"),
    "kl": _over("target", "kl"),
    "top1": _over("target", "top1"),
    "retained_exact": _over("retained", "exact"),
    "retained_correct": _over("retained", "correct"),
    "retained_clean_correct": _over("retained", "clean_correct"),
    "retained_kl": _over("retained", "kl"),
    "leak_rate": _any_leak,
}
"""``stale``: a target reply says what was erased. ``leak_rate``: so does a reply to any leak question."""
WITH_INTERVAL = frozenset({"exact", "f1", "correct", "retained_exact", "retained_correct", "leak_rate"})
PAIRED = ("exact", "f1", "retained_exact")


def _eviction(record: Record) -> dict[str, Any]:
    return {"policy": record["arm"]["policy"], "budget": record["arm"]["budget"]}


def _sample(record: Record) -> tuple[Any, ...]:
    return record["task"], record["length"], record["index"]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
