"""Retention gates against the field, question-agnostic, at equal bytes.

``make results-retention ESSAYS=DIR`` runs it, and goes on with what is there after an interrupt. The rivals are KVzip
and the three that did best on the dev split (``make results-retention-dev``) of our other policies, and of kvpress's.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from vestige.bench.arms import Arm, cross
from vestige.bench.config import BenchConfig
from vestige.bench.report.methods import Method
from vestige.bench.rows import Record, Row, resampled
from vestige.recipes.running import Dev, Essays, Out, Parts, benched, chosen, split_of

MODEL = "smollm2-135m"
TASKS = (
    "ruler/niah_single_1",
    "ruler/niah_single_2",
    "ruler/niah_single_3",
    "ruler/niah_multikey_1",
    "dialogue/retrieval",
    "dialogue/recall",
)
"""The RULER tasks that the full cache answers best on the dev split at 2,048 tokens, and facts told in dialogues."""
BUDGETS: dict[int, tuple[str, ...]] = {2048: ("0.25", "0.1", "0.05"), 1024: ("0.1",), 4096: ("0.1",)}
RETENTION, CONTROLS = "retention", ("random", "streaming_llm")
RIVALS = ("kvzip(share=model)", "keydiff(share=model)", "expected_attention(share=model)", "compactor")
PRESSES = ("KVzip", "KeyDiff", "ExpectedAttention")
PAIR_BYTES, RETENTION_BYTES = 2 * 64 * 2 + 4, 2 * 64 * 2 + 4 + 4
"""Of the model: keys and values in bfloat16 and a position; and with a retention."""
SAMPLES, ANSWER_ROOM = 20, 16
COMMAND = "make results-retention ESSAYS=DIR"

CANDIDATES = (
    "adakv", "compactor", "criticalkv", "expected_attention", "h2o", "keydiff", "knorm", "lagkv", "laprox", "pyramidkv",
    "r_kv", "snapkv", "tova", "xkv",
)  # fmt: skip
"""Of our policies, those that the rivals are chosen from, with either share."""
CANDIDATE_PRESSES = (
    "CUR", "Compactor", "CriticalKV(ExpectedAttentionPress)", "ExpectedAttention", "KVzip", "KeyDiff", "Knorm", "LagKV",
    "LeverageScore", "NonCausalAttn", "SnapKV", "TOVA",
)  # fmt: skip
CHOOSING_BUDGETS, CHOOSING_SAMPLES = ("0.25", "0.1"), 6


def parts(essays: Path | None = None, split: str = "test") -> dict[str, BenchConfig]:
    """Return the judged runs, by length."""
    return {str(length): _config(_arms(budgets), length, essays, split) for length, budgets in BUDGETS.items()}


def choosing(essays: Path | None = None) -> dict[str, BenchConfig]:
    """Return the runs on the dev split that the rivals are chosen by."""
    policies = cross(("full", *CANDIDATES), CHOOSING_BUDGETS, shares=("head", "model"))
    presses = cross(("full",), CHOOSING_BUDGETS, peers=tuple(map(_press, CANDIDATE_PRESSES)))
    return {
        name: replace(_config(arms, 2048, essays, "dev"), samples=CHOOSING_SAMPLES)
        for name, arms in (("policies", policies), ("presses", presses))
    }


def equal(budget: str) -> str:
    """Return the share of the pairs that weighs as much with retentions as a budget without."""
    return f"{float(budget) * PAIR_BYTES / RETENTION_BYTES:.4f}"


def _arms(budgets: Sequence[str]) -> tuple[Arm, ...]:
    own = cross((RETENTION,), [equal(budget) for budget in budgets])
    return (*own, *cross(("full", *RIVALS, *CONTROLS), budgets), *cross((), budgets, peers=list(map(_press, PRESSES))))


def _press(name: str) -> str:
    head, bracket, rest = name.partition("(")
    return f"kvpress:{head}Press{bracket}{rest}"


def _config(arms: tuple[Arm, ...], length: int, essays: Path | None, split: str) -> BenchConfig:
    return BenchConfig(
        tasks=TASKS,
        arms=arms,
        lengths=(length,),
        samples=SAMPLES,
        split=split,
        answer_room=ANSWER_ROOM,
        essays=essays,
    )


def verdict(records: Iterable[Record]) -> list[Row]:
    """Return by length, budget and method: bytes, the mean score over all tasks, its share of the full cache's, and by
    how much retention is above it.

    Samples are compared with themselves; intervals, 95 %, are by resampling them.

    Args:
        records: Of all lengths.
    """
    named = {equal(budget): budget for budgets in BUDGETS.values() for budget in budgets}
    cells: dict[tuple[int, str], dict[Method, dict[tuple[str, int], Record]]] = {}
    for record in records:
        arm = record["arm"]
        at = record["length"], named.get(arm["budget"], arm["budget"])
        cells.setdefault(at, {}).setdefault(Method.of(arm), {})[record["task"], record["index"]] = record
    rows = []
    for (length, budget), methods in cells.items():
        if budget == "1.0":
            continue
        full = next(cell for method, cell in cells[length, "1.0"].items() if method.policy == "full")
        ours = next((cell for method, cell in methods.items() if method.policy == RETENTION), {})
        for method, cell in methods.items():
            named_by = {"policy": method.policy, "share": method.share, "peer": method.peer}
            rows.append({"length": length, "budget": budget} | named_by | _row(cell, full, ours))
    return sorted(rows, key=lambda row: (row["length"], -float(row["budget"]), -row["score"]))


def _row(cell: dict[Any, Record], full: dict[Any, Record], ours: dict[Any, Record]) -> Row:
    scores = {key: float(record["score"]) for key, record in cell.items()}
    mean, whole = (sum(float(some[key]["score"]) for key in scores) / len(scores) for some in (cell, full))
    above = [float(ours[key]["score"]) - score for key, score in scores.items() if key in ours]
    return {
        "n": len(scores),
        "kv_bytes": sum(record["kv_bytes"] for record in cell.values()) / len(cell),
        "score": mean,
        "score_ci95": resampled(list(scores.values())),
        "of_full": mean / whole if whole else None,
        "retention_above": sum(above) / len(above) if above else None,
        "retention_above_ci95": resampled(above),
    }


def table(rows: Iterable[Row]) -> str:
    """Return Markdown of :func:`verdict`."""
    lines = [
        "| length | budget | method | samples | MB | score | of full | retention is above by |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        low, high = row["score_ci95"]
        above, ends = row["retention_above"], row["retention_above_ci95"]
        said = "" if above is None or row["policy"] == RETENTION else f"{above:+.2f} ({ends[0]:+.2f} to {ends[1]:+.2f})"
        of_full = "" if row["of_full"] is None else f"{row['of_full']:.0%}"
        lines.append(
            f"| {row['length']} | {row['budget']} | {Method.of(row).label} | {row['n']} | {row['kv_bytes'] / 1e6:.2f} "
            f"| {row['score']:.2f} ({low:.2f} to {high:.2f}) | {of_full} | {said} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Row], length: int) -> str:
    """Return an SVG: the mean score of each method by measured bytes."""
    from vestige.bench.report.methods import looks
    from vestige.bench.report.plots import Axis, Line, Point, line_chart

    drawn: dict[Method, list[Point]] = {}
    for row in rows:
        if row["length"] == length:
            point = Point(x=row["kv_bytes"] / 1e6, y=row["score"], interval=tuple(row["score_ci95"]))
            drawn.setdefault(Method.of(row), []).append(point)
    look = looks(drawn)
    lines = [
        Line(label=one.label, look=look[one], points=tuple(sorted(found, key=lambda point: point.x)))
        for one, found in drawn.items()
    ]
    some = next(row for row in rows if row["length"] == length and row["of_full"])
    full = Point(x=0, y=some["score"] / some["of_full"])
    return line_chart(f"{MODEL}, {length:,} tokens, all tasks", lines, Axis(label="MB kept", log=True), level=full)


def summary(out: Path) -> None:
    """Write the verdict and the pictures of all lengths that have results."""
    from vestige.bench.store import SAMPLES as RECORDS
    from vestige.bench.store import write_atomically

    files = [out / name / RECORDS for name in parts() if (out / name / RECORDS).exists()]
    rows = verdict(json.loads(line) for file in files for line in file.read_text().splitlines())
    write_atomically(out / "verdict.json", json.dumps(rows, indent=1) + "\n")
    write_atomically(out / "verdict.md", f"# Retention gates\n\nRemade by `{COMMAND}`.\n\n{table(rows)}")
    for file in files:
        write_atomically(out / f"scores-{file.parent.name}.svg", picture(rows, int(file.parent.name)))


def main(out: Out, essays: Essays = None, part: Parts = None, dev: Dev = False) -> None:
    """Run the comparison, or go on with it, part by part; on the dev split what the rivals are chosen by."""
    for name, config in chosen(choosing(essays) if dev else parts(essays, split_of(dev)), part).items():
        benched(config, out / name, model=MODEL, command=COMMAND, label=name)
    if not dev:
        summary(out)


if __name__ == "__main__":
    typer.run(main)
