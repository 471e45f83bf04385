"""Draw accuracy against the bytes of the cache for the README: ``docs/images/accuracy-bytes.svg``.

Reads ``results/retention/verdict.json`` and ``results/retention/2048/rows.json``: six tasks at 2,048 tokens, with the
question unknown while the text is compressed. ``python -m experiments retention`` makes both.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "retention"
PICTURE = ROOT / "docs" / "images" / "accuracy-bytes.svg"
LENGTH = 2048
TICKS = (2, 5, 10, 20, 50, 100)
LINES = {
    "retention": ("retention (trained)", "#1565c0"),
    "kvzip(share=model)": ("kvzip", "#2e7d32"),
    "compactor(share=model)": ("compactor", "#8e6c00"),
    "keydiff(share=model)": ("keydiff", "#ad1457"),
    "lagkv": ("lagkv", "#6a4fb3"),
    "streaming_llm": ("streaming_llm", "#78909c"),
    "random": ("random", "#b0bec5"),
    "kvpress:KVzipPress": ("KVzip of kvpress (masks, frees nothing)", "#ef6c00"),
}
"""Label and colour of each method that is drawn."""


def read_curves() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each method at the drawn length, smallest cache first."""
    rows = [row for row in json.loads((RESULTS / "verdict.json").read_text()) if row["length"] == LENGTH]
    curves = {name: [row for row in rows if row["policy"] == name] for name in LINES}
    return {name: sorted(found, key=lambda row: row["kv_bytes"]) for name, found in curves.items()}


def read_full() -> tuple[float, float]:
    """Return the bytes of a DynamicCache and the score with every pair, the means over the tasks."""
    rows = json.loads((RESULTS / str(LENGTH) / "rows.json").read_text())["rows"]
    rows = [row for row in rows if row["policy"] == "full"]
    return mean(row["full_kv_bytes"] for row in rows), mean(row["score"] for row in rows)


def draw(path: Path) -> None:
    """Write the picture; no date and fixed ids, so the same results give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "vestige", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 4.4))
        axes = figure.subplots()
        full_bytes, full_score = read_full()
        axes.axhline(100 * full_score, color="#455a64", linewidth=0.8, linestyle=":")
        axes.plot([full_bytes / 1e6], [100 * full_score], "s", color="#263238", label="full cache")
        for name, rows in read_curves().items():
            _draw_curve(axes, rows, *LINES[name])
        axes.set_xscale("log")
        axes.set_xticks(TICKS, labels=[f"{tick} MB" for tick in TICKS])
        axes.minorticks_off()
        axes.set(xlabel="bytes of the cache after reading 2,048 tokens", ylabel="mean score over six tasks, %")
        axes.set_ylim(-2, 90)
        axes.grid(axis="y", color="#eceff1")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")


def _draw_curve(axes: Any, rows: Sequence[Mapping[str, Any]], label: str, color: str) -> None:
    x, y = [row["kv_bytes"] / 1e6 for row in rows], [100 * row["score"] for row in rows]
    low, high = ([100 * row["score_ci95"][end] for row in rows] for end in (0, 1))
    axes.plot(x, y, marker="o", markersize=4, color=color, label=label, linewidth=1.6)
    axes.vlines(x, low, high, color=color, linewidth=0.8, alpha=0.5)


def main() -> None:
    """Draw the picture."""
    draw(PICTURE)


if __name__ == "__main__":
    main()
