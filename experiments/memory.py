"""What a memory of the evicted is worth on long contexts, at equal pairs and at equal bytes.

``make results-memory ESSAYS=DIR`` runs it, and goes on with what is there after an interrupt. At equal pairs a memory
comes on top of what is kept; at equal bytes each row keeps as many pairs fewer as its memory weighs.
"""

import json
import math
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import typer

from experiments.runner import Dev, Essays, Out, benched, records_of, split_of
from vestige import memory
from vestige.bench.config import BenchConfig
from vestige.bench.methods.method import Method, cross
from vestige.bench.results.aggregate import Record, Row, gain

MODEL = "smollm2-135m"
TASKS = ("ruler/niah_single_2", "ruler/niah_multikey_1")
FRACTIONS = (0.1, 0.05)
AWARE = {4096: ("snapkv(kernel=21)",), 8192: ("snapkv(kernel=21)",)}
"""By length, with the question read before eviction."""
AGNOSTIC = {4096: ("keydiff(share=model)", "streaming_llm", "kvzip(share=model)"), 7168: ("kvzip(share=model)",)}
"""Without it. KeyDiff and the control answer next to nothing, so that no memory can lower it; KVzip's replay takes some
of the model's 8,192 positions."""
LENGTHS = tuple(sorted({*AWARE, *AGNOSTIC}))
POLICIES = tuple(dict.fromkeys(name for names in (*AWARE.values(), *AGNOSTIC.values()) for name in names))
ALL, EQUAL = "all", ("pairs", "bytes")
MEMORIES = ("moments", "moments(mass=1)", "centroids", "centroids(centroids=64)")
HEAD_DIM, PAIR_BYTES = 64, 2 * 64 * 2 + 4
"""Of the model: keys and values in bfloat16, and a position."""
SAMPLES, ANSWER_ROOM = 10, 16
COMMAND = "make results-memory ESSAYS=DIR"


def comparison(length: int, *, aware: bool, essays: Path | None = None, split: str = "test") -> BenchConfig:
    """Return the run at one length, with the question read before eviction or after."""
    return BenchConfig(
        tasks=TASKS,
        methods=(*cross(("full",), ()), *_arms(length, (AWARE if aware else AGNOSTIC)[length])),
        lengths=(length,),
        samples=SAMPLES,
        split=split,
        question_aware=aware,
        answer_room=ANSWER_ROOM,
        essays=essays,
    )


def weight(name: str) -> int:
    """Return the pairs of a row that weigh as much as its memory, rounded up."""
    made = memory.make(name)
    assert made is not None
    return math.ceil(made.state_bytes(HEAD_DIM, HEAD_DIM) / PAIR_BYTES)


def _arms(length: int, policies: tuple[str, ...]) -> Iterator[Method]:
    for policy in policies:
        share = "model" if "model" in policy else "head"
        for fraction in FRACTIONS:
            pairs = int(length * fraction)
            yield Method(policy=policy, share=share, budget=str(pairs))
            for name in MEMORIES:
                for budget in (pairs, pairs - weight(name)):
                    yield Method(policy=policy, share=share, budget=str(budget), memory=name)


def gains(records: Iterable[Record]) -> list[Row]:
    """Return what each memory adds to the same policy without one, by policy and fraction, and over all of them.

    At ``equal`` pairs it has as many pairs, at equal bytes so many fewer as it weighs. Samples are compared with
    themselves; intervals, 95 %, are by resampling them.

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
        given = scores.get((policy, name, length, str(held - (weight(name) if equal == "bytes" else 0))), {})
        both = [(given[key], without[key]) for key in given.keys() & without.keys()]
        for whose in (policy, ALL):
            pairs.setdefault((name, equal, fraction, whose), []).extend(both)
    names = ("memory", "equal", "fraction", "policy")
    return [dict(zip(names, key, strict=True)) | gain(both) for key, both in pairs.items() if both]


def table(rows: Iterable[Row]) -> str:
    """Return Markdown: a row for each policy, fraction and equality, a column for each memory."""
    cells = {(row["policy"], row["fraction"], row["equal"], row["memory"]): row for row in rows}
    heads = list(dict.fromkeys(key[:3] for key in cells))
    lines = [
        f"| policy | kept | equal | samples | without | {' | '.join(MEMORIES)} |",
        f"| --- | ---: | --- | ---: | ---: |{' ---: |' * len(MEMORIES)}",
    ]
    for head in sorted(heads, key=lambda head: ((*POLICIES, ALL).index(head[0]), -head[1], head[2])):
        found = [cells[*head, name] for name in MEMORIES if (*head, name) in cells]
        shown = [f"{row['gain']:+.2f} ({row['gain_ci95'][0]:+.2f} to {row['gain_ci95'][1]:+.2f})" for row in found]
        first = f"| {head[0]} | {head[1]:g} | {head[2]} | {found[0]['n']} | {found[0]['without']:.2f} |"
        lines.append(f"{first} {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def summary(out: Path) -> None:
    """Write ``gains.json`` and ``gains.md`` from all runs in a folder."""
    from vestige.utils.files import write_atomically

    records = [record for folder in sorted(out.glob("*/*/")) for record in records_of(folder)]
    rows = gains(records)
    write_atomically(out / "gains.json", json.dumps(rows, indent=1) + "\n")
    said = "What a memory adds to the mean score, beside the same policy without one."
    write_atomically(out / "gains.md", f"# Memories of the evicted\n\nRemade by `{COMMAND}`. {said}\n\n{table(rows)}")


def main(out: Out, essays: Essays = None, dev: Dev = False) -> None:
    """Run the comparison, or go on with it."""
    for aware in (True, False):
        for length in AWARE if aware else AGNOSTIC:
            config = comparison(length, aware=aware, essays=essays, split=split_of(dev))
            folder = out / ("aware" if aware else "agnostic") / str(length)
            benched(config, folder, model=MODEL, command=COMMAND, label=folder.name)
    summary(out)


if __name__ == "__main__":
    typer.run(main)
