"""Retention gates against the field, question-agnostic, at equal bytes.

``make results-retention ESSAYS=DIR`` runs it, and goes on with what is there after an interrupt. The rivals are KVzip
and the three that did best on the dev split (``make results-retention-dev``) of our other policies, and of kvpress's.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import typer

from vestige.bench.arms import Arm, cross
from vestige.bench.config import BenchConfig
from vestige.bench.rows import Record
from vestige.recipes.running import Dev, Essays, Out, Parts, benched, chosen, split_of
from vestige.recipes.standing import picture, table, verdict

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


def budget_of(record: Record) -> str:
    """Return the budget that a record is compared under: what weighs as much counts as equal."""
    named = {equal(budget): budget for budgets in BUDGETS.values() for budget in budgets}
    budget: str = record["arm"]["budget"]
    return named.get(budget, budget)


def summary(out: Path) -> None:
    """Write the verdict and the pictures of all lengths that have results."""
    from vestige.bench.store import SAMPLES as RECORDS
    from vestige.bench.store import write_atomically

    files = [out / name / RECORDS for name in parts() if (out / name / RECORDS).exists()]
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    rows = verdict(records, RETENTION, budget_of)
    write_atomically(out / "verdict.json", json.dumps(rows, indent=1) + "\n")
    write_atomically(out / "verdict.md", f"# Retention gates\n\nRemade by `{COMMAND}`.\n\n{table(rows, RETENTION)}")
    for file in files:
        write_atomically(out / f"scores-{file.parent.name}.svg", picture(rows, int(file.parent.name), MODEL))


def main(out: Out, essays: Essays = None, part: Parts = None, dev: Dev = False) -> None:
    """Run the comparison, or go on with it, part by part; on the dev split what the rivals are chosen by."""
    for name, config in chosen(choosing(essays) if dev else parts(essays, split_of(dev)), part).items():
        benched(config, out / name, model=MODEL, command=COMMAND, label=name)
    if not dev:
        summary(out)


if __name__ == "__main__":
    typer.run(main)
