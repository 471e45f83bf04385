"""Ablations of the training of retention gates: gates trained in eight ways, each for some minutes, side by side.

``python -m experiments gates --data DIR --essays DIR`` trains and compares them, or resumes that after an interrupt.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from experiments import runner
from experiments.retention import ANSWER_ROOM, MODEL
from experiments.runner import Dev, Essays, Out, Parts
from vestige.bench.config import BenchConfig
from vestige.bench.methods.method import cross
from vestige.bench.report.tables import format_markdown
from vestige.bench.results.aggregate import Record, bootstrap_interval
from vestige.training.trainer import CARD

STEPS, WARM, LENGTH, LEAST, ASKED = 300, 100, 1536, 500, 16
FIRST = "at-once"
WAYS: dict[str, dict[str, Any]] = {
    FIRST: {},
    "per-layer": {"tied": False, "share": "layer"},
    "per-head": {"tied": False, "share": "head"},
    "start-alone": {"warm": STEPS},
    "start-by-lives": {"warm": STEPS, "warm_loss": "lives"},
    "start-by-replay": {"warm": STEPS, "warm_by": "replay"},
    "gradually": {"forgets": "gradually"},
    "without-capacity": {"forgets": "gradually", "capacity_weight": 0.0},
}
"""Options of each way that differ from the first, which trains as the shipped gates were trained."""
NOTE = (
    f"{FIRST} is trained as the shipped gates were, for a quarter of the steps; the others differ from the one beside "
    "them in what they are named for, and are compared with it on the same samples."
)
BASELINES = {"start-by-lives": "start-alone", "start-by-replay": "start-alone", "without-capacity": "gradually"}
"""The way that differs from a way only in what that is named for, where it is not the first."""
TASKS = ("ruler/niah_single_2", "ruler/niah_multikey_1", "dialogue/retrieval")
BUDGETS, SAMPLES = ("0.25", "0.1", "0.05"), 20
COMMAND = 'make results NAME=gates ARGS="--data DIR --essays DIR"'


def make_training(way: str, data: tuple[str, ...], field: str) -> Any:
    """Return the training of one way."""
    from vestige.training.config import LoopConfig
    from vestige.training.retention.task import RetentionOptions, RetentionTraining

    changed = dict(WAYS[way])
    tied = changed.pop("tied", True)
    common: dict[str, Any] = {"warm": WARM, "warm_loss": "ranking", "forgets": "at_once"}
    options = RetentionOptions(length=LENGTH, least=LEAST, asked=ASKED, **(common | changed))
    loop = LoopConfig(steps=STEPS, batch=1, lr=2e-3, warmup=STEPS // 20, validate_every=STEPS, save_every=50)
    return RetentionTraining(data=data, field=field, loop=loop, options=options, tied=tied)


def train_gates(way: str, data: tuple[str, ...], field: str, folder: Path) -> None:
    """Start or resume the training of gates in one way, unless they are done.

    Raises:
        typer.Exit: The training was interrupted; its last checkpoint is kept.
    """
    from rich.console import Console

    from vestige.cli import render
    from vestige.models.loading import load
    from vestige.training.trainer import Job

    if is_done(folder):
        return
    network, tokenizer = load(MODEL)
    with render.training_bar(Console(stderr=True)) as on_step:
        job = Job(out=folder, name=MODEL, command=COMMAND, resume=folder.exists(), on_step=on_step)
        done = make_training(way, data, field).run(network, tokenizer, job)
    if not done.finished:
        raise typer.Exit(130)


def is_done(folder: Path) -> bool:
    """Return whether the training of gates is complete: their card is written last."""
    return (folder / "gates" / CARD).exists()


def make_policy_name(way: str, gates: Path) -> str:
    """Return the name of the policy with the gates of one way."""
    return f"retention(gates={gates / way / 'gates'}, share={WAYS[way].get('share', 'model')})"


def make_comparison(policies: Iterable[str], essays: Path | None, split: str) -> BenchConfig:
    """Return the run of all complete gates, beside the full cache."""
    return BenchConfig(
        tasks=TASKS,
        methods=(*cross(("full",), ()), *cross(tuple(policies), BUDGETS)),
        lengths=(2048,),
        samples=SAMPLES,
        split=split,
        answer_room=ANSWER_ROOM,
        essays=essays,
    )


def format_table(records: Iterable[Record], ways: Mapping[str, str]) -> str:
    """Return Markdown: a row for each way, a column for each budget with the mean score over tasks.

    Beside a score is its lead over the baseline on the same samples, with a 95 % interval from resampling them.

    Args:
        records: Of the run.
        ways: The name of each policy's way.
    """
    scores: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for record in records:
        way = ways.get(record["arm"]["policy"], record["arm"]["policy"])
        for budget in BUDGETS if way == "full" else (record["arm"]["budget"],):
            scores.setdefault((way, budget), {})[record["task"], record["index"]] = float(record["score"])
    rows = []
    for way in dict.fromkeys(way for way, _ in scores):
        other = BASELINES.get(way, FIRST) if way in WAYS and way != FIRST else ""
        pairs = [(scores.get((way, budget), {}), scores.get((other, budget), {})) for budget in BUDGETS]
        rows.append([way, other, *(_format_cell(*pair) for pair in pairs)])
    return format_markdown(("trained", "beside", *BUDGETS), rows, words=("trained", "beside"))


def _format_cell(scores: Mapping[Any, float], baseline: Mapping[Any, float]) -> str:
    if not scores:
        return ""
    above = [score - baseline[key] for key, score in scores.items() if key in baseline]
    if not above:
        return f"{mean(scores.values()):.2f}"
    return (
        f"{mean(scores.values()):.2f}, {runner.format_interval(mean(above), bootstrap_interval(above) or (0.0, 0.0))}"
    )


def main(
    data: Annotated[list[str], typer.Option(help="As `vestige train retention` takes it; may be repeated.")],
    gates: Annotated[Path, typer.Option(help="Folder for the trained gates.")] = Path("out/gates"),
    out: Out = None,
    essays: Essays = None,
    field: Annotated[str, typer.Option(help="The text field of JSONL lines.")] = "text",
    part: Parts = None,
    dev: Dev = False,
) -> None:
    """Train gates in each way, or resume that, and compare all that are complete."""
    folder = runner.choose_folder(out, "gates", results="retention/gates", dev=dev)
    for way in runner.select_parts(WAYS, part):
        train_gates(way, tuple(data), field, gates / way)
    ways = {make_policy_name(way, gates): way for way in WAYS if is_done(gates / way)}
    runner.run_bench(
        make_comparison(ways, essays, runner.choose_split(dev)), folder, model=MODEL, command=COMMAND, label="gates"
    )
    table = format_table(runner.read_records(folder), ways)
    runner.write_summary(folder / "ablations.md", "Gates trained in other ways", COMMAND, table, note=NOTE)
