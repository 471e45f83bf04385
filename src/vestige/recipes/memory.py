"""What a memory of the evicted is worth on long contexts, at equal pairs and at equal bytes.

``make results-memory ESSAYS=DIR`` runs it, and goes on with what is there after an interrupt. At equal pairs a memory
comes on top of what is kept; at equal bytes each row keeps as many pairs fewer as its memory weighs.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from vestige import memory
from vestige.bench.arms import Arm, cross
from vestige.bench.config import BenchConfig

MODEL = "smollm2-135m"
TASKS = ("ruler/niah_single_2", "ruler/niah_multikey_1")
LENGTHS = (4096, 8192)
FRACTIONS = (0.1, 0.05)
AWARE = ("snapkv(kernel=21)",)
"""With the question read before eviction."""
AGNOSTIC = {4096: ("keydiff(share=model)", "streaming_llm", "kvzip(share=model)"), 8192: ("kvzip(share=model)",)}
"""Without it. At 4,096 tokens KeyDiff and the control answer next to nothing, so that no memory can lower it."""
MEMORIES = ("moments", "moments(mass=1)", "centroids", "centroids(centroids=64)")
HEAD_DIM, PAIR_BYTES = 64, 2 * 64 * 2 + 4
"""Of the model: keys and values in bfloat16, and a position."""
SAMPLES, ANSWER_ROOM = 10, 16
COMMAND = "make results-memory ESSAYS=DIR"


def comparison(length: int, *, aware: bool, essays: Path | None = None, split: str = "test") -> BenchConfig:
    """Return the run at one length, with the question read before eviction or after."""
    return BenchConfig(
        tasks=TASKS,
        arms=(*cross(("full",), ()), *_arms(length, AWARE if aware else AGNOSTIC[length])),
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


def _arms(length: int, policies: tuple[str, ...]) -> Iterator[Arm]:
    for policy in policies:
        share = "model" if "model" in policy else "head"
        for fraction in FRACTIONS:
            pairs = int(length * fraction)
            yield Arm(policy=policy, share=share, budget=str(pairs))
            for name in MEMORIES:
                for budget in (pairs, pairs - weight(name)):
                    yield Arm(policy=policy, share=share, budget=str(budget), memory=name)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results; what is there is gone on with.")],
    essays: Annotated[Path | None, typer.Option(help="A folder of text files; default: online.")] = None,
    dev: Annotated[bool, typer.Option("--dev", help="Run on the dev split.")] = False,
) -> None:
    """Run the comparison, or go on with it."""
    from rich.console import Console

    from vestige import show
    from vestige.bench.run import bench
    from vestige.download import load

    model, tokenizer = load(MODEL)
    for aware in (True, False):
        for length in LENGTHS:
            config = comparison(length, aware=aware, essays=essays, split="dev" if dev else "test")
            folder = out / ("aware" if aware else "agnostic") / str(length)
            with show.reading_bar(Console(stderr=True), folder.name) as advance:
                rows = bench(
                    config, model, tokenizer, name=MODEL, out=folder, resume=True, command=COMMAND, progress=advance
                )
            Console().print(show.bench_table(rows))


if __name__ == "__main__":
    typer.run(main)
