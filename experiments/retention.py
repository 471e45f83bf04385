"""Retention gates against the field, question-agnostic, at equal bytes.

``make results-retention ESSAYS=DIR`` runs it, and goes on with what is there after an interrupt. The rivals are KVzip
and the three that did best on the dev split (``make results-retention-dev``) of our other policies, and of kvpress's.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from transformers import PreTrainedModel

from experiments import equal_bytes
from experiments.comparison import picture, table, verdict
from experiments.runner import Dev, Essays, Out, Parts, benched, chosen, records_of
from vestige.bench.config import BenchConfig
from vestige.bench.methods.method import cross
from vestige.bench.results.aggregate import Row

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
RIVALS = ("kvzip(share=model)", "compactor(share=model)", "keydiff(share=model)", "lagkv")
PRESSES: dict[str, int | None] = {"KVzip": 5, "LeverageScore": None, "Compactor": None}
"""Of kvpress, and of how many samples of each task, if not of all: KVzip takes half a minute for one."""
PRESSED = TASKS[:-1]
"""What presses are judged by: they compress the first text of a conversation only, and hold all later ones whole."""
SAMPLES: dict[int, int] = {2048: 20, 1024: 20, 4096: 10}
"""Of each task, by length."""
ANSWER_ROOM = 16
COMMAND = "make results-retention ESSAYS=DIR"
NOTES = (
    "Presses hold a share of the pairs, and KVzip's, which masks, frees none of them. They are judged by all tasks but "
    "dialogue/recall, whose later texts they never compress. Where another method has fewer samples than ours, "
    "the first texts of dialogue/recall were too short for the sinks and the window that it protects. The last two "
    "columns compare samples with themselves."
)

CANDIDATES = (
    "adakv", "compactor", "criticalkv", "expected_attention", "h2o", "keydiff", "knorm", "lagkv", "laprox", "pyramidkv",
    "r_kv", "snapkv", "tova", "xkv",
)  # fmt: skip
"""Of our policies, those that the rivals are chosen from, with either share."""
CANDIDATE_PRESSES = (
    "CUR", "Compactor", "CriticalKV(ExpectedAttentionPress)", "ExpectedAttention", "KVzip", "KeyDiff", "Knorm", "LagKV",
    "LeverageScore", "NonCausalAttn", "SnapKV", "TOVA",
)  # fmt: skip
CHOOSING_BUDGETS, CHOOSING_SAMPLES = ("0.25", "0.1"), 3


def parts(model: PreTrainedModel, essays: Path | None = None) -> dict[str, equal_bytes.Part]:
    """Return the judged runs, on the test split: for each length ours, and the presses.

    Args:
        model: Whose caches are weighed.
        essays: Haystacks.
    """
    names, made = (RETENTION, *RIVALS, *CONTROLS), {}
    for length, budgets in BUDGETS.items():
        common = _common(essays, "test") | {"samples": SAMPLES[length]}
        made[str(length)] = equal_bytes.part(model, names, budgets, length, **common)
        arms = [
            replace(arm, samples=n) for name, n in PRESSES.items() for arm in cross((), budgets, peers=(_press(name),))
        ]
        pressed = BenchConfig(methods=tuple(arms), lengths=(length,), **common | {"tasks": PRESSED})
        made[f"{length}-presses"] = equal_bytes.Part(config=pressed, fractions={})
    return made


def choosing(essays: Path | None = None) -> dict[str, BenchConfig]:
    """Return the runs on the dev split that the rivals are chosen by."""
    policies = cross(("full", *CANDIDATES), CHOOSING_BUDGETS, shares=("head", "model"))
    presses = cross(("full",), CHOOSING_BUDGETS, peers=tuple(map(_press, CANDIDATE_PRESSES)))
    return {
        name: BenchConfig(methods=arms, lengths=(2048,), samples=CHOOSING_SAMPLES, **_common(essays, "dev"))
        for name, arms in (("policies", policies), ("presses", presses))
    }


def _common(essays: Path | None, split: str) -> dict[str, Any]:
    return {"tasks": TASKS, "split": split, "answer_room": ANSWER_ROOM, "essays": essays}


def _press(name: str) -> str:
    head, bracket, rest = name.partition("(")
    return f"kvpress:{head}Press{bracket}{rest}"


def summary(out: Path, made: Mapping[str, equal_bytes.Part]) -> None:
    """Write the verdict and the pictures of all lengths that have results."""
    from vestige.utils.files import write_atomically

    rows: list[Row] = []
    for length in map(str, BUDGETS):
        records = records_of(out / length) + records_of(out / f"{length}-presses")
        rows += verdict(records, RETENTION, made[length].budget_of)
    write_atomically(out / "verdict.json", json.dumps(rows, indent=1) + "\n")
    said = ["# Retention gates", f"Remade by `{COMMAND}`. {NOTES}", *equal_bytes.left_out(made), table(rows, RETENTION)]
    write_atomically(out / "verdict.md", "\n\n".join(said))
    for at in {row["length"] for row in rows}:
        write_atomically(out / f"scores-{at}.svg", picture(rows, at, MODEL))


def main(out: Out, essays: Essays = None, part: Parts = None, dev: Dev = False) -> None:
    """Run the comparison, or go on with it, part by part; on the dev split what the rivals are chosen by."""
    from vestige.models.loading import load

    made = {} if dev else parts(load(MODEL)[0], essays)
    configs = choosing(essays) if dev else {name: one.config for name, one in made.items()}
    for name, config in chosen(configs, part).items():
        benched(config, out / name, model=MODEL, command=COMMAND, label=name)
    if not dev:
        summary(out, made)


if __name__ == "__main__":
    typer.run(main)
