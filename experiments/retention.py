"""Retention gates against the field, question-agnostic, at equal bytes.

``python -m experiments retention --essays DIR`` starts or resumes it. The rivals are KVzip and the three of our other
policies, and of kvpress's, that did best on the dev split (``--dev``).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from experiments import equal_bytes, runner
from experiments.comparison import draw_scores, format_table, verdict
from experiments.runner import Dev, Essays, Out, Parts
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
"""Methods of kvpress, and their samples of each task, if not all: KVzip takes half a minute for one."""
PRESSED = TASKS[:-1]
"""Tasks for presses, which compress the first text of a conversation only and hold all later ones whole."""
SAMPLES: dict[int, int] = {2048: 20, 1024: 20, 4096: 10}
"""Of each task, by length."""
ANSWER_ROOM = 16
COMMAND = 'make results NAME=retention ARGS="--essays DIR"'
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
"""Candidates for the rivals among our policies, with either share."""
CANDIDATE_PRESSES = (
    "CUR", "Compactor", "CriticalKV(ExpectedAttentionPress)", "ExpectedAttention", "KVzip", "KeyDiff", "Knorm", "LagKV",
    "LeverageScore", "NonCausalAttn", "SnapKV", "TOVA",
)  # fmt: skip
CHOOSING_BUDGETS, CHOOSING_SAMPLES = ("0.25", "0.1"), 3


def make_parts(model: PreTrainedModel, essays: Path | None = None) -> dict[str, equal_bytes.Part]:
    """Return the runs that are judged, on the test split: for each length ours, and those of presses.

    Args:
        model: For measuring the bytes of caches.
        essays: Folder of the haystacks.
    """
    names, made = (RETENTION, *RIVALS, *CONTROLS), {}
    for length, budgets in BUDGETS.items():
        common = _make_options(essays, "test") | {"samples": SAMPLES[length]}
        made[str(length)] = equal_bytes.make_part(model, names, budgets, length, **common)
        presses = {name: cross((), budgets, peers=(_name_press(name),)) for name in PRESSES}
        arms = [replace(arm, samples=PRESSES[name]) for name, found in presses.items() for arm in found]
        pressed = BenchConfig(methods=tuple(arms), lengths=(length,), **common | {"tasks": PRESSED})
        made[f"{length}-presses"] = equal_bytes.Part(config=pressed, fractions={})
    return made


def make_rival_choice(essays: Path | None = None) -> dict[str, BenchConfig]:
    """Return the runs on the dev split that the rivals are chosen by."""
    policies = cross(("full", *CANDIDATES), CHOOSING_BUDGETS, shares=("head", "model"))
    presses = cross(("full",), CHOOSING_BUDGETS, peers=tuple(map(_name_press, CANDIDATE_PRESSES)))
    return {
        name: BenchConfig(methods=arms, lengths=(2048,), samples=CHOOSING_SAMPLES, **_make_options(essays, "dev"))
        for name, arms in (("policies", policies), ("presses", presses))
    }


def _make_options(essays: Path | None, split: str) -> dict[str, Any]:
    return {"tasks": TASKS, "split": split, "answer_room": ANSWER_ROOM, "essays": essays}


def _name_press(name: str) -> str:
    head, bracket, rest = name.partition("(")
    return f"kvpress:{head}Press{bracket}{rest}"


def summarize(out: Path, made: Mapping[str, equal_bytes.Part]) -> None:
    """Write the verdict and the pictures of all lengths that have results."""
    from vestige.utils.files import write_atomically

    found: list[Row] = []
    for length in map(str, BUDGETS):
        records = runner.read_records(out / length) + runner.read_records(out / f"{length}-presses")
        found += verdict(records, RETENTION, made[length].budget_of)
    rows = runner.update_rows(out / "verdict.json", found)
    blocks = (*equal_bytes.list_impossible(made), format_table(rows, RETENTION))
    runner.write_summary(out / "verdict.md", "Retention gates", COMMAND, *blocks, note=NOTES)
    for length in {row["length"] for row in rows}:
        write_atomically(out / f"scores-{length}.svg", draw_scores(rows, length, MODEL))


def main(out: Out = None, essays: Essays = None, part: Parts = None, dev: Dev = False) -> None:
    """Run the comparison, or resume it, part by part; on the dev split run the choice of the rivals."""
    from vestige.models.loading import load

    out = runner.choose_folder(out, "retention", dev=dev)
    made = {} if dev else make_parts(load(MODEL)[0], essays)
    configs = make_rival_choice(essays) if dev else {name: run.config for name, run in made.items()}
    for name, config in runner.select_parts(configs, part).items():
        runner.run_bench(config, out / name, model=MODEL, command=COMMAND, label=name)
    if not dev:
        summarize(out, made)
