"""The gain of a memory of evicted pairs on long contexts, at equal pairs and at equal bytes.

``python -m experiments memory --essays DIR`` starts or resumes it. At equal pairs a memory comes on top of the kept
pairs; at equal bytes each row keeps fewer pairs, by as many as its memory weighs.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from experiments import runner
from experiments.runner import Dev, Essays, Out
from vestige import memory
from vestige.bench.config import BenchConfig
from vestige.bench.methods.method import Method, cross
from vestige.bench.report.tables import format_markdown
from vestige.bench.results.aggregate import Record, Row, gain

MODEL = "smollm2-135m"
TASKS = ("ruler/niah_single_2", "ruler/niah_multikey_1")
FRACTIONS = (0.1, 0.05)
AWARE = {4096: ("snapkv(kernel=21)",), 8192: ("snapkv(kernel=21)",)}
"""Policies by length, with the question read before eviction."""
AGNOSTIC = {4096: ("keydiff(share=model)", "streaming_llm", "kvzip(share=model)"), 7168: ("kvzip(share=model)",)}
"""Policies by length, question-agnostic. KeyDiff and the control answer next to nothing, so that no memory can lower
their scores; KVzip's replay takes some of the model's 8,192 positions."""
LENGTHS = tuple(sorted({*AWARE, *AGNOSTIC}))
POLICIES = tuple(dict.fromkeys(name for names in (*AWARE.values(), *AGNOSTIC.values()) for name in names))
ALL, EQUAL = "all", ("pairs", "bytes")
MEMORIES = ("moments", "moments(mass=1)", "centroids", "centroids(centroids=64)")
HEAD_DIM, PAIR_BYTES = 64, 2 * 64 * 2 + 4
"""Of the model: a pair is a key and a value in bfloat16, and a position."""
SAMPLES, ANSWER_ROOM = 10, 16
COMMAND = 'make results NAME=memory ARGS="--essays DIR"'


def make_comparison(length: int, *, aware: bool, essays: Path | None = None, split: str = "test") -> BenchConfig:
    """Return the run at one length, with the question read before eviction or after."""
    return BenchConfig(
        tasks=TASKS,
        methods=(*cross(("full",), ()), *_make_methods(length, (AWARE if aware else AGNOSTIC)[length])),
        lengths=(length,),
        samples=SAMPLES,
        split=split,
        question_aware=aware,
        answer_room=ANSWER_ROOM,
        essays=essays,
    )


def count_memory_pairs(name: str) -> int:
    """Return the number of pairs that weigh as much as a row's memory, rounded up."""
    made = memory.make(name)
    assert made is not None
    return math.ceil(made.state_bytes(HEAD_DIM, HEAD_DIM) / PAIR_BYTES)


def _make_methods(length: int, policies: tuple[str, ...]) -> Iterator[Method]:
    for policy in policies:
        share = "model" if "model" in policy else "head"
        for fraction in FRACTIONS:
            pairs = int(length * fraction)
            yield Method(policy=policy, share=share, budget=str(pairs))
            for name in MEMORIES:
                for budget in (pairs, pairs - count_memory_pairs(name)):
                    yield Method(policy=policy, share=share, budget=str(budget), memory=name)


def measure_gains(records: Iterable[Record]) -> list[Row]:
    """Return the gain of each memory over the same policy without one, by policy and fraction, and over all policies.

    At ``equal`` pairs both have as many pairs; at equal bytes a memory takes the place of pairs. Differences are
    between runs of the same sample; 95 % intervals come from resampling the samples.

    Args:
        records: Of all runs.
    """
    scores: dict[tuple[Any, ...], dict[tuple[Any, ...], float]] = {}
    for record in records:
        arm = record["arm"]
        cell = scores.setdefault((arm["policy"], arm["memory"], record["length"], arm["budget"]), {})
        cell[record["task"], record["index"]] = float(record["score"])
    pairs: dict[tuple[str, str, float, str], list[tuple[float, float]]] = {}
    for policy, length, name, fraction, equal in product(POLICIES, LENGTHS, MEMORIES, FRACTIONS, EQUAL):
        held = int(length * fraction)
        without = scores.get((policy, "none", length, str(held)), {})
        remembered = scores.get(
            (policy, name, length, str(held - (count_memory_pairs(name) if equal == "bytes" else 0))), {}
        )
        both = [(remembered[key], without[key]) for key in remembered.keys() & without.keys()]
        for whose in (policy, ALL):
            pairs.setdefault((name, equal, fraction, whose), []).extend(both)
    names = ("memory", "equal", "fraction", "policy")
    return [dict(zip(names, key, strict=True)) | gain(both) for key, both in pairs.items() if both]


def format_table(rows: Iterable[Row]) -> str:
    """Return Markdown: a row for each policy, fraction and equality, a column for each memory."""
    cells = {(row["policy"], row["fraction"], row["equal"], row["memory"]): row for row in rows}
    heads = sorted({key[:3] for key in cells}, key=lambda head: ((*POLICIES, ALL).index(head[0]), -head[1], head[2]))
    lines = []
    for policy, fraction, equal in heads:
        found = [row for name in MEMORIES if (row := cells.get((policy, fraction, equal, name)))]
        gains = [runner.format_interval(row["gain"], row["gain_ci95"]) for row in found]
        lines.append([policy, f"{fraction:g}", equal, str(found[0]["n"]), f"{found[0]['without']:.2f}", *gains])
    columns = ("policy", "kept", "equal", "samples", "without", *MEMORIES)
    return format_markdown(columns, lines, words=("policy", "equal"))


def summarize(out: Path) -> None:
    """Write ``gains.json`` and ``gains.md`` from all runs in a folder."""
    records = [record for folder in sorted(out.glob("*/*/")) for record in runner.read_records(folder)]
    rows = runner.update_rows(out / "gains.json", measure_gains(records))
    note = "What a memory adds to the mean score, beside the same policy without one."
    runner.write_summary(out / "gains.md", "Memories of the evicted", COMMAND, format_table(rows), note=note)


def main(out: Out = None, essays: Essays = None, dev: Dev = False) -> None:
    """Run the comparison, or resume it, and write its report."""
    out = runner.choose_folder(out, "memory", dev=dev)
    for aware in (True, False):
        for length in AWARE if aware else AGNOSTIC:
            config = make_comparison(length, aware=aware, essays=essays, split=runner.choose_split(dev))
            folder = out / ("aware" if aware else "agnostic") / str(length)
            runner.run_bench(config, folder, model=MODEL, command=COMMAND, label=folder.name)
    summarize(out)
    if not dev:
        runner.write_report(out)
