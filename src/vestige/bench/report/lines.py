"""Lines of charts: from rows or points to one line for each method, its style and its place in a legend."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vestige.bench.report.methods import MethodKey, Style, assign_styles
from vestige.bench.report.plots import Line, Point
from vestige.bench.report.rows import Row, budget_key, read_interval, read_number

Styles = dict[MethodKey, Style]
STRONGEST = 10
"""Number of lines that may be strong in one picture."""


def make_lines(drawn: Mapping[MethodKey, Sequence[Point]]) -> list[Line]:
    """Return a line for each method, in the order of a legend, each from left to right."""
    return [
        Line(label=method.label, style=style, points=tuple(sorted(drawn[method], key=lambda point: point.x)))
        for method, style in assign_styles(drawn).items()
    ]


def trace_rows(
    rows: Iterable[Row],
    styles: Styles,
    x: Callable[[Row], float | None],
    y: Callable[[Row], float | None] = lambda row: read_number(row, "score"),
    *,
    by_budget: bool = False,
) -> dict[MethodKey, Line]:
    """Return a line for each method, by ``x`` or by budget; rows that lack a value are left out."""
    points: dict[MethodKey, list[tuple[Any, Point]]] = {}
    for row in rows:
        across, up = x(row), y(row)
        if across is not None and up is not None and across > 0:
            order = budget_key(str(row.get("budget"))) if by_budget else across
            point = Point(x=across, y=up, interval=read_interval(row))
            points.setdefault(MethodKey.of(row), []).append((order, point))
    lines = {}
    for method in sorted(points, key=lambda method: method.order):
        ordered = sorted(points[method], key=lambda pair: pair[0])
        lines[method] = Line(label=method.label, style=styles[method], points=tuple(point for _, point in ordered))
    return lines


def find_full(rows: Iterable[Row]) -> Point | None:
    """Return the score of the full cache."""
    for row in rows:
        score = read_number(row, "score")
        if MethodKey.of(row).kind == "full" and score is not None:
            return Point(x=1.0, y=score, interval=read_interval(row))
    return None


def emphasize(lines: dict[MethodKey, Line], *, full: bool = False) -> list[Line]:
    """Return the lines, at most ten of them strong: ours, or else those of peers."""
    own = [m for m in lines if m.kind == "own" or (full and m.kind == "full")] or [m for m in lines if m.kind == "peer"]
    strong = set(own[:STRONGEST])
    return [replace(line, style=replace(line.style, strong=method in strong)) for method, line in lines.items()]


def make_legend(methods: Iterable[MethodKey], styles: Styles) -> tuple[tuple[Style, str], ...]:
    """Return (style, label) of methods, each once and in order."""
    return tuple((styles[method], method.label) for method in sorted(set(methods), key=lambda method: method.order))
