"""Erasers side by side: conflicting needles by length, every other task at 2K, and erasing after eviction.

``make results-erase ESSAYS=DIR QA=FILE`` runs it, and goes on with what is there after an interrupt;
``make results-erase-speed`` times edits by length, which needs an idle machine. What was chosen by looking at scores
was chosen on the dev split (``make results-erase-dev``).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.runner import Dev, Essays, Out, Parts, chosen, records_of, split_of
from vestige.bench.erasing.config import BOUNDS, EraseBenchConfig
from vestige.bench.erasing.tasks import TASKS
from vestige.bench.results.aggregate import Record, Row

MODEL = "smollm2-135m"
APPROXIMATE = ("learned", "shift", "drop", "repair", "repair(where=end)", "blend", "erratum")
LONG = ("learned", "shift")
"""What is run where a sample takes a minute: beside the bounds, the best known that costs nothing."""
NEEDLES, QUESTIONS = ("needles_early", "needles_late"), "distractor_qa"
SHORT_LENGTHS, LONG_LENGTHS, LENGTH = (1024, 2048), (4096, 8192), 2048
SAMPLES, TRIED, TRIED_EVICTED = 50, 400, 200
"""Of each cell (25 of each kind of needles), and of questions, of which those that pass the filter count; fewer behind
an eviction, whose replay makes reading three times as long."""
EVICTION, BUDGET = "kvzip", "0.25"
COMMAND = "make results-erase ESSAYS=DIR QA=FILE"


def parts(essays: Path | None = None, qa: Path | None = None, split: str = "test") -> dict[str, EraseBenchConfig]:
    """Return the runs by name; those of questions only if there is a file of them."""
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
        asked: dict[str, Any] = at_length | {"tasks": (QUESTIONS,), "kept_only": True}
        made["questions"] = EraseBenchConfig(samples=TRIED, **asked)
        made["questions-evicted"] = EraseBenchConfig(samples=TRIED_EVICTED, **evicted, **asked)
    return made


def verdict(records: Iterable[Record]) -> list[Row]:
    """Return how each method does over all needles of all lengths, each sample beside its recompute; methods that were
    not run at all lengths are left out, as they had the easier samples."""
    from vestige.bench.erasing.aggregate import aggregate

    needles = [record for record in records if record["task"] in NEEDLES]
    lengths: dict[str, set[int]] = {}
    for record in needles:
        lengths.setdefault(record["method"], set()).add(record["length"])
    most = max(map(len, lengths.values()), default=0)
    needles = [record for record in needles if len(lengths[record["method"]]) == most]
    return [row | {"task": "needles"} for row in aggregate(needles, {}, by=())]


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown: a row for each method, a column for each task and length, one table for each figure.

    Where methods were run only on what passes the filter, all figures are of that.
    """
    columns = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["method"], row["task"], row["length"]): row for row in rows}
    made = []
    for title, figure, count in FIGURES:
        listed = {one: [cells.get((method, *one), {}) for method in methods] for one in columns}
        shown = {one: found for one, found in listed.items() if any(row.get(figure) is not None for row in found)}
        if not shown:
            continue
        ends = {}
        for one, found in shown.items():
            filtered = not count.endswith("_kept") and any(row.get("kept_only") for row in found)
            ends[one] = "_kept" if filtered else ""
        head = [
            f"{task}{f' {length}' if length else ''}{', filtered' if ends[task, length] else ''}"
            for task, length in shown
        ]
        lines = [f"### {title}", "", f"| method | {' | '.join(head)} |", f"| --- |{' ---: |' * len(head)}"]
        for i, method in enumerate(methods):
            lines.append(f"| {method} | {' | '.join(_cell(shown[one][i], figure + ends[one]) for one in shown)} |")
        counts = [str(max(row.get(count + ends[one], 0) for row in shown[one])) for one in shown]
        made.append("\n".join([*lines, f"| samples | {' | '.join(counts)} |"]))
    return "\n\n".join(made) + "\n"


FIGURES = (
    ("Exact match with the clean reply, where that is right and the untouched one wrong", "exact_kept", "n_kept"),
    ("Exact match with the clean reply, all samples", "exact", "n"),
    ("Right answer, all samples", "correct", "n"),
    ("Other facts: exact match with the clean reply, all samples", "retained_exact", "n"),
    ("Leaks: samples in which a reply to a leak question says what was erased", "leak_rate", "n"),
    ("KL to the clean reply, nats a token", "kl", "n"),
)  # fmt: skip


def _cell(row: Mapping[str, Any], figure: str) -> str:
    value = row.get(figure)
    if value is None:
        return "-"
    ends = row.get(f"{figure}_ci95")
    return f"{value:.2f}" if ends is None else f"{value:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"


def map_of(rows: Sequence[Mapping[str, Any]], figure: str, title: str) -> str:
    """Return an SVG: a cell for each method and task, coloured by a figure."""
    from vestige.bench.report.plots import draw_heat_map

    tasks = list(dict.fromkeys((row["task"], row["length"]) for row in rows if row.get(figure) is not None))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["task"], row["length"]): row.get(figure) for row in rows}
    values = [[found.get((method, *task)) for method in methods] for task in tasks]
    names = [f"{task} {length:,}" for task, length in tasks]
    short = [method.replace("where=end", "end") for method in methods]
    return draw_heat_map(title, values, names, short, ("task", "method"))


def times_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return an SVG: what an edit takes by length, both logarithmic.

    Args:
        rows: Of :func:`vestige.bench.erasing.latency.latency`.
    """
    from vestige.bench.report.methods import MethodKey
    from vestige.bench.report.plots import Axis, Point, draw_line_chart, make_lines

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


def summary(out: Path) -> None:
    """Write ``report.md`` and the pictures of all parts that have results, and the verdict on the needles."""
    from vestige.bench.results.store import ROWS, SPEED
    from vestige.utils.files import write_atomically

    made, records = [], list[Record]()
    for name in sorted(folder.parent.name for folder in out.glob(f"*/{ROWS}")):
        rows = json.loads((out / name / ROWS).read_text())["rows"]
        picture = map_of(rows, "exact_kept", f"{rows[0]['model']}, {name}: exact match")
        write_atomically(out / name / "exact.svg", picture)
        made.append(f"## {name}\n\n![exact match by task and method]({name}/exact.svg)\n\n{tables(rows)}")
        if name in ("needles", "needles-long"):
            records += records_of(out / name)
    if records:
        pooled = verdict(records)
        write_atomically(out / "needles.json", json.dumps(pooled, indent=1) + "\n")
        made.insert(0, f"## needles, all lengths together\n\n{tables(pooled)}")
    if (out / SPEED).exists():
        timed = json.loads((out / SPEED).read_text())["rows"]
        write_atomically(out / "edit.svg", times_of(timed))
        made.append("## What an edit takes\n\n![milliseconds by length](edit.svg)\n")
    write_atomically(out / "report.md", f"# Erasing\n\nRemade by `{COMMAND}`.\n\n" + "\n".join(made))


def main(
    out: Out,
    essays: Essays = None,
    qa: Annotated[
        Path | None, typer.Option(help="Questions in SQuAD's format; default: parts without questions.")
    ] = None,
    part: Parts = None,
    dev: Dev = False,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; write the report of what is there.")] = False,
) -> None:
    """Run the comparison, or go on with it, part by part, and write the report."""
    from rich.console import Console

    from vestige.bench.erasing.runner import bench_erase
    from vestige.cli import render
    from vestige.models.loading import load

    wanted = {} if report else chosen(parts(essays, qa, split_of(dev)), part)
    for name, config in wanted.items():
        model, tokenizer = load(MODEL)
        to: dict[str, Any] = {"out": out / name, "resume": True, "command": COMMAND}
        with render.reading_bar(Console(stderr=True), name) as advance:
            rows = bench_erase(config, model, tokenizer, name=MODEL, progress=advance, **to)
        Console().print(render.erase_bench_table(rows))
    summary(out)


if __name__ == "__main__":
    typer.run(main)
