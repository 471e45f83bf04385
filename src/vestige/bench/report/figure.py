"""Figures of matplotlib in the style of the report, and their SVG."""

import html
import io
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vestige.bench.report.methods import shorten
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
COLOR_MAP = "cividis"  # readable with any colour vision, and in grey


@contextmanager
def open_figure(width: float, height: float) -> Iterator[Any]:
    """Yield an empty figure, in inches, in the style of the report."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('pictures need matplotlib: pip install "vestige[bench]"') from None
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a browser has the fonts that we lack
        yield Figure(figsize=(width, height))


def to_svg(figure: Any, alt: str) -> str:
    """Return a figure as an SVG element that scales with the page, with a label for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    inner = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    inner = re.sub(r"<(metadata|defs)>\s*(<style.*?</style>)?\s*</\1>", "", inner, flags=re.DOTALL)
    inner = re.sub(r"\s*\n\s*", "\n", inner)
    width, height = (round(72 * inches, 2) for inches in figure.get_size_inches())
    named = f'role="img" aria-label="{html.escape(shorten(alt, 2000))}"' if alt else 'aria-hidden="true"'
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width * 4 / 3:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size} {named}>{inner}'


def separate_ids(page: str) -> str:
    """Return a page with distinct ids in all pictures."""
    count = iter(range(page.count("<svg ")))

    def rename(match: re.Match[str]) -> str:
        head = f"p{next(count)}-"
        return re.sub(r'(\bid="|url\(#|href="#)', lambda m: m[1] + head, match[0])

    return re.sub(r"<svg .*?</svg>", rename, page, flags=re.DOTALL)


def set_title(figure: Any, text: str) -> None:
    """Set a title from the left edge, in as many lines as it needs."""
    letters = int(figure.get_figwidth() * 72 / 6.4)
    figure.suptitle("\n".join(textwrap.wrap(shorten(text, 100), letters)), x=0.012, ha="left")


def make_color_map() -> Any:
    """Return the colour map in 20 steps, few enough for a legend of shapes instead of an image."""
    from matplotlib import colormaps

    return colormaps[COLOR_MAP].resampled(20)


def strip_axes(axes: Any) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
