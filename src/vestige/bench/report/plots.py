"""Charts of matplotlib as SVG. Text stays text, bytes depend on the numbers alone.

A picture is small: a wide page shows several side by side, a narrow one shows them one below the other.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vestige.bench.report.figure import COLOR_MAP, make_color_map, open_figure, set_title, strip_axes, to_svg
from vestige.bench.report.methods import Style, shorten

_TICKS = tuple(float(f"{digit}e{power}") for power in range(-3, 6) for digit in (1, 2, 5))
_SPREAD = 2.0
"""Horizontal offset of neighbouring lines in typographic points, so that intervals do not overlap."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value, and its 95 % interval if it has one."""

    x: float | int
    y: float | int
    interval: tuple[float | int, float | int] | None = None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method's points, from left to right."""

    label: str
    style: Style
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Label, scale and ticks of an axis."""

    label: str
    log: bool = False
    percent: bool = False
    whole: bool = False
    """Ticks at the values of the points only."""
    limits: tuple[float, float] | None = None


SCORE = Axis(label="score", limits=(0.0, 1.0))


def draw_line_chart(
    title: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis = SCORE,
    *,
    level: Point | None = None,
    legend: bool = False,
) -> str:
    """Return the SVG of lines; strong ones are in front and have intervals.

    ``level`` is the full cache: a horizontal line, and a band for its interval; its ``x`` does not matter. ``legend``
    names the lines beside the chart, for a picture outside a page.
    """
    with open_figure(7.2 if legend else 4.9, 3.6) as figure:
        axes = figure.subplots()
        if level is not None:
            axes.axhline(level.y, color="black", linewidth=1.2, zorder=2)
            if level.interval:
                axes.axhspan(*level.interval, color="#000000", alpha=0.07, linewidth=0, zorder=1)
        _scale_axes(axes, lines, x, y)
        strong = [line for line in lines if line.style.strong]
        for line in sorted(lines, key=lambda line: line.style.strong):
            shift = (strong.index(line) - (len(strong) - 1) / 2) * _SPREAD if line in strong else 0.0
            _draw(axes, line, shift)
        set_title(figure, title)
        axes.set(xlabel=x.label, ylabel=y.label)
        if legend:
            _add_legend(figure, lines, level)
        ends = [(line.label, *(_format_value(line.points[i], y) for i in (0, -1))) for line in lines]
        words = [f"{label}: {first} to {last}" for label, first, last in ends]
        full = [] if level is None else [f"full cache: {_format_value(level, y)}"]
        return to_svg(figure, f"{title}. {y.label} against {x.label}. {'; '.join(full + words)}")


def draw_dot_chart(title: str, lines: Sequence[Line], notes: Sequence[str], *, level: Point | None = None) -> str:
    """Return the SVG of a row for each method: its one point with its interval, and a note on the right."""
    with open_figure(4.9, 0.9 + 0.24 * len(lines)) as figure:
        axes = figure.subplots()
        if level is not None:
            axes.axvline(level.y, color="black", linewidth=1.2, zorder=2)
            if level.interval:
                axes.axvspan(*level.interval, color="#000000", alpha=0.07, linewidth=0, zorder=1)
        for i, (line, note) in enumerate(zip(lines, notes, strict=True)):
            point, style = line.points[0], line.style
            if point.interval:
                axes.plot(point.interval, (i, i), color=style.color, linewidth=1.1, linestyle=_dash(style))
            axes.plot(point.y, i, **_marker(style), linestyle="none", zorder=4, clip_on=False)
            axes.text(1.07, i, shorten(note, 16), va="center", fontsize=8, color="#444444")
        axes.set_yticks(range(len(lines)), [shorten(line.label, 30) for line in lines])
        set_title(figure, title)
        axes.set(xlabel="score", xlim=(-0.03, 1.03), ylim=(len(lines) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        scores = [_format_value(line.points[0], SCORE) for line in lines]
        words = [f"{line.label}: {y} ({note})" for line, y, note in zip(lines, scores, notes, strict=True)]
        return to_svg(figure, f"{title}. {'; '.join(words)}")


def draw_heat_map(
    title: str,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
) -> str:
    """Return the SVG of scores as colours with their numbers in the cells; a cell without a score stays empty.

    Values are in 0..1, a sequence for each row from the top; ``labels`` are the titles of the axes: rows, columns.
    """
    with open_figure(0.9 + 0.62 * max(len(columns), 3), 0.9 + 0.27 * len(rows)) as figure:
        axes = figure.subplots()
        grid = [[float("nan") if value is None else value for value in row] for row in values]
        axes.pcolormesh(grid, cmap=COLOR_MAP, vmin=0, vmax=1, edgecolors="white", linewidth=1)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value is not None:
                    ink = "black" if value > 0.55 else "white"
                    axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        set_title(figure, title)
        axes.set(ylabel=labels[0], xlabel=labels[1], ylim=(len(rows), 0))
        strip_axes(axes)
        scores = [["none" if value is None else f"{value:.2f}" for value in row] for row in values]
        words = [f"{name}: {', '.join(row)}" for name, row in zip(rows, scores, strict=True)]
        return to_svg(figure, f"{title}. {labels[0]} by {labels[1]} ({', '.join(columns)}). {'; '.join(words)}")


def draw_kept_map(title: str, kept: Sequence[Sequence[float]]) -> str:
    """Return the SVG of the fractions of the seen tokens that each layer kept: a bar for its mean, cells for heads."""
    layers, heads = len(kept), max(map(len, kept))
    means = [sum(layer) / len(layer) for layer in kept]
    total = sum(means) / layers
    with open_figure(5.2, 2.2 + 0.16 * min(heads, 16)) as figure:
        bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=(10, 2 + 1.2 * min(heads, 16)))
        bars.bar(range(layers), means, width=0.8, color="#0072B2")
        bars.axhline(total, color="black", linewidth=1, linestyle=(0, (4, 2)))
        beside = bars.get_yaxis_transform()
        bars.text(1.01, total, f"mean\n{100 * total:.1f} %", transform=beside, va="center", fontsize=8, color="#444444")
        set_title(figure, title)
        bars.set(ylabel="kept", ylim=(0, None))
        bars.yaxis.set_major_formatter(_format_percent)
        bars.grid(axis="x", visible=False)
        grid = [[layer[h] if h < len(layer) else float("nan") for layer in kept] for h in range(heads)]
        edges = [i - 0.5 for i in range(layers + 1)]
        mesh = cells.pcolormesh(
            edges, range(heads + 1), grid, cmap=make_color_map(), vmin=0, edgecolors="white", linewidth=0.4
        )
        cells.set_yticks([h + 0.5 for h in range(heads)] if heads <= 8 else [], range(heads) if heads <= 8 else [])
        cells.set(xlabel="layer", ylabel="KV head", ylim=(heads, 0), xlim=(-0.6, layers - 0.4))
        cells.locator_params(axis="x", integer=True)
        strip_axes(cells)
        figure.colorbar(mesh, ax=cells, format=_format_percent, fraction=0.05, pad=0.01, aspect=8)
        words = ", ".join(f"{mean:.0%}" for mean in means)
        return to_svg(figure, f"{title}. Mean kept by layer: {words}")


@functools.cache
def draw_swatch(style: Style) -> str:
    """Return the SVG of a short piece of a line, for a legend."""
    with open_figure(0.5, 0.2) as figure:
        axes = figure.subplots()
        axes.axis("off")
        axes.plot((0, 1, 2), (0, 0, 0), markevery=[1], **_stroke(style), **_marker(style))
        axes.set(xlim=(0, 2), ylim=(-1, 1))
        return to_svg(figure, "")


def _add_legend(figure: Any, lines: Sequence[Line], level: Point | None) -> None:
    from matplotlib.lines import Line2D

    full = [] if level is None else [Line2D([], [], color="black", linewidth=1.2, label="full cache")]
    drawn = [Line2D([], [], label=line.label, **_stroke(line.style), **_marker(line.style)) for line in lines]
    figure.legend(handles=[*full, *drawn], loc="outside right center", frameon=False, handlelength=3)


def _draw(axes: Any, line: Line, shift: float) -> None:
    """Draw a line, moved sideways by ``shift`` typographic points."""
    from matplotlib.transforms import ScaledTranslation

    moved = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    xs, ys = [p.x for p in line.points], [p.y for p in line.points]
    front = 4 if line.style.strong else 3
    axes.plot(xs, ys, **_stroke(line.style), **_marker(line.style), zorder=front, clip_on=False, transform=moved)
    for point in line.points:
        if point.interval and line.style.strong:
            across, up = [point.x, point.x], list(point.interval)
            axes.plot(across, up, color=line.style.color, linewidth=1.1, alpha=0.55, zorder=2.5, transform=moved)


def _stroke(style: Style) -> dict[str, Any]:
    width = 1.5 if style.strong else 1.0
    return {"color": style.color, "linewidth": width, "linestyle": _dash(style), "alpha": 1.0 if style.strong else 0.8}


def _dash(style: Style) -> Any:
    return (0, (4, 2)) if style.dashed else "solid"


def _marker(style: Style) -> dict[str, Any]:
    back = style.color if style.fillstyle == "full" else "white"
    return {
        "marker": style.marker,
        "fillstyle": "full" if style.fillstyle == "none" else style.fillstyle,
        "markersize": 6 if style.strong else 5,
        "markeredgewidth": 1.3 if style.strong else 0.9,
        "markeredgecolor": style.color,
        "markerfacecolor": style.color if style.fillstyle == "bottom" else back,
        "markerfacecoloralt": "white",
    }


def _scale_axes(axes: Any, lines: Sequence[Line], x: Axis, y: Axis) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    xs, ys = ([getattr(point, name) for line in lines for point in line.points] for name in "xy")
    for scale, axis, values in ((axes.xaxis, x, xs), (axes.yaxis, y, ys)):
        if axis.log:
            (axes.set_xscale if scale is axes.xaxis else axes.set_yscale)("log")
            scale.set_minor_locator(NullLocator())
        if axis.whole or axis.log:
            least, most = min(values), max(values)
            ticks = sorted(set(values)) if axis.whole else [t for t in _TICKS if least / 1.5 <= t <= most * 1.5]
            scale.set_major_locator(FixedLocator(ticks))
            scale.set_major_formatter(FuncFormatter(_format_percent if axis.percent else lambda v, _: f"{v:,.0f}"))
    axes.set_xlim(*(x.limits or _find_limits(xs, log=x.log)))
    axes.set_ylim(*(y.limits or _find_limits(ys, log=y.log)))


def _find_limits(values: Sequence[float | int], *, log: bool) -> tuple[float, float]:
    """Return limits that leave some room around all values."""
    least, most = min(values), max(values)
    if log:
        return least / 1.25, most * 1.25
    room = 0.08 * (most - least) or 0.1 * abs(most) or 1.0
    return least - room, most + room


def _format_percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g} %"


def _format_value(point: Point, axis: Axis) -> str:
    return f"{point.y:.2f}" if axis is SCORE else f"{point.y:.3g}"
