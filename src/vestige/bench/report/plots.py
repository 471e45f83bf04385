"""Pictures: numbers in, SVG text out. Text stays text, bytes depend on the numbers alone.

A picture is small, so that a page can set many beside each other on a desk and below each other on a phone.
"""

import functools
import html
import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vestige.bench.report.methods import Look, Method, looks, plain
from vestige.errors import InputError

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": 9,
    "figure.titlesize": 10,
    "figure.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "svg.fonttype": "none",
    "svg.hashsalt": "vestige",
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_MAP = "cividis"  # readable with any colour vision, and in grey
_TICKS = tuple(float(f"{digit}e{power}") for power in range(-3, 6) for digit in (1, 2, 5))
_SPREAD = 2.0
"""Typographic points by which neighbouring lines are moved sideways, so that intervals can be told apart."""


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
    look: Look
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis shows."""

    label: str
    log: bool = False
    percent: bool = False
    whole: bool = False
    """Ticks at the values of the points only."""
    limits: tuple[float, float] | None = None


SCORE = Axis(label="score", limits=(0.0, 1.0))


def lines_of(drawn: Mapping[Method, Sequence[Point]]) -> list[Line]:
    """Return a line for each method, in the order of a legend, each from left to right."""
    return [
        Line(label=method.label, look=look, points=tuple(sorted(drawn[method], key=lambda point: point.x)))
        for method, look in looks(drawn).items()
    ]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis = SCORE,
    *,
    level: Point | None = None,
    legend: bool = False,
) -> str:
    """Return lines with intervals.

    Args:
        title: Stands above.
        lines: Strong ones are drawn in front, with their intervals.
        x: The horizontal axis.
        y: The vertical axis.
        level: The full cache: a horizontal line, and a band for its interval; its ``x`` does not matter.
        legend: Say beside the lines which is which, where no page around the picture does.
    """
    with _figure(7.2 if legend else 4.9, 3.6) as figure:
        axes = figure.subplots()
        if level is not None:
            axes.axhline(level.y, color="black", linewidth=1.2, zorder=2)
            if level.interval:
                axes.axhspan(*level.interval, color="#000000", alpha=0.07, linewidth=0, zorder=1)
        _scale(axes, lines, x, y)
        strong = [line for line in lines if line.look.strong]
        for line in sorted(lines, key=lambda line: line.look.strong):
            shift = (strong.index(line) - (len(strong) - 1) / 2) * _SPREAD if line in strong else 0.0
            _draw(axes, line, shift)
        _title(figure, title)
        axes.set(xlabel=x.label, ylabel=y.label)
        if legend:
            _name(figure, lines, level)
        words = [f"{line.label}: {_said(line.points[0], y)} to {_said(line.points[-1], y)}" for line in lines]
        full = [] if level is None else [f"full cache: {_said(level, y)}"]
        return _svg(figure, f"{title}. {y.label} against {x.label}. {'; '.join(full + words)}")


def dot_chart(title: str, lines: Sequence[Line], notes: Sequence[str], *, level: Point | None = None) -> str:
    """Return a row for each method: its one point with its interval, and a note on the right."""
    with _figure(4.9, 0.9 + 0.24 * len(lines)) as figure:
        axes = figure.subplots()
        if level is not None:
            axes.axvline(level.y, color="black", linewidth=1.2, zorder=2)
            if level.interval:
                axes.axvspan(*level.interval, color="#000000", alpha=0.07, linewidth=0, zorder=1)
        for i, (line, note) in enumerate(zip(lines, notes, strict=True)):
            point, look = line.points[0], line.look
            if point.interval:
                axes.plot(point.interval, (i, i), color=look.color, linewidth=1.1, linestyle=_dash(look))
            axes.plot(point.y, i, **_marker(look), linestyle="none", zorder=4, clip_on=False)
            axes.text(1.07, i, plain(note, 16), va="center", fontsize=8, color="#444444")
        axes.set_yticks(range(len(lines)), [plain(line.label, 30) for line in lines])
        _title(figure, title)
        axes.set(xlabel="score", xlim=(-0.03, 1.03), ylim=(len(lines) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        words = [
            f"{line.label}: {_said(line.points[0], SCORE)} ({note})" for line, note in zip(lines, notes, strict=True)
        ]
        return _svg(figure, f"{title}. {'; '.join(words)}")


def heat_map(
    title: str,
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
) -> str:
    """Return scores as colours with their numbers in the cells; a cell without a score stays empty.

    Args:
        title: Stands above.
        values: 0..1, a sequence for each row.
        rows: Names of the rows, from the top.
        columns: Names of the columns.
        labels: What rows and columns are.
    """
    with _figure(0.9 + 0.62 * max(len(columns), 3), 0.9 + 0.27 * len(rows)) as figure:
        axes = figure.subplots()
        grid = [[float("nan") if value is None else value for value in row] for row in values]
        axes.pcolormesh(grid, cmap=_MAP, vmin=0, vmax=1, edgecolors="white", linewidth=1)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value is not None:
                    ink = "black" if value > 0.55 else "white"
                    axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        _title(figure, title)
        axes.set(ylabel=labels[0], xlabel=labels[1], ylim=(len(rows), 0))
        _bare(axes)
        words = [f"{name}: {', '.join(_score(v) for v in row)}" for name, row in zip(rows, values, strict=True)]
        return _svg(figure, f"{title}. {labels[0]} by {labels[1]} ({', '.join(columns)}). {'; '.join(words)}")


def kept_map(title: str, kept: Sequence[Sequence[float]]) -> str:
    """Return what each layer and head kept: a bar for each layer's mean, and below it a cell for each head.

    Args:
        title: Stands above.
        kept: Fractions of what was seen, a sequence for each layer.
    """
    layers, heads = len(kept), max(map(len, kept))
    means = [sum(layer) / len(layer) for layer in kept]
    total = sum(means) / layers
    with _figure(5.2, 2.2 + 0.16 * min(heads, 16)) as figure:
        bars, cells = figure.subplots(2, 1, sharex=True, height_ratios=(10, 2 + 1.2 * min(heads, 16)))
        bars.bar(range(layers), means, width=0.8, color="#0072B2")
        bars.axhline(total, color="black", linewidth=1, linestyle=(0, (4, 2)))
        beside = bars.get_yaxis_transform()
        bars.text(1.01, total, f"mean\n{100 * total:.1f} %", transform=beside, va="center", fontsize=8, color="#444444")
        _title(figure, title)
        bars.set(ylabel="kept", ylim=(0, None))
        bars.yaxis.set_major_formatter(_percent)
        bars.grid(axis="x", visible=False)
        grid = [[layer[h] if h < len(layer) else float("nan") for layer in kept] for h in range(heads)]
        edges = [i - 0.5 for i in range(layers + 1)]
        mesh = cells.pcolormesh(edges, range(heads + 1), grid, cmap=_steps(), vmin=0, edgecolors="white", linewidth=0.4)
        cells.set_yticks([h + 0.5 for h in range(heads)] if heads <= 8 else [], range(heads) if heads <= 8 else [])
        cells.set(xlabel="layer", ylabel="KV head", ylim=(heads, 0), xlim=(-0.6, layers - 0.4))
        cells.locator_params(axis="x", integer=True)
        _bare(cells)
        figure.colorbar(mesh, ax=cells, format=_percent, fraction=0.05, pad=0.01, aspect=8)
        said = ", ".join(f"{mean:.0%}" for mean in means)
        return _svg(figure, f"{title}. Mean kept by layer: {said}")


@functools.cache
def swatch(look: Look) -> str:
    """Return a piece of a line as it is drawn, for a legend."""
    with _figure(0.5, 0.2) as figure:
        axes = figure.subplots()
        axes.axis("off")
        axes.plot((0, 1, 2), (0, 0, 0), markevery=[1], **_stroke(look), **_marker(look))
        axes.set(xlim=(0, 2), ylim=(-1, 1))
        return _svg(figure, "")


def _name(figure: Any, lines: Sequence[Line], level: Point | None) -> None:
    """Put a legend beside what is drawn."""
    from matplotlib.lines import Line2D

    full = [] if level is None else [Line2D([], [], color="black", linewidth=1.2, label="full cache")]
    drawn = [Line2D([], [], label=line.label, **_stroke(line.look), **_marker(line.look)) for line in lines]
    figure.legend(handles=[*full, *drawn], loc="outside right center", frameon=False, handlelength=3)


def _draw(axes: Any, line: Line, shift: float) -> None:
    """Draw a line, moved sideways by so many typographic points."""
    from matplotlib.transforms import ScaledTranslation

    moved = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    xs, ys = [p.x for p in line.points], [p.y for p in line.points]
    front = 4 if line.look.strong else 3
    axes.plot(xs, ys, **_stroke(line.look), **_marker(line.look), zorder=front, clip_on=False, transform=moved)
    for point in line.points:
        if point.interval and line.look.strong:
            across, up = [point.x, point.x], list(point.interval)
            axes.plot(across, up, color=line.look.color, linewidth=1.1, alpha=0.55, zorder=2.5, transform=moved)


def _stroke(look: Look) -> dict[str, Any]:
    width = 1.5 if look.strong else 1.0
    return {"color": look.color, "linewidth": width, "linestyle": _dash(look), "alpha": 1.0 if look.strong else 0.8}


def _dash(look: Look) -> Any:
    return (0, (4, 2)) if look.dashed else "solid"


def _marker(look: Look) -> dict[str, Any]:
    back = look.color if look.fillstyle == "full" else "white"
    return {
        "marker": look.marker,
        "fillstyle": "full" if look.fillstyle == "none" else look.fillstyle,
        "markersize": 6 if look.strong else 5,
        "markeredgewidth": 1.3 if look.strong else 0.9,
        "markeredgecolor": look.color,
        "markerfacecolor": look.color if look.fillstyle == "bottom" else back,
        "markerfacecoloralt": "white",
    }


def _scale(axes: Any, lines: Sequence[Line], x: Axis, y: Axis) -> None:
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
            scale.set_major_formatter(FuncFormatter(_percent if axis.percent else lambda v, _: f"{v:,.0f}"))
    axes.set_xlim(*(x.limits or _room(xs, log=x.log)))
    axes.set_ylim(*(y.limits or _room(ys, log=y.log)))


def _room(values: Sequence[float | int], *, log: bool) -> tuple[float, float]:
    """Return limits that leave some room around all values."""
    least, most = min(values), max(values)
    if log:
        return least / 1.25, most * 1.25
    room = 0.08 * (most - least) or 0.1 * abs(most) or 1.0
    return least - room, most + room


def _title(figure: Any, text: str) -> None:
    """Set a title from the left edge, in as many lines as it needs."""
    letters = int(figure.get_figwidth() * 72 / 6.4)
    figure.suptitle("\n".join(textwrap.wrap(plain(text, 100), letters)), x=0.012, ha="left")


def _steps() -> Any:
    """Return the map in so few steps that its legend is drawn as shapes and not as an image."""
    from matplotlib import colormaps

    return colormaps[_MAP].resampled(20)


def _bare(axes: Any) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _percent(value: float, _: object = None) -> str:
    return f"{100 * value:.3g} %"


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _said(point: Point, axis: Axis) -> str:
    return f"{point.y:.2f}" if axis is SCORE else f"{point.y:.3g}"


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """Yield an empty figure of so many inches, under the style of the report."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('pictures need matplotlib: pip install "vestige[bench]"') from None
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a browser has the fonts that we lack
        yield Figure(figsize=(width, height))


def _svg(figure: Any, alt: str) -> str:
    """Return a figure as an SVG element that scales with the page and says what it shows."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    inner = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    inner = re.sub(r"<(metadata|defs)>\s*(<style.*?</style>)?\s*</\1>", "", inner, flags=re.DOTALL)
    inner = re.sub(r"\s*\n\s*", "\n", inner)
    width, height = (round(72 * inches, 2) for inches in figure.get_size_inches())
    named = f'role="img" aria-label="{html.escape(plain(alt, 2000))}"' if alt else 'aria-hidden="true"'
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width * 4 / 3:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size} {named}>{inner}'


def separate_ids(page: str) -> str:
    """Return a page whose pictures share no id."""
    count = iter(range(page.count("<svg ")))

    def one(match: re.Match[str]) -> str:
        head = f"p{next(count)}-"
        return re.sub(r'(\bid="|url\(#|href="#)', lambda m: m[1] + head, match[0])

    return re.sub(r"<svg .*?</svg>", one, page, flags=re.DOTALL)
