"""The comparison in the README: our methods, kvpress's and transformers' caches on RULER tasks, on the test split.

``make results-bench ESSAYS=DIR`` runs it, and goes on with what is there after an interrupt. The tasks are the three
that the full cache answers best on the dev split (``make results-bench-dev``).
"""

from pathlib import Path

import typer

from experiments.runner import Dev, Essays, Out, benched
from vestige.bench.config import BenchConfig
from vestige.bench.methods.method import Method, cross

MODEL = "smollm2-135m"
CANDIDATES = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "fwe",
)
"""Tasks that a small model may answer at all."""
TASKS = ("ruler/niah_single_1", "ruler/niah_single_2", "ruler/niah_multikey_1")
METHODS = ("random", "streaming_llm", "knorm", "keydiff", "tova", "snapkv")
MODEL_WIDE = ("keydiff", "snapkv")
PRESSES = ("Random", "StreamingLLM", "Knorm", "KeyDiff", "TOVA", "SnapKV")
BUDGETS = {2048: ("0.5", "0.25", "0.1", "0.05"), 1024: ("0.25",)}
COMMAND = "make results-bench ESSAYS=DIR"
SAMPLES, SLOW_SAMPLES, ANSWER_ROOM = 20, 10, 16


def comparison(length: int, essays: Path | None = None) -> BenchConfig:
    """Return the published run at one length."""
    return BenchConfig(
        tasks=TASKS,
        methods=arms(BUDGETS[length]),
        lengths=(length,),
        samples=SAMPLES,
        split="test",
        answer_room=ANSWER_ROOM,
        essays=essays,
    )


def choosing(length: int, essays: Path | None = None) -> BenchConfig:
    """Return the run by which tasks are chosen: the full cache alone, on the dev split."""
    return BenchConfig(
        tasks=tuple(f"ruler/{name}" for name in CANDIDATES),
        methods=cross(("full",), ()),
        lengths=(length,),
        samples=SAMPLES,
        answer_room=ANSWER_ROOM,
        essays=essays,
    )


def arms(budgets: tuple[str, ...]) -> tuple[Method, ...]:
    """Return all methods at these budgets; KVzip, which reads the text three times, on half of the samples."""
    own = cross(("full", *METHODS), budgets, shares=("head",))
    wide = cross(MODEL_WIDE, budgets, shares=("model",))
    peers = ("transformers:dynamic", "transformers:quantized", *(f"kvpress:{name}Press" for name in PRESSES))
    slow = tuple(
        Method(policy=name, peer=name, budget=budget, samples=SLOW_SAMPLES)
        for name in ("kvpress:KVzipPress",)
        for budget in budgets
    )
    return own + wide + cross((), budgets, peers=peers) + slow


def main(out: Out, essays: Essays = None, dev: Dev = False) -> None:
    """Run the comparison, or go on with it; on the dev split what the tasks are chosen by."""
    for length in BUDGETS:
        config = choosing(length, essays) if dev else comparison(length, essays)
        benched(config, out / str(length), model=MODEL, command=COMMAND, label="bench")


if __name__ == "__main__":
    typer.run(main)
