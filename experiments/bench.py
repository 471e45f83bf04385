"""The main comparison: our methods, kvpress's and transformers' caches on RULER tasks, on the test split.

``python -m experiments bench --essays DIR`` starts or resumes it. The tasks are the three that the full cache answers
best on the dev split (``--dev``).
"""

from pathlib import Path

from experiments.runner import Dev, Essays, Out, choose_folder, run_bench, write_report
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
"""Tasks that a small model may be able to answer."""
TASKS = ("ruler/niah_single_1", "ruler/niah_single_2", "ruler/niah_multikey_1")
METHODS = ("random", "streaming_llm", "knorm", "keydiff", "tova", "snapkv")
MODEL_WIDE = ("keydiff", "snapkv")
PRESSES = ("Random", "StreamingLLM", "Knorm", "KeyDiff", "TOVA", "SnapKV")
BUDGETS = {2048: ("0.5", "0.25", "0.1", "0.05"), 1024: ("0.25",)}
COMMAND = 'make results NAME=bench ARGS="--essays DIR"'
SAMPLES, SLOW_SAMPLES, ANSWER_ROOM = 20, 10, 16


def make_comparison(length: int, essays: Path | None = None) -> BenchConfig:
    """Return the published run at one length."""
    return BenchConfig(
        tasks=TASKS,
        methods=make_methods(BUDGETS[length]),
        lengths=(length,),
        samples=SAMPLES,
        split="test",
        answer_room=ANSWER_ROOM,
        essays=essays,
    )


def make_task_choice(length: int, essays: Path | None = None) -> BenchConfig:
    """Return the run that the tasks are chosen by: the full cache alone, on the dev split."""
    return BenchConfig(
        tasks=tuple(f"ruler/{name}" for name in CANDIDATES),
        methods=cross(("full",), ()),
        lengths=(length,),
        samples=SAMPLES,
        answer_room=ANSWER_ROOM,
        essays=essays,
    )


def make_methods(budgets: tuple[str, ...]) -> tuple[Method, ...]:
    """Return all methods at these budgets; KVzip, which reads the text three times, has half of the samples."""
    own = cross(("full", *METHODS), budgets, shares=("head",))
    wide = cross(MODEL_WIDE, budgets, shares=("model",))
    peers = ("transformers:dynamic", "transformers:quantized", *(f"kvpress:{name}Press" for name in PRESSES))
    slow = tuple(
        Method(policy=name, peer=name, budget=budget, samples=SLOW_SAMPLES)
        for name in ("kvpress:KVzipPress",)
        for budget in budgets
    )
    return own + wide + cross((), budgets, peers=peers) + slow


def main(out: Out = None, essays: Essays = None, dev: Dev = False) -> None:
    """Run the comparison, or resume it, and write its report; on the dev split run the choice of tasks."""
    folder = choose_folder(out, "bench", dev=dev)
    for length in BUDGETS:
        config = make_task_choice(length, essays) if dev else make_comparison(length, essays)
        run_bench(config, folder / str(length), model=MODEL, command=COMMAND, label="bench")
    if not dev:
        write_report(folder, folder.parent / "speed")
