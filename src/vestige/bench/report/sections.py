"""What a report shows of a chapter, in order: pictures with their legends and a few plain words."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from vestige.bench.report import plots
from vestige.bench.report.methods import Look, Method
from vestige.bench.report.plots import Axis, Line, Point
from vestige.bench.report.rows import (
    Chapter,
    Mean,
    Row,
    budget_key,
    bytes_fraction,
    cells,
    group_of,
    interval,
    length_of,
    means,
    number,
)
from vestige.bench.report.tables import cell_title

_BYTES = Axis(label="cache bytes, measured (of the full cache)", log=True, percent=True)
_DECODE = Axis(label="decode, ms per token")
_TURN = Axis(label="turn", whole=True)
_UNEVEN = 0.01
_STRONGEST = 10

Looks = dict[Method, Look]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, what to know, and pictures; ``legend`` names the lines of all its pictures."""

    title: str
    text: str
    pictures: tuple[str, ...]
    legend: tuple[tuple[Look, str], ...] = ()


def sections(chapter: Chapter, looks: Looks) -> list[Section]:
    """Return the sections of a chapter that have something to show."""
    made = [*map(lambda mean: _families(mean, looks), means(chapter.rows)), _tasks(chapter, looks)]
    made += [_decode(chapter, looks), _needles(chapter), _turns(chapter, looks), _kept(chapter)]
    return [section for section in made if section.pictures]


def _families(mean: Mean, looks: Looks) -> Section:
    """Return a picture for each family: ours, its peers, and the controls behind them."""
    lines, level = _lines(mean.rows, looks, bytes_fraction), _level(mean.rows)
    behind = [line for method, line in lines.items() if method.kind == "control" and method.peer is None]
    pictures, shown = [], set()
    for family, members in _by_family(lines).items() if _has_much(mean, lines) else ():
        twins = [replace(lines[method], look=replace(lines[method].look, strong=True)) for method in members]
        shown |= set(members)
        pictures.append(plots.line_chart(family, [*twins, *behind], _BYTES, level=level))
    shown |= {method for method in lines if method.kind == "control" and method.peer is None}
    text = (
        "Score against measured bytes, a picture for each family of methods: ours solid, other packages dashed, the "
        "controls in grey behind them. Higher and further left is better. The black line is the full cache, the band "
        "its interval."
    )
    if mean.partial:
        text += f" Without a mean, since a task is missing: {', '.join(method.label for method in mean.partial)}."
    return Section(title=f"Headline: {mean.title}", text=text, pictures=tuple(pictures), legend=_legend(shown, looks))


def _has_much(mean: Mean, lines: dict[Method, Line]) -> bool:
    """Return whether families tell more than the picture of the one task, which is below."""
    return _is_sweep(lines.values()) and (len(mean.tasks) > 1 or len(lines) > _STRONGEST)


def _by_family(methods: Iterable[Method]) -> dict[str, list[Method]]:
    """Return methods by family; families that only other packages have share one picture."""
    found: dict[str, list[Method]] = {}
    for method in methods:
        if method.kind in ("own", "peer") and method.family != "full":
            found.setdefault(method.family, []).append(method)
    alone = [family for family, members in found.items() if all(method.peer for method in members)]
    others = [method for family in alone for method in found.pop(family)]
    return found | ({"other packages": others} if others else {})


def _tasks(chapter: Chapter, looks: Looks) -> Section:
    pictures = []
    for (task, length), rows in cells(chapter.rows).items():
        lines = _lines(rows, looks, bytes_fraction)
        pictures.append(_task_picture(cell_title(task, length), lines, _level(rows)) if lines else "")
    return Section(
        title="Accuracy against measured bytes",
        text="A picture for each task and length, with every method that ran. Intervals are drawn for our methods; the "
        "table has all of them. Where there is one budget only, methods are listed with their bytes on the right.",
        pictures=tuple(filter(None, pictures)),
        legend=_legend(map(Method.of, chapter.rows), looks),
    )


def _task_picture(title: str, lines: dict[Method, Line], level: Point | None) -> str:
    if _is_sweep(lines.values()):
        return plots.line_chart(title, _emphasised(lines), _BYTES, level=level)
    singles = [line for method, line in lines.items() if method.kind != "full"]
    notes = [f"{100 * line.points[0].x:.0f} % bytes" for line in singles]
    return plots.dot_chart(title, singles, notes, level=level) if singles else ""


def _decode(chapter: Chapter, looks: Looks) -> Section:
    pictures = []
    for mean in means(chapter.rows):
        lines = _lines(mean.rows, looks, lambda row: number(row, "decode_ms"), by_budget=True)
        if lines:
            pictures.append(plots.line_chart(mean.title, _emphasised(lines), _DECODE, level=_level(mean.rows)))
    return Section(
        title="Accuracy against decode time",
        text="Milliseconds of one decode step against score; a line joins a method's budgets. Higher and further left "
        "is better. Times are of this machine and this run: compare within a picture only.",
        pictures=tuple(pictures),
        legend=_legend(map(Method.of, chapter.rows), looks),
    )


def _needles(chapter: Chapter) -> Section:
    pictures = []
    tasks: dict[str, list[Row]] = {}
    for row in chapter.rows:
        if group_of(row) == "niah" and _by_depth(row):
            tasks.setdefault(str(row["task"]), []).append(row)
    for task, rows in sorted(tasks.items()):
        pictures += _needle_maps(task, rows)
    return Section(
        title="Needle in a haystack, by depth",
        text="Score by how deep the needle lies: 0 % is the beginning of the context. Yellow: found; dark blue: not.",
        pictures=tuple(pictures),
    )


def _needle_maps(task: str, rows: Sequence[Row]) -> list[str]:
    """Return depth by length for each method and budget, or depth by budget for each method if there is one length."""
    lengths = sorted({length_of(row) or 0 for row in rows})
    panels: dict[tuple[Method, str], dict[str, Row]] = {}
    ordered = sorted(
        rows, key=lambda row: (Method.of(row).order, budget_key(str(row.get("budget"))), length_of(row) or 0)
    )
    for row in ordered:
        budget = str(row.get("budget"))
        if len(lengths) > 1:
            panels.setdefault((Method.of(row), budget), {})[f"{length_of(row):,}"] = row
        else:
            panels.setdefault((Method.of(row), ""), {})[budget] = row
    made = []
    for (method, budget), columns in panels.items():
        scores = {name: _by_depth(row) for name, row in columns.items()}
        depths = sorted({depth for column in scores.values() for depth in column})
        grid = [[column.get(depth) for column in scores.values()] for depth in depths]
        at = f" at {budget}" if budget and method.kind != "full" else ""
        subject = "" if task == "niah" else f"{task}: "
        labels = "depth", ("length" if len(lengths) > 1 else "budget")
        names = [f"{100 * depth if max(depths) <= 1 else depth:.3g} %" for depth in depths]
        made.append(plots.heat_map(f"{subject}{method.label}{at}", grid, names, list(columns), labels))
    return made


def _by_depth(row: Row) -> dict[float, float]:
    """Return a row's mean score at each depth."""
    found: dict[float, list[tuple[float, float]]] = {}
    for part in row.get("parts") or ():
        depth, score = number(part.get("tags") or {}, "depth"), number(part, "score")
        if depth is not None and score is not None:
            found.setdefault(depth, []).append((score, number(part, "n") or 1.0))
    return {depth: sum(s * n for s, n in scores) / sum(n for _, n in scores) for depth, scores in found.items()}


def _turns(chapter: Chapter, looks: Looks) -> Section:
    pictures, shown = [], []
    talks = [row for row in chapter.rows if _turn_points(row)]
    for (task, length), rows in cells(talks).items():
        wholes = [row for row in rows if Method.of(row).kind == "full"]
        budgets = sorted({str(r.get("budget")) for r in rows if r not in wholes}, key=budget_key) or ["1.0"]
        for budget in budgets:
            beside = sorted(
                [row for row in rows if str(row.get("budget")) == budget and row not in wholes] + wholes,
                key=lambda row: Method.of(row).order,
            )
            methods = [Method.of(row) for row in beside]
            lines = {m: _line(m, looks, _turn_points(row)) for m, row in zip(methods, beside, strict=True)}
            title = f"{cell_title(task, length)}, budget {budget}"
            pictures.append(plots.line_chart(title, _emphasised(lines, full=True), _TURN))
            shown += methods
    return Section(
        title="Dialogue, by turn",
        text="Score of each turn of a conversation over one cache, which is evicted between turns.",
        pictures=tuple(pictures),
        legend=_legend(shown, looks),
    )


def _turn_points(row: Row) -> tuple[Point, ...]:
    points = []
    for part in row.get("turns") or ():
        turn, score = number(part, "turn"), number(part, "score")
        if turn is not None and score is not None:
            points.append(Point(x=turn + 1, y=score, interval=interval(part)))
    return tuple(sorted(points, key=lambda point: point.x))


def _kept(chapter: Chapter) -> Section:
    arms: dict[tuple[str, int | None, Method, str], list[Row]] = {}
    for row in chapter.rows:
        if _grid(row):
            key = group_of(row), length_of(row), Method.of(row), str(row.get("budget"))
            arms.setdefault(key, []).append(row)
    pictures = []
    for (group, length, method, budget), rows in sorted(
        arms.items(), key=lambda x: (x[0][0], x[0][1] or 0, x[0][2].order, budget_key(x[0][3]))
    ):
        grid = _mean_grid([_grid(row) for row in rows])
        fractions = [head for layer in grid for head in layer]
        if fractions and max(fractions) - min(fractions) > _UNEVEN:
            at = f" at {budget}" if method.kind != "full" else ""
            pictures.append(plots.kept_map(f"{method.label}{at}, {cell_title(group, length)}", grid))
    return Section(
        title="What each layer and head kept",
        text="Pairs held, as a share of the tokens seen: bars are the mean of a layer, cells its KV heads. Methods "
        "whose heads all keep the same number, as with share head, have no picture.",
        pictures=tuple(pictures),
    )


def _grid(row: Row) -> list[list[float]]:
    """Return kept over seen, a list for each layer; empty if the row does not say."""
    kept, full = row.get("kept") or [], number(row, "full")
    if not isinstance(kept, list) or not all(isinstance(layer, list) and layer for layer in kept) or not full:
        return []
    seen = full / sum(map(len, kept)) if kept else 0.0
    return [[float(head) / seen for head in layer] for layer in kept]


def _mean_grid(grids: Sequence[list[list[float]]]) -> list[list[float]]:
    if len({tuple(map(len, grid)) for grid in grids}) > 1:
        return []
    return [[sum(h) / len(h) for h in zip(*layer, strict=True)] for layer in zip(*grids, strict=True)]


def speed_sections(rows: Sequence[Row], looks: Looks) -> list[Section]:
    """Return decode time over the floor against length, a picture for each batch and budget."""
    panels: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        if number(row, "length") is not None and _over_floor(row) is not None and str(row.get("budget")) != "1.0":
            panels.setdefault((number(row, "batch") or 1.0, str(row.get("budget"))), []).append(row)
    lengths = Axis(label="length, tokens", log=True, whole=True)
    pictures = []
    for (batch, budget), part in sorted(panels.items(), key=lambda x: (x[0][0], budget_key(x[0][1]))):
        lines = _lines(part, looks, lambda row: number(row, "length"), y=_over_floor)
        whole = {number(row, "length"): value for row in part if (value := _full_over_floor(row)) is not None}
        points = tuple(Point(x=x, y=y) for x, y in sorted((x, y) for x, y in whole.items() if x is not None))
        shown = _emphasised(lines)
        if points:
            shown.append(Line(label="DynamicCache", look=looks[_DYNAMIC], points=points))
        title = f"budget {budget}, batch {batch:.0f}"
        most = max(point.y for line in shown for point in line.points)
        pictures.append(
            plots.line_chart(title, shown, lengths, Axis(label="decode time / floor", limits=(0.9, 1.1 * most)))
        )
    if not pictures:
        return []
    return [
        Section(
            title="Speed",
            text="Time of a decode step over the floor, which is the same loop with an empty cache: 1 means that the "
            "cache costs nothing. Medians over interleaved repeats.",
            pictures=tuple(pictures),
            legend=_legend([*map(Method.of, rows), _DYNAMIC], looks),
        )
    ]


_DYNAMIC = Method(policy="transformers:dynamic", peer="transformers:dynamic")
"""What ``bench speed`` calls full_decode: a DynamicCache."""


def speed_methods(rows: Iterable[Row]) -> set[Method]:
    """Return the methods that pictures of speed show."""
    found = {Method.of(row) for row in rows}
    return {*found, _DYNAMIC} if found else set()


def _over_floor(row: Row) -> float | None:
    return number(row, "decode_over_floor")


def _full_over_floor(row: Row) -> float | None:
    full, floor = number(row, "full_decode_ms"), number(row, "floor_ms")
    return None if full is None or not floor else full / floor


def _lines(
    rows: Iterable[Row],
    looks: Looks,
    x: Callable[[Row], float | None],
    y: Callable[[Row], float | None] = lambda row: number(row, "score"),
    *,
    by_budget: bool = False,
) -> dict[Method, Line]:
    """Return a line for each method; rows that lack a value are left out."""
    points: dict[Method, list[tuple[Row, Point]]] = {}
    for row in rows:
        across, up = x(row), y(row)
        if across is not None and up is not None and across > 0:
            points.setdefault(Method.of(row), []).append((row, Point(x=across, y=up, interval=interval(row))))

    def order(pair: tuple[Row, Point]) -> tuple[object, ...]:
        return budget_key(str(pair[0].get("budget"))) if by_budget else (pair[1].x,)

    ordered = sorted(points, key=lambda method: method.order)
    return {m: _line(m, looks, tuple(point for _, point in sorted(points[m], key=order))) for m in ordered}


def _line(method: Method, looks: Looks, points: tuple[Point, ...]) -> Line:
    return Line(label=method.label, look=looks[method], points=points)


def _level(rows: Iterable[Row]) -> Point | None:
    """Return the score of the full cache."""
    for row in rows:
        score = number(row, "score")
        if Method.of(row).kind == "full" and score is not None:
            return Point(x=1.0, y=score, interval=interval(row))
    return None


def _emphasised(lines: dict[Method, Line], *, full: bool = False) -> list[Line]:
    """Return lines of which at most ten are strong: ours first; if there are none, whatever comes first."""
    own = [m for m in lines if m.kind == "own" or (full and m.kind == "full")] or [m for m in lines if m.kind == "peer"]
    strong = set(own[:_STRONGEST])
    return [replace(line, look=replace(line.look, strong=method in strong)) for method, line in lines.items()]


def _is_sweep(lines: Iterable[Line]) -> bool:
    return any(len(line.points) > 1 for line in lines)


def _legend(methods: Iterable[Method], looks: Looks) -> tuple[tuple[Look, str], ...]:
    ordered = sorted(set(methods), key=lambda method: method.order)
    return tuple((looks[m], m.label) for m in ordered)
