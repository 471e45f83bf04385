"""IndexMem beside the field at equal bytes, and the gain of each memory for each evictor.

``python -m experiments indexmem --essays DIR`` starts or resumes it. Budgets give every method the same bytes: index
keys, query records and memories are paid for in pairs.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from experiments import equal_bytes, runner
from experiments.comparison import draw_scores, format_table, verdict
from experiments.runner import Dev, Essays, Out, Parts
from vestige.bench.report.tables import format_markdown
from vestige.bench.results.aggregate import Record, Row, gain
from vestige.cli.options import Dtype

MODEL, OURS = "smollm2-135m", "indexmem(share=model)"
TASKS = ("ruler/niah_single_1", "ruler/niah_single_2", "ruler/niah_multikey_1", "niah")
"""RULER tasks that the full cache answers, and needles by depth."""
FIELD = (
    OURS, "retention", "laprox(kernel=41, causal=True)", "snapkv(kernel=41, causal=True)", "keydiff(share=model)",
    "compactor(share=model)", "lagkv", "kvzip(share=model)", "random", "streaming_llm",
)  # fmt: skip
"""Untrained ones are the best three of the choice in ``experiments/retention.py``, and the papers' rivals."""
ALL = "all"
REMEMBERING = (OURS, "retention", "laprox(kernel=41, causal=True)", "snapkv(kernel=41, causal=True)")
MEMORIES = ("none", "linear", "slots", "moments", "centroids")
FRACTIONS = ("0.25", "0.1", "0.05")
LENGTH, LONG = 2048, 4096
MAPPED, MAP_LENGTHS = "0.1", (1024, 4096)
"""Budget of the map of needles, depth by length, and its lengths besides the one that has all budgets."""
MAPS = ("agnostic", *(f"map-{length}" for length in MAP_LENGTHS))
SAMPLES, LONG_SAMPLES, ANSWER_ROOM = 20, 10, 16
COMMAND = 'make results NAME=indexmem ARGS="--essays DIR"'


def make_parts(model: PreTrainedModel, essays: Path | None = None, split: str = "test") -> dict[str, equal_bytes.Part]:
    """Return the runs by name.

    Args:
        model: For measuring the bytes of caches.
        essays: Folder of the haystacks.
        split: Of the samples.
    """
    made = {}
    for name, aware in (("agnostic", False), ("aware", True)):
        common: dict[str, Any] = {"question_aware": aware, "essays": essays, "split": split, "answer_room": ANSWER_ROOM}
        made[name] = equal_bytes.make_part(model, FIELD, FRACTIONS, LENGTH, tasks=TASKS, samples=SAMPLES, **common)
        remembering: dict[str, Any] = {"memories": MEMORIES, "tasks": TASKS[1:3], "samples": LONG_SAMPLES}
        made[f"memories-{name}"] = equal_bytes.make_part(model, REMEMBERING, FRACTIONS, LONG, **remembering, **common)
    for length in MAP_LENGTHS:
        on: dict[str, Any] = {"tasks": ("niah",), "samples": SAMPLES, "essays": essays, "split": split}
        made[f"map-{length}"] = equal_bytes.make_part(model, FIELD, (MAPPED,), length, answer_room=ANSWER_ROOM, **on)
    return made


def measure_gains(records: Iterable[Record], budget_of: Callable[[Record], str]) -> list[Row]:
    """Return the gain of each memory for each policy at equal bytes, and for all policies, by fraction.

    Differences are between runs of the same sample; 95 % intervals come from resampling the samples.
    """
    cells: dict[tuple[str, str, str], dict[tuple[str, int], float]] = {}
    for record in records:
        arm = record["arm"]
        cell = cells.setdefault((arm["policy"], budget_of(record), arm["memory"]), {})
        cell[record["task"], record["index"]] = float(record["score"])
    pairs: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for (policy, fraction, memory), cell in cells.items():
        without = cells.get((policy, fraction, "none"), {})
        both = [(score, without[key]) for key, score in cell.items() if key in without]
        for whose in (policy, ALL) if memory != "none" else ():
            pairs.setdefault((whose, fraction, memory), []).extend(both)
    names, order = ("policy", "fraction", "memory"), (*REMEMBERING, ALL)
    rows = [dict(zip(names, key, strict=True)) | gain(both) for key, both in pairs.items() if both]
    return sorted(rows, key=lambda row: (order.index(row["policy"]), -float(row["fraction"]), row["memory"]))


def format_gains(rows: Iterable[Row]) -> str:
    """Return Markdown of :func:`measure_gains`."""
    lines = [
        [
            *(row["policy"], row["fraction"], row["memory"], str(row["n"])),
            *(f"{row['without']:.2f}", f"{row['score']:.2f}", runner.format_interval(row["gain"], row["gain_ci95"])),
        ]
        for row in rows
    ]
    columns = ("policy", "budget", "memory", "samples", "without", "with", "gain")
    return format_markdown(columns, lines, words=("policy", "memory"))


def draw_needles(rows: Iterable[tuple[Row, str]]) -> str:
    """Return the SVG of the share of needles that each method finds, by length and depth.

    Args:
        rows: Of the benchmark, each with the fraction under which it is compared.
    """
    from vestige.bench.report.methods import MethodKey
    from vestige.bench.report.plots import draw_heat_map

    found: dict[tuple[str, int, float], float] = {}
    for row, fraction in rows:
        if row["task"] == "niah" and fraction in (MAPPED, "1.0") and row["n"]:
            for place in row["parts"] or [row]:
                found[MethodKey.of(row).label, row["length"], place["tags"]["depth"]] = place["score"]
    methods = list(dict.fromkeys(method for method, _, _ in found))
    places = sorted({(length, depth) for _, length, depth in found})
    grid = [[found.get((method, *place)) for place in places] for method in methods]
    names = [f"{depth:.0%}\n{length:,}" for length, depth in places]
    title = f"{MODEL}, needles at a budget of {MAPPED}"
    return draw_heat_map(title, grid, methods, names, ("method", "depth of the needle, and length"))


def summarize(out: Path, made: Mapping[str, equal_bytes.Part]) -> None:
    """Write the verdicts, gains and pictures of all parts that have results."""
    from vestige.bench.report.rows import read_rows
    from vestige.utils.files import write_atomically

    blocks, needles = equal_bytes.list_impossible(made), list[tuple[Row, str]]()
    for name, part in made.items():
        records, remembers = runner.read_records(out / name), name.startswith("memories")
        found = measure_gains(records, part.budget_of) if remembers else verdict(records, OURS, part.budget_of)
        if not (rows := runner.update_rows(out / f"{name}.json", found)):
            continue
        if name in MAPS:
            needles += [(row, part.budget_of({"arm": row})) for row in read_rows(out / name)]
        if remembers:
            blocks.append(f"## {name}\n\n{format_gains(rows)}")
        else:
            blocks.append(f"## {name}\n\n![scores by bytes](scores-{name}.svg)\n\n{format_table(rows, OURS)}")
            write_atomically(out / f"scores-{name}.svg", draw_scores(rows, rows[0]["length"], f"{MODEL}, {name}"))
    if needles:
        write_atomically(out / "needles.svg", draw_needles(needles))
        blocks.append("## Needles by depth and length\n\n![needles found](needles.svg)\n")
    runner.write_summary(out / "verdict.md", "IndexMem", COMMAND, *blocks)


def main(out: Out = None, essays: Essays = None, part: Parts = None, dev: Dev = False, dtype: Dtype = None) -> None:
    """Run the comparison, or resume it, part by part."""
    from vestige.models.loading import load

    folder = runner.choose_folder(out, "indexmem", dev=dev)
    made = make_parts(load(MODEL, dtype=dtype)[0], essays, runner.choose_split(dev))
    for name, run in runner.select_parts(made, part).items():
        runner.run_bench(run.config, folder / name, model=MODEL, command=COMMAND, label=name, dtype=dtype)
    summarize(folder, made)
