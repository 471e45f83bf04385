"""How one method stands against others on the same samples: a verdict, its table, its picture."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vestige.bench.report.methods import Method
from vestige.bench.results.aggregate import Record, Row, bootstrap_interval


def verdict(records: Iterable[Record], ours: str, budget_of: Callable[[Record], str]) -> list[Row]:
    """Return by length, budget and method: bytes, the mean score over all tasks, its share of the full cache's, and by
    how much ours is above it.

    Samples are compared with themselves; intervals, 95 %, are by resampling them.

    Args:
        records: Of all lengths.
        ours: The policy that is judged.
        budget_of: Under which budget a record is compared; "1.0" for the full cache's.
    """
    cells: dict[tuple[int, str], dict[Method, dict[tuple[str, int], Record]]] = {}
    for record in records:
        at = record["length"], budget_of(record)
        cells.setdefault(at, {}).setdefault(Method.of(record["arm"]), {})[record["task"], record["index"]] = record
    rows = []
    for (length, budget), methods in cells.items():
        full = next((cell for method, cell in cells.get((length, "1.0"), {}).items() if method.policy == "full"), {})
        if budget == "1.0" or not full:
            continue
        own = next((cell for method, cell in methods.items() if method.policy == ours), {})
        for method, found in methods.items():
            named_by = {"policy": method.policy, "share": method.share, "peer": method.peer}
            if cell := {key: record for key, record in found.items() if key in full}:
                rows.append({"length": length, "budget": budget} | named_by | _row(cell, full, own))
    return sorted(rows, key=lambda row: (row["length"], -float(row["budget"]), -row["score"]))


def _row(cell: dict[Any, Record], full: dict[Any, Record], ours: dict[Any, Record]) -> Row:
    scores = {key: float(record["score"]) for key, record in cell.items()}
    mean, whole = (sum(float(some[key]["score"]) for key in scores) / len(scores) for some in (cell, full))
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


def table(rows: Iterable[Row], ours: str) -> str:
    """Return Markdown of :func:`verdict`."""
    lines = [
        f"| length | budget | method | samples | MB | score | of full | {ours} is above by |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        low, high = row["score_ci95"]
        above, ends = row["ours_above"], row["ours_above_ci95"]
        said = "" if above is None or row["policy"] == ours else f"{above:+.2f} ({ends[0]:+.2f} to {ends[1]:+.2f})"
        of_full = "" if row["of_full"] is None else f"{row['of_full']:.0%}"
        lines.append(
            f"| {row['length']} | {row['budget']} | {Method.of(row).label} | {row['n']} | {row['kv_bytes'] / 1e6:.2f} "
            f"| {row['score']:.2f} ({low:.2f} to {high:.2f}) | {of_full} | {said} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Row], length: int, title: str) -> str:
    """Return an SVG: the mean score of each method by measured bytes."""
    from vestige.bench.report.plots import Axis, Point, line_chart, lines_of

    drawn: dict[Method, list[Point]] = {}
    for row in rows:
        if row["length"] == length:
            point = Point(x=row["kv_bytes"] / 1e6, y=row["score"], interval=tuple(row["score_ci95"]))
            drawn.setdefault(Method.of(row), []).append(point)
    full = max((row for row in rows if row["length"] == length), key=lambda row: row["n"])["full"]
    return line_chart(
        f"{title}, {length:,} tokens, all tasks",
        lines_of(drawn),
        Axis(label="MB kept", log=True),
        level=Point(x=0, y=full),
        legend=True,
    )
