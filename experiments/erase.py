"""Erasers side by side: conflicting needles by length, every other task at 2K, and erasing after eviction.

``python -m experiments erase --essays DIR --qa FILE`` starts or resumes it; ``python -m experiments erase-speed`` times
edits by length, which needs an idle machine. Options chosen by scores were chosen on the dev split (``--dev``).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments import runner
from experiments.runner import Dev, Essays, Out, Parts
from vestige.bench.erasing.config import BOUNDS, EraseBenchConfig
from vestige.bench.erasing.tasks import TASKS
from vestige.bench.report.tables import format_markdown
from vestige.bench.results.aggregate import Record, Row

MODEL = "smollm2-135m"
APPROXIMATE = ("learned", "shift", "drop", "repair", "repair(where=end)", "blend", "erratum")
LONG = ("learned", "shift")
"""Methods where a sample takes a minute: besides the bounds, the best known method without cost."""
NEEDLES, QUESTIONS = ("needles_early", "needles_late"), "distractor_qa"
SHORT_LENGTHS, LONG_LENGTHS, LENGTH = (1024, 2048), (4096, 8192), 2048
SAMPLES, TRIED, TRIED_EVICTED = 50, 400, 200
"""Samples of each cell (25 of each kind of needles), and of questions, before the filter; fewer after an eviction,
whose replay makes reading three times as long."""
EVICTION, BUDGET = "kvzip", "0.25"
COMMAND = 'make results NAME=erase ARGS="--essays DIR --qa FILE"'


def make_parts(essays: Path | None = None, qa: Path | None = None, split: str = "test") -> dict[str, EraseBenchConfig]:
    """Return the runs by name; runs of questions need a file of them."""
    cell = SAMPLES // len(NEEDLES)
    others = tuple(name for name in TASKS if name not in (*NEEDLES, QUESTIONS))
    common: dict[str, Any] = {"split": split, "essays": essays, "qa": qa}
    at_length: dict[str, Any] = common | {"lengths": (LENGTH,), "methods": APPROXIMATE}
    evicted: dict[str, Any] = {"policy": EVICTION, "budget": BUDGET}
    made = {
        "needles": EraseBenchConfig(tasks=NEEDLES, methods=APPROXIMATE, lengths=SHORT_LENGTHS, samples=cell, **common),
        "needles-long": EraseBenchConfig(tasks=NEEDLES, methods=LONG, lengths=LONG_LENGTHS, samples=cell, **common),
        "tasks": EraseBenchConfig(tasks=others, samples=SAMPLES, **at_length),
        "needles-evicted": EraseBenchConfig(tasks=NEEDLES, samples=cell, **evicted, **at_length),
    }
    if qa is not None:
        questions: dict[str, Any] = at_length | {"tasks": (QUESTIONS,), "kept_only": True}
        made["questions"] = EraseBenchConfig(samples=TRIED, **questions)
        made["questions-evicted"] = EraseBenchConfig(samples=TRIED_EVICTED, **evicted, **questions)
    return made


def verdict(records: Iterable[Record]) -> list[Row]:
    """Return a row for each method over all needles of all lengths, each sample beside its recompute.

    Methods that did not run at all lengths are left out, as they had the easier samples.
    """
    from vestige.bench.erasing.aggregate import aggregate

    needles = [record for record in records if record["task"] in NEEDLES]
    lengths: dict[str, set[int]] = {}
    for record in needles:
        lengths.setdefault(record["method"], set()).add(record["length"])
    most = max(map(len, lengths.values()), default=0)
    needles = [record for record in needles if len(lengths[record["method"]]) == most]
    return [row | {"task": "needles"} for row in aggregate(needles, {}, by=())]


def format_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: one table for each figure, with a row for each method, a column for each task and length.

    Where methods ran only on samples that pass the filter, all figures are of these samples.
    """
    tables = (_format_figure(rows, *figure) for figure in FIGURES)
    return "\n".join(table for table in tables if table)


def _format_figure(rows: Sequence[Mapping[str, Any]], title: str, figure: str, count: str) -> str:
    """Return the table of one figure, or nothing if no row has it."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["method"], row["task"], row["length"]): row for row in rows}
    columns, texts = ["method"], [[method] for method in (*methods, "samples")]
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        found = [cells.get((method, task, length), {}) for method in methods]
        if all(row.get(figure) is None for row in found):
            continue
        filtered = not count.endswith("_kept") and any(row.get("kept_only") for row in found)
        end = "_kept" if filtered else ""
        columns.append(f"{task}{f' {length}' if length else ''}{', filtered' if filtered else ''}")
        samples = str(max(row.get(count + end, 0) for row in found))
        column = [*(_format_cell(row, figure + end) for row in found), samples]
        for text, cell in zip(texts, column, strict=True):
            text.append(cell)
    return f"### {title}\n\n{format_markdown(columns, texts, words=('method',))}" if len(columns) > 1 else ""


FIGURES = (
    ("Exact match with the clean reply, where that is right and the untouched one wrong", "exact_kept", "n_kept"),
    ("Exact match with the clean reply, all samples", "exact", "n"),
    ("Right answer, all samples", "correct", "n"),
    ("Other facts: exact match with the clean reply, all samples", "retained_exact", "n"),
    ("Leaks: samples in which a reply to a leak question says what was erased", "leak_rate", "n"),
    ("KL to the clean reply, nats a token", "kl", "n"),
)  # fmt: skip


def _format_cell(row: Mapping[str, Any], figure: str) -> str:
    value = row.get(figure)
    if value is None:
        return "-"
    ends = row.get(f"{figure}_ci95")
    return f"{value:.2f}" if ends is None else runner.format_interval(value, ends, ".2f")


def draw_map(rows: Sequence[Mapping[str, Any]], figure: str, title: str) -> str:
    """Return the SVG of a figure as colours, a cell for each method and task."""
    from vestige.bench.report.plots import draw_heat_map

    tasks = list(dict.fromkeys((row["task"], row["length"]) for row in rows if row.get(figure) is not None))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["task"], row["length"]): row.get(figure) for row in rows}
    values = [[found.get((method, *task)) for method in methods] for task in tasks]
    names = [f"{task} {length:,}" for task, length in tasks]
    short = [method.replace("where=end", "end") for method in methods]
    return draw_heat_map(title, values, names, short, ("task", "method"))


def draw_times(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the SVG of the time of an edit by length, on logarithmic axes.

    Args:
        rows: Of :func:`vestige.bench.erasing.latency.latency`.
    """
    from vestige.bench.report.lines import make_lines
    from vestige.bench.report.methods import MethodKey
    from vestige.bench.report.plots import Axis, Point, draw_line_chart

    drawn: dict[MethodKey, list[Point]] = {}
    for row in rows:
        if row["method"] != BOUNDS[0]:
            point = Point(x=row["length"], y=1e3 * row["edit_s"])
            drawn.setdefault(MethodKey(policy=row["method"]), []).append(point)
    before, span = rows[0]["before"], rows[0]["span"]
    return draw_line_chart(
        f"Erasing {span} tokens behind the first {before}",
        make_lines(drawn),
        Axis(label="tokens read before", log=True, whole=True),
        Axis(label="edit, milliseconds", log=True),
        legend=True,
    )


def summarize(out: Path) -> None:
    """Write ``report.md`` and the pictures of all parts that have results, and the verdict on the needles."""
    from vestige.bench.results.store import ROWS, SPEED
    from vestige.utils.files import write_atomically

    blocks, records = [], list[Record]()
    for name in sorted(folder.parent.name for folder in out.glob(f"*/{ROWS}")):
        rows = json.loads((out / name / ROWS).read_text())["rows"]
        picture = draw_map(rows, "exact_kept", f"{rows[0]['model']}, {name}: exact match")
        write_atomically(out / name / "exact.svg", picture)
        blocks.append(f"## {name}\n\n![exact match by task and method]({name}/exact.svg)\n\n{format_tables(rows)}")
        if name in ("needles", "needles-long"):
            records += runner.read_records(out / name)
    if pooled := runner.update_rows(out / "needles.json", verdict(records)):
        blocks.insert(0, f"## needles, all lengths together\n\n{format_tables(pooled)}")
    if (out / SPEED).exists():
        timed = json.loads((out / SPEED).read_text())["rows"]
        write_atomically(out / "edit.svg", draw_times(timed))
        blocks.append("## What an edit takes\n\n![milliseconds by length](edit.svg)\n")
    runner.write_summary(out / "report.md", "Erasing", COMMAND, "\n".join(blocks))


def main(
    out: Out = None,
    essays: Essays = None,
    qa: Annotated[
        Path | None, typer.Option(help="Questions in SQuAD's format; default: parts without questions.")
    ] = None,
    part: Parts = None,
    dev: Dev = False,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing; write the report of the results that exist.")
    ] = False,
) -> None:
    """Run the comparison, or resume it, part by part, and write its report."""
    from rich.console import Console

    from vestige.bench.erasing.runner import bench_erase
    from vestige.cli import render
    from vestige.models.loading import load

    folder = runner.choose_folder(out, "erase", dev=dev)
    wanted = {} if report else runner.select_parts(make_parts(essays, qa, runner.choose_split(dev)), part)
    for name, config in wanted.items():
        model, tokenizer = load(MODEL)
        target: dict[str, Any] = {"out": folder / name, "resume": True, "command": COMMAND}
        with render.reading_bar(Console(stderr=True), name) as advance:
            rows = bench_erase(config, model, tokenizer, name=MODEL, progress=advance, **target)
        Console().print(render.erase_bench_table(rows))
    summarize(folder)
