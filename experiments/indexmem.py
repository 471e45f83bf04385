"""IndexMem beside the field at equal bytes, and what each memory adds to each evictor.

``make results-indexmem ESSAYS=DIR`` runs it, and goes on with what is there after an interrupt. Budgets are so many
pairs that every method weighs the same: index keys, records of queries and memories are paid for in pairs.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from transformers import PreTrainedModel

from experiments import equal_bytes
from experiments.comparison import picture, table, verdict
from experiments.runner import Dev, Essays, Out, Parts, benched, chosen, records_of, split_of
from vestige.bench.results.aggregate import Record, Row, gain
from vestige.cli.options import Dtype

MODEL, OURS = "smollm2-135m", "indexmem(share=model)"
TASKS = ("ruler/niah_single_1", "ruler/niah_single_2", "ruler/niah_multikey_1", "niah")
"""RULER tasks that the full cache answers, and needles by depth."""
FIELD = (
    OURS, "retention", "laprox(kernel=41, causal=True)", "snapkv(kernel=41, causal=True)", "keydiff(share=model)",
    "compactor(share=model)", "lagkv", "kvzip(share=model)", "random", "streaming_llm",
)  # fmt: skip
"""Those that need no training are the best three of the choice in ``recipes/retention.py``, and the papers' rivals."""
ALL = "all"
REMEMBERING = (OURS, "retention", "laprox(kernel=41, causal=True)", "snapkv(kernel=41, causal=True)")
MEMORIES = ("none", "linear", "slots", "moments", "centroids")
FRACTIONS = ("0.25", "0.1", "0.05")
LENGTH, LONG = 2048, 4096
MAPPED, MAP_LENGTHS = "0.1", (1024, 4096)
"""The budget of the map of needles, depth by length, and its lengths beside the one that has all budgets."""
MAPS = ("agnostic", *(f"map-{length}" for length in MAP_LENGTHS))
SAMPLES, LONG_SAMPLES, ANSWER_ROOM = 20, 10, 16
COMMAND = "make results-indexmem ESSAYS=DIR"


def parts(model: PreTrainedModel, essays: Path | None = None, split: str = "test") -> dict[str, equal_bytes.Part]:
    """Return the runs by name.

    Args:
        model: Whose caches are weighed.
        essays: Haystacks.
        split: Of the samples.
    """
    made = {}
    for name, aware in (("agnostic", False), ("aware", True)):
        common: dict[str, Any] = {"question_aware": aware, "essays": essays, "split": split, "answer_room": ANSWER_ROOM}
        made[name] = equal_bytes.part(model, FIELD, FRACTIONS, LENGTH, tasks=TASKS, samples=SAMPLES, **common)
        remembering: dict[str, Any] = {"memories": MEMORIES, "tasks": TASKS[1:3], "samples": LONG_SAMPLES}
        made[f"memories-{name}"] = equal_bytes.part(model, REMEMBERING, FRACTIONS, LONG, **remembering, **common)
    for length in MAP_LENGTHS:
        on: dict[str, Any] = {"tasks": ("niah",), "samples": SAMPLES, "essays": essays, "split": split}
        made[f"map-{length}"] = equal_bytes.part(model, FIELD, (MAPPED,), length, answer_room=ANSWER_ROOM, **on)
    return made


def gains(records: Iterable[Record], budget_of: Callable[[Record], str]) -> list[Row]:
    """Return what each memory adds to each policy at equal bytes, and to all of them, by fraction.

    Samples are compared with themselves; intervals, 95 %, are by resampling them.
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


def gains_table(rows: Iterable[Row]) -> str:
    """Return Markdown of :func:`gains`."""
    lines = ["| policy | budget | memory | samples | without | with | gain |", "| --- | ---: | --- |" + " ---: |" * 4]
    for row in rows:
        low, high = row["gain_ci95"]
        lines.append(
            f"| {row['policy']} | {row['fraction']} | {row['memory']} | {row['n']} | {row['without']:.2f} "
            f"| {row['score']:.2f} | {row['gain']:+.2f} ({low:+.2f} to {high:+.2f}) |"
        )
    return "\n".join(lines) + "\n"


def needles(rows: Iterable[tuple[Row, str]]) -> str:
    """Return an SVG: how often each method finds a needle, by length and depth.

    Args:
        rows: Of the benchmark, each with the fraction that it is compared under.
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


def summed_up(out: Path, name: str, part: equal_bytes.Part) -> list[Row]:
    """Return a part's gains or verdict: of its samples, or where these are not kept, as it was last written."""
    from vestige.utils.files import write_atomically

    file = out / f"{name}.json"
    if records := records_of(out / name):
        remembers = name.startswith("memories")
        rows = gains(records, part.budget_of) if remembers else verdict(records, OURS, part.budget_of)
        write_atomically(file, json.dumps(rows, indent=1) + "\n")
    return json.loads(file.read_text()) if file.exists() else []


def summary(out: Path, made: Mapping[str, equal_bytes.Part]) -> None:
    """Write the verdicts, gains and pictures of all parts that have results."""
    from vestige.bench.report.rows import read_rows
    from vestige.utils.files import write_atomically

    said, mapped = [f"# IndexMem\n\nRemade by `{COMMAND}`.", *equal_bytes.left_out(made)], list[tuple[Row, str]]()
    for name, one in made.items():
        if not (rows := summed_up(out, name, one)):
            continue
        if name in MAPS:
            mapped += [(row, one.budget_of({"arm": row})) for row in read_rows(out / name)]
        if name.startswith("memories"):
            said.append(f"## {name}\n\n{gains_table(rows)}")
        else:
            said.append(f"## {name}\n\n![scores by bytes](scores-{name}.svg)\n\n{table(rows, OURS)}")
            write_atomically(out / f"scores-{name}.svg", picture(rows, rows[0]["length"], f"{MODEL}, {name}"))
    if mapped:
        write_atomically(out / "needles.svg", needles(mapped))
        said.append("## Needles by depth and length\n\n![needles found](needles.svg)\n")
    write_atomically(out / "verdict.md", "\n\n".join(said))


def main(out: Out, essays: Essays = None, part: Parts = None, dev: Dev = False, dtype: Dtype = None) -> None:
    """Run the comparison, or go on with it, part by part."""
    from vestige.models.loading import load

    made = parts(load(MODEL, dtype=dtype)[0], essays, split_of(dev))
    for name, one in chosen(made, part).items():
        benched(one.config, out / name, model=MODEL, command=COMMAND, label=name, dtype=dtype)
    summary(out, made)


if __name__ == "__main__":
    typer.run(main)
