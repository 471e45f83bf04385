"""Results for people: tables, a picture of the pairs that each layer kept, progress bars. Nothing here computes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from vestige.cache.report import LayerReport, Report
from vestige.erasers.base import EraseReport
from vestige.pipelines.document_qa import Explained

_BLOCKS = " ▁▂▃▄▅▆▇█"


def megabytes(count: float | int) -> str:
    """Return a number of bytes in megabytes."""
    return f"{count / 1e6:,.1f} MB"


def report_table(report: Report, *, prefill_s: float, tokens_per_s: float) -> Table:
    """Return a table with the main numbers of a cache."""
    budget = "none" if report.budget_total is None else f"{report.budget_total:,} pairs"
    rows = [
        ("tokens read", f"{sum(report.seen):,}"),
        ("pairs held", f"{report.held:,} of {report.full:,} ({report.kept_fraction:.1%}), budget {budget}"),
        ("cache", f"{megabytes(report.kv_bytes)} instead of {megabytes(report.full_kv_bytes)}"),
        ("peak", megabytes(report.peak_kv_bytes)),
        ("reading", f"{prefill_s:.2f} s, of which {report.evict_s:.2f} s evicting"),
        ("decoding", f"{tokens_per_s:.1f} tokens/s"),
        ("policy", f"{report.policy}, share {report.share}"),
    ]
    if report.other_kv_bytes:
        rows.insert(4, ("other layers", megabytes(report.other_kv_bytes)))
    return _make_plain_table(rows)


def erase_table(report: EraseReport) -> Table:
    """Return a table with the report of an erase."""
    counts = {"dropped": report.slots_dropped, "replaced": report.slots_replaced, "left": report.slots_left}
    slots = [f"{count:,} {word}" for word, count in counts.items() if count]
    suffix = f"{report.suffix_left:,} tokens still carry what they read of it" if report.suffix_left else "clean"
    rows = [
        ("method", f"{report.method}, {'exact' if report.exact else 'approximate: this steers, it does not delete'}"),
        ("span", ", ".join(f"tokens {part.span.start} to {part.span.end}" for part in report.spans)),
        ("its pairs", ", ".join(slots) or "none were held"),
        ("edit", f"{report.edit_s:.3f} s, {report.tokens_recomputed:,} tokens run"),
        ("behind it", suffix),
    ]
    return _make_plain_table(rows)


def _make_plain_table(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(Text(name, style="dim"), value)
    return table


def layers_picture(report: Report, width: int = 40) -> Table:
    """Return a picture of the pairs that each layer kept: a bar for the mean, and a block for each row."""
    table = Table(box=None, padding=(0, 1, 0, 0), title="pairs kept by layer (█ of all it saw) and by row")
    table.add_column("layer", justify="right", style="dim")
    table.add_column("share of what it saw", width=width)
    table.add_column("mean", justify="right")
    table.add_column("rows", no_wrap=True)
    most = max((max(layer.rows, default=0) for layer in report.layers), default=0)
    for layer in report.layers:
        table.add_row(*_layer_cells(layer, most, width))
    return table


def _layer_cells(layer: LayerReport, most: int, width: int) -> tuple[str, Text, str, str]:
    mean = sum(layer.rows) / max(len(layer.rows), 1)
    filled = round(width * mean / layer.seen) if layer.seen else 0
    bar = Text("█" * filled, style="cyan").append("·" * (width - filled), style="dim")
    blocks = "".join(_BLOCKS[round(8 * n / most)] if most else " " for n in layer.rows[:64])
    return str(layer.layer_idx), bar, f"{mean:.0f}", blocks


def explained_table(explained: Explained) -> Table:
    """Return a table of the attention to the evidence of an answer, before and after eviction, by layer and in all."""
    explanation = explained.explanation
    title = Text(f"attention to the evidence, from the question and its reply: {explained.answer}")
    table = Table(box=None, padding=(0, 1, 0, 0), title=title)
    for name in ("layer", "with all pairs", "with those kept", "pairs kept"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("rows", no_wrap=True)
    for i, (full, kept, held) in enumerate(zip(explanation.full, explanation.kept, explanation.held, strict=True)):
        blocks = "".join(_BLOCKS[round(8 * share)] for share in held.float().mean(1).tolist())
        shares = float(full.sum(1).mean()), float(kept.sum(1).mean()), float(held.float().mean())
        table.add_row(str(i), *(f"{share:.1%}" for share in shares), blocks)
    total = 1 - explanation.dilution_full, 1 - explanation.dilution_kept, explanation.held_share
    table.add_row("all", *(f"{share:.1%}" for share in total))
    return table


def rows_table(rows: Iterable[dict[str, Any]], columns: dict[str, str]) -> Table:
    """Return a table of result rows; ``columns`` maps keys to format specs."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for key in columns:
        table.add_column(key.replace("_", " "), justify="right", no_wrap=key == "policy")
    for row in rows:
        table.add_row(*(Text("" if row.get(key) is None else format(row[key], spec)) for key, spec in columns.items()))
    return table


def bench_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Return a table of the rows of a benchmark; a failed row says so in place of numbers."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("task", "length", "method", "budget"):
        table.add_column(name, justify="right" if name in ("length", "budget") else "left", overflow="fold")
    for name in ("score", "95 %", "n", "kept", "MB", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        method = row["policy"] if row["share"] in (None, "head") else f"{row['policy']}:{row['share']}"
        method += "" if row.get("memory") in (None, "none") else f"+{row['memory']}"
        head = [row["task"], str(row["length"]), method, row["budget"]]
        if row["score"] is None:
            table.add_row(*map(Text, head), Text("failed", style="red"))
            continue
        low, high = row["score_ci95"]
        decode = "" if row["decode_ms"] is None else f"{row['decode_ms']:.1f}"
        numbers = [f"{row['score']:.2f}", f"{low:.2f}-{high:.2f}", str(row["n"]), f"{row['kept_fraction']:.1%}"]
        table.add_row(*map(Text, [*head, *numbers, f"{row['kv_bytes'] / 1e6:.1f}", decode]))
    return table


def erase_bench_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Return a table of the rows of the eraser benchmark; ``n*`` and ``exact*`` count samples that pass the filter."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("task", "length", "method", "budget"):
        table.add_column(name, justify="right" if name in ("length", "budget") else "left", overflow="fold")
    for name in ("n", "exact", "n*", "exact*", "kept facts", "leak", "edit ms"):
        table.add_column(name, justify="right")
    for row in rows:
        head = [row["task"], str(row["length"]), row["method"], row["budget"]]
        if row["error"] is not None:
            table.add_row(*map(Text, head), Text("failed", style="red"))
            continue
        shares = {name: _share(row[name]) for name in ("exact", "exact_kept", "retained_exact", "leak_rate")}
        figures = [str(row["n"]), shares["exact"], str(row["n_kept"]), shares["exact_kept"]]
        figures += [shares["retained_exact"], shares["leak_rate"], f"{1e3 * row['edit_s']:.0f}"]
        table.add_row(*map(Text, [*head, *figures]))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


@contextmanager
def reading_bar(console: Console, label: str = "reading") -> Iterator[Any]:
    """Show a progress bar on a console and yield ``advance(done, total, what=label)``."""
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total, what=label: progress.update(task, completed=done, total=total, description=what)


@contextmanager
def training_bar(console: Console) -> Iterator[Callable[[int, int, Mapping[str, Any]], None]]:
    """Show a progress bar on a console and yield the ``on_step`` of :func:`vestige.training.loop.train`.

    Beside the bar are the parts of the loss, the latest validation and the time left.
    """
    columns = BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown: list[TaskID] = []
        latest: dict[str, Any] = {}

        def on_step(done: int, total: int, record: Mapping[str, Any]) -> None:
            latest.update(record.get("validation", {}))
            text = training_line(record, latest)
            if not shown:  # a resumed run starts later; earlier steps say nothing about the time left
                shown.append(progress.add_task(text, total=total, completed=done - 1))
            progress.update(shown[0], completed=done, description=text)

        yield on_step


def training_line(record: Mapping[str, Any], validation: Mapping[str, Any]) -> str:
    """Return the figures of a step and of the latest validation in one line, with a dash for a missing figure."""
    figures = {name: x for name, x in record.items() if name not in ("step", "seconds", "tokens", "validation")}
    step, latest = (" ".join(f"{name} {_figure(x)}" for name, x in y.items()) for y in (figures, validation))
    return escape(f"{step} | {latest}" if latest else step)


def _figure(value: float | None) -> str:
    return "-" if value is None else format(value, ".3g")
