"""Verdict on one method against others on the same samples, with its table and its picture."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments.runner import format_interval
from vestige.bench.report.methods import MethodKey
from vestige.bench.report.tables import format_markdown
from vestige.bench.results.aggregate import Record, Row, bootstrap_interval


def verdict(records: Iterable[Record], ours: str, budget_of: Callable[[Record], str]) -> list[Row]:
    """Return rows of length, budget and method: bytes, mean score over all tasks, its share of the full cache's score,
    and the lead of our method.

    Differences are between methods on the same sample; 95 % intervals come from resampling the samples.

    Args:
        records: Of all lengths.
        ours: The policy to judge.
        budget_of: Returns the budget under which a record is compared; "1.0" for the full cache.
    """
    cells: dict[tuple[int, str], dict[MethodKey, dict[tuple[str, int], Record]]] = {}
    for record in records:
        at = record["length"], budget_of(record)
        cells.setdefault(at, {}).setdefault(MethodKey.of(record["arm"]), {})[record["task"], record["index"]] = record
    rows = []
    for (length, budget), methods in cells.items():
        full = next((cell for method, cell in cells.get((length, "1.0"), {}).items() if method.policy == "full"), {})
        if budget == "1.0" or not full:
            continue
        own = next((cell for method, cell in methods.items() if method.policy == ours), {})
        for method, found in methods.items():
            identity = {"policy": method.policy, "share": method.share, "peer": method.peer}
            if cell := {key: record for key, record in found.items() if key in full}:
                rows.append({"length": length, "budget": budget} | identity | _compare(cell, full, own))
    return sorted(rows, key=lambda row: (row["length"], -float(row["budget"]), -row["score"]))


def _compare(cell: dict[Any, Record], full: dict[Any, Record], ours: dict[Any, Record]) -> Row:
    scores = {key: float(record["score"]) for key, record in cell.items()}
    mean, whole = (sum(float(records[key]["score"]) for key in scores) / len(scores) for records in (cell, full))
    above = [float(ours[key]["score"]) - score for key, score in scores.items() if key in ours]
    return {
        "n": len(scores),
        "kv_bytes": sum(record["kv_bytes"] for record in cell.values()) / len(cell),
        "score": mean,
        "score_ci95": bootstrap_interval(list(scores.values())),
        "full": whole,
        "of_full": mean / whole if whole else None,
        "ours_above": sum(above) / len(above) if above else None,
        "ours_above_ci95": bootstrap_interval(above),
    }


def format_table(rows: Iterable[Row], ours: str) -> str:
    """Return Markdown of :func:`verdict`."""
    lines = []
    for row in rows:
        above = row["ours_above"]
        is_compared = above is not None and row["policy"] != ours
        lines.append(
            [
                str(row["length"]),
                row["budget"],
                MethodKey.of(row).label,
                str(row["n"]),
                f"{row['kv_bytes'] / 1e6:.2f}",
                format_interval(row["score"], row["score_ci95"], ".2f"),
                "" if row["of_full"] is None else f"{row['of_full']:.0%}",
                format_interval(above, row["ours_above_ci95"]) if is_compared else "",
            ]
        )
    columns = ("length", "budget", "method", "samples", "MB", "score", "of full", f"{ours} is above by")
    return format_markdown(columns, lines, words=("method",))


def draw_scores(rows: Sequence[Row], length: int, title: str) -> str:
    """Return the SVG of each method's mean score by measured bytes."""
    from vestige.bench.report.lines import make_lines
    from vestige.bench.report.plots import Axis, Point, draw_line_chart

    drawn: dict[MethodKey, list[Point]] = {}
    for row in rows:
        if row["length"] == length:
            point = Point(x=row["kv_bytes"] / 1e6, y=row["score"], interval=tuple(row["score_ci95"]))
            drawn.setdefault(MethodKey.of(row), []).append(point)
    full = max((row for row in rows if row["length"] == length), key=lambda row: row["n"])["full"]
    return draw_line_chart(
        f"{title}, {length:,} tokens, all tasks",
        make_lines(drawn),
        Axis(label="MB kept", log=True),
        level=Point(x=0, y=full),
        legend=True,
    )
