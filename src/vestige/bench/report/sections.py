"""Sections of a report: the pictures of a chapter or of speed, with their legends and a few words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vestige.bench.report import plots
from vestige.bench.report.lines import (
    STRONGEST,
    Styles,
    emphasize,
    find_full,
    make_legend,
    trace_rows,
)
from vestige.bench.report.methods import MethodKey, Style
from vestige.bench.report.plots import Axis, Line, Point
from vestige.bench.report.rows import (
    Mean,
    Row,
    budget_key,
    find_bytes_fraction,
    find_group,
    group_by_cell,
    group_rows,
    read_interval,
    read_length,
    read_number,
)
from vestige.bench.report.tables import title_cell

_BYTES = Axis(label="cache bytes, measured (of the full cache)", log=True, percent=True)
_DECODE = Axis(label="decode, ms per token")
_TURN = Axis(label="turn", whole=True)
_UNEVEN = 0.01
DYNAMIC = MethodKey(policy="transformers:dynamic", peer="transformers:dynamic")
"""The cache of ``full_decode_ms`` in rows of ``bench speed``: a DynamicCache."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a text, and pictures; ``legend`` names the lines of all its pictures."""

    title: str
    text: str
    pictures: tuple[str, ...]
    legend: tuple[tuple[Style, str], ...] = ()


def make_sections(rows: Sequence[Row], means: Sequence[Mean], styles: Styles) -> list[Section]:
    """Return the sections of a chapter, given its rows and their means over tasks, that have a picture."""
    sections = [*(_show_families(mean, styles) for mean in means), _show_tasks(rows, styles)]
    sections += [_show_decode_times(rows, means, styles), _show_needles(rows)]
    sections += [_show_turns(rows, styles), _show_kept(rows)]
    return [section for section in sections if section.pictures]


def _show_families(mean: Mean, styles: Styles) -> Section:
    """Return a picture for each family: ours, its peers, and the controls behind them."""
    lines, level = trace_rows(mean.rows, styles, find_bytes_fraction), find_full(mean.rows)
    controls = [method for method in lines if method.kind == "control" and method.peer is None]
    pictures, shown = [], set(controls)
    # The picture of the one task is below; families tell more of several tasks, or of many methods.
    is_worthwhile = _is_sweep(lines) and (len(mean.tasks) > 1 or len(lines) > STRONGEST)
    for family, members in _group_by_family(lines).items() if is_worthwhile else ():
        strong = [replace(lines[method], style=replace(lines[method].style, strong=True)) for method in members]
        shown |= set(members)
        drawn = [*strong, *(lines[method] for method in controls)]
        pictures.append(plots.draw_line_chart(family, drawn, _BYTES, level=level))
    text = (
        "Score against measured bytes, a picture for each family of methods: ours solid, other packages dashed, the "
        "controls in grey behind them. Higher and further left is better. The black line is the full cache, the band "
        "its interval."
    )
    if mean.partial:
        text += f" Without a mean, since a task is missing: {', '.join(method.label for method in mean.partial)}."
    return Section(
        title=f"Headline: {mean.title}", text=text, pictures=tuple(pictures), legend=make_legend(shown, styles)
    )


def _is_sweep(lines: dict[MethodKey, Line]) -> bool:
    return any(len(line.points) > 1 for line in lines.values())  # some method has several budgets


def _group_by_family(methods: Iterable[MethodKey]) -> dict[str, list[MethodKey]]:
    """Return methods by family; families of other packages alone share one picture."""
    families: dict[str, list[MethodKey]] = {}
    for method in methods:
        if method.kind in ("own", "peer") and method.family != "full":
            families.setdefault(method.family, []).append(method)
    foreign = [family for family, members in families.items() if all(method.peer for method in members)]
    others = [method for family in foreign for method in families.pop(family)]
    return families | ({"other packages": others} if others else {})


def _show_tasks(rows: Sequence[Row], styles: Styles) -> Section:
    pictures = []
    for cell, part in group_by_cell(rows).items():
        lines = trace_rows(part, styles, find_bytes_fraction)
        pictures.append(_draw_task(title_cell(*cell), lines, find_full(part)) if lines else "")
    return Section(
        title="Accuracy against measured bytes",
        text="A picture for each task and length, with every method that ran. Intervals are drawn for our methods; the "
        "table has all of them. Where there is one budget only, methods are listed with their bytes on the right.",
        pictures=tuple(filter(None, pictures)),
        legend=make_legend(map(MethodKey.of, rows), styles),
    )


def _draw_task(title: str, lines: dict[MethodKey, Line], level: Point | None) -> str:
    if _is_sweep(lines):
        return plots.draw_line_chart(title, emphasize(lines), _BYTES, level=level)
    singles = [line for method, line in lines.items() if method.kind != "full"]
    notes = [f"{100 * line.points[0].x:.0f} % bytes" for line in singles]
    return plots.draw_dot_chart(title, singles, notes, level=level) if singles else ""


def _show_decode_times(rows: Sequence[Row], means: Iterable[Mean], styles: Styles) -> Section:
    pictures = []
    for mean in means:
        lines = trace_rows(mean.rows, styles, lambda row: read_number(row, "decode_ms"), by_budget=True)
        if lines:
            level = find_full(mean.rows)
            pictures.append(plots.draw_line_chart(mean.title, emphasize(lines), _DECODE, level=level))
    return Section(
        title="Accuracy against decode time",
        text="Milliseconds of one decode step against score; a line joins a method's budgets. Higher and further left "
        "is better. Times are of this machine and this run: compare within a picture only.",
        pictures=tuple(pictures),
        legend=make_legend(map(MethodKey.of, rows), styles),
    )


def _show_needles(rows: Sequence[Row]) -> Section:
    needles = [row for row in rows if find_group(row) == "niah" and _score_by_depth(row)]
    tasks = group_rows(needles, lambda row: str(row["task"]))
    return Section(
        title="Needle in a haystack, by depth",
        text="Score by how deep the needle lies: 0 % is the beginning of the context. Yellow: found; dark blue: not.",
        pictures=tuple(picture for task, part in tasks.items() for picture in _draw_needles(task, part)),
    )


def _draw_needles(task: str, rows: Sequence[Row]) -> list[str]:
    """Return depth by length for each method and budget, or depth by budget for each method if there is one length."""
    by_length = len({read_length(row) or 0 for row in rows}) > 1
    panels: dict[tuple[MethodKey, str], dict[str, Row]] = {}
    rows = sorted(rows, key=lambda row: (budget_key(str(row.get("budget"))), read_length(row) or 0))
    for row in sorted(rows, key=lambda row: MethodKey.of(row).order):
        budget = str(row.get("budget"))
        panel, column = (budget, f"{read_length(row):,}") if by_length else ("", budget)
        panels.setdefault((MethodKey.of(row), panel), {})[column] = row
    pictures = []
    for (method, budget), columns in panels.items():
        scores = [_score_by_depth(row) for row in columns.values()]
        depths = sorted({depth for column in scores for depth in column})
        grid = [[column.get(depth) for column in scores] for depth in depths]
        at = f" at {budget}" if budget and method.kind != "full" else ""
        subject = "" if task == "niah" else f"{task}: "
        names = [f"{100 * depth if max(depths) <= 1 else depth:.3g} %" for depth in depths]
        labels = "depth", "length" if by_length else "budget"
        pictures.append(plots.draw_heat_map(f"{subject}{method.label}{at}", grid, names, list(columns), labels))
    return pictures


def _score_by_depth(row: Row) -> dict[float, float]:
    """Return a row's mean score at each depth."""
    found: dict[float, list[tuple[float, float]]] = {}
    for part in row.get("parts") or ():
        depth, score = read_number(part.get("tags") or {}, "depth"), read_number(part, "score")
        if depth is not None and score is not None:
            found.setdefault(depth, []).append((score, read_number(part, "n") or 1.0))
    return {depth: sum(s * n for s, n in scores) / sum(n for _, n in scores) for depth, scores in found.items()}


def _show_turns(rows: Sequence[Row], styles: Styles) -> Section:
    pictures, shown = list[str](), set[MethodKey]()
    for cell, part in group_by_cell(row for row in rows if _find_turns(row)).items():
        full = [row for row in part if MethodKey.of(row).kind == "full"]
        others = [row for row in part if row not in full]
        by_budget = group_rows(others, lambda row: str(row.get("budget")), budget_key) or {"1.0": []}
        for budget, members in by_budget.items():
            methods = {MethodKey.of(row): _find_turns(row) for row in [*members, *full]}
            lines = {
                method: Line(label=method.label, style=styles[method], points=methods[method])
                for method in sorted(methods, key=lambda method: method.order)
            }
            title = f"{title_cell(*cell)}, budget {budget}"
            pictures.append(plots.draw_line_chart(title, emphasize(lines, full=True), _TURN))
            shown |= set(lines)
    return Section(
        title="Dialogue, by turn",
        text="Score of each turn of a conversation over one cache, which is evicted between turns.",
        pictures=tuple(pictures),
        legend=make_legend(shown, styles),
    )


def _find_turns(row: Row) -> tuple[Point, ...]:
    """Return the score of each turn, the first at 1."""
    points = []
    for part in row.get("turns") or ():
        turn, score = read_number(part, "turn"), read_number(part, "score")
        if turn is not None and score is not None:
            points.append(Point(x=turn + 1, y=score, interval=read_interval(part)))
    return tuple(sorted(points, key=lambda point: point.x))


def _show_kept(rows: Sequence[Row]) -> Section:
    arms = group_rows(
        [row for row in rows if _find_kept(row)],
        lambda row: (find_group(row), read_length(row), MethodKey.of(row), str(row.get("budget"))),
        lambda arm: (arm[0], arm[1] or 0, arm[2].order, budget_key(arm[3])),
    )
    pictures = []
    for (group, length, method, budget), part in arms.items():
        grid = _average_kept([_find_kept(row) for row in part])
        fractions = [head for layer in grid for head in layer]
        if fractions and max(fractions) - min(fractions) > _UNEVEN:
            at = f" at {budget}" if method.kind != "full" else ""
            pictures.append(plots.draw_kept_map(f"{method.label}{at}, {title_cell(group, length)}", grid))
    return Section(
        title="What each layer and head kept",
        text="Pairs held, as a share of the tokens seen: bars are the mean of a layer, cells its KV heads. Methods "
        "whose heads all keep the same number, as with share head, have no picture.",
        pictures=tuple(pictures),
    )


def _find_kept(row: Row) -> list[list[float]]:
    """Return kept over seen, a list for each layer; empty if the row does not have it."""
    kept, full = row.get("kept") or [], read_number(row, "full")
    if not isinstance(kept, list) or not all(isinstance(layer, list) and layer for layer in kept) or not full:
        return []
    seen = full / sum(map(len, kept)) if kept else 0.0
    return [[float(head) / seen for head in layer] for layer in kept]


def _average_kept(grids: Sequence[list[list[float]]]) -> list[list[float]]:
    if len({tuple(map(len, grid)) for grid in grids}) > 1:
        return []
    return [[sum(h) / len(h) for h in zip(*layer, strict=True)] for layer in zip(*grids, strict=True)]


def make_speed_sections(rows: Sequence[Row], styles: Styles) -> list[Section]:
    """Return decode time over the floor against length, a picture for each batch and budget."""
    timed = [row for row in rows if read_number(row, "length") is not None and _read_over_floor(row) is not None]
    panels = group_rows(
        [row for row in timed if str(row.get("budget")) != "1.0"],
        lambda row: (read_number(row, "batch") or 1.0, str(row.get("budget"))),
        lambda panel: (panel[0], budget_key(panel[1])),
    )
    section = Section(
        title="Speed",
        text="Time of a decode step over the floor, which is the same loop with an empty cache: 1 means that the "
        "cache costs nothing. Medians over interleaved repeats.",
        pictures=tuple(
            _draw_speed(f"budget {budget}, batch {batch:.0f}", part, styles) for (batch, budget), part in panels.items()
        ),
        legend=make_legend([*map(MethodKey.of, rows), DYNAMIC], styles),
    )
    return [section] if section.pictures else []


def _draw_speed(title: str, rows: Sequence[Row], styles: Styles) -> str:
    shown = emphasize(trace_rows(rows, styles, lambda row: read_number(row, "length"), y=_read_over_floor))
    full = dict[float, float]()
    for row in rows:
        length, decode, floor = (read_number(row, key) for key in ("length", "full_decode_ms", "floor_ms"))
        if length is not None and decode is not None and floor:
            full[length] = decode / floor
    if full:
        points = tuple(Point(x=length, y=full[length]) for length in sorted(full))
        shown.append(Line(label="DynamicCache", style=styles[DYNAMIC], points=points))
    highest = max(point.y for line in shown for point in line.points)
    lengths = Axis(label="length, tokens", log=True, whole=True)
    return plots.draw_line_chart(title, shown, lengths, Axis(label="decode time / floor", limits=(0.9, 1.1 * highest)))


def _read_over_floor(row: Row) -> float | None:
    return read_number(row, "decode_over_floor")
