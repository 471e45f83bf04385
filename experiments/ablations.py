"""What the parts of the gates' training are worth: gates trained in other ways, each for some minutes, side by side.

``make results-gates DATA=DIR ESSAYS=DIR`` trains and compares them, and goes on with what is there after an interrupt.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from experiments.retention import ANSWER_ROOM, MODEL
from experiments.runner import Dev, Essays, Out, Parts, benched, chosen, records_of, split_of
from vestige.bench.config import BenchConfig
from vestige.bench.methods.method import cross
from vestige.bench.results.aggregate import Record, bootstrap_interval
from vestige.training.model_card import CARD

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
"""What is different in each way from the first, which trains as the shipped gates were trained."""
SAID = (
    f"{FIRST} is trained as the shipped gates were, for a quarter of the steps; the others differ from the one beside "
    "them in what they are named for, and are compared with it on the same samples."
)
BASELINES = {"start-by-lives": "start-alone", "start-by-replay": "start-alone", "without-capacity": "gradually"}
"""What a way differs from in nothing but what it is named for, where that is not the first."""
TASKS = ("ruler/niah_single_2", "ruler/niah_multikey_1", "dialogue/retrieval")
BUDGETS, SAMPLES = ("0.25", "0.1", "0.05"), 20
COMMAND = "make results-gates DATA=DIR ESSAYS=DIR"


def training(way: str, data: tuple[str, ...], field: str) -> Any:
    """Return one of the ways as a training."""
    from vestige.training.config import LoopConfig
    from vestige.training.retention.task import RetentionOptions
    from vestige.training.retention.training import RetentionTraining

    changed = dict(WAYS[way])
    tied = changed.pop("tied", True)
    common: dict[str, Any] = {"warm": WARM, "warm_loss": "ranking", "forgets": "at_once"}
    options = RetentionOptions(length=LENGTH, least=LEAST, asked=ASKED, **(common | changed))
    loop = LoopConfig(steps=STEPS, batch=1, lr=2e-3, warmup=STEPS // 20, validate_every=STEPS, save_every=50)
    return RetentionTraining(data=data, field=field, loop=loop, options=options, tied=tied)


def trained(way: str, data: tuple[str, ...], field: str, folder: Path) -> None:
    """Train gates in one way, or go on with it, unless they are done.

    Raises:
        typer.Exit: It was interrupted; its last checkpoint is kept.
    """
    from rich.console import Console

    from vestige.cli import render
    from vestige.models.loading import load
    from vestige.training.trainer import Job

    if is_done(folder):
        return
    network, tokenizer = load(MODEL)
    with render.training_bar(Console(stderr=True)) as tell:
        job = Job(out=folder, name=MODEL, command=COMMAND, resume=folder.exists(), tell=tell)
        done = training(way, data, field).run(network, tokenizer, job)
    if not done.finished:
        raise typer.Exit(130)


def is_done(folder: Path) -> bool:
    """Return whether gates were trained to the end: their card is written last."""
    return (folder / "gates" / CARD).exists()


def policy_of(way: str, gates: Path) -> str:
    """Return the policy that works with one way's gates, where they are trained."""
    return f"retention(gates={gates / way / 'gates'}, share={WAYS[way].get('share', 'model')})"


def compared(policies: Iterable[str], essays: Path | None, split: str) -> BenchConfig:
    """Return the run of all gates that are done, beside the full cache."""
    return BenchConfig(
        tasks=TASKS,
        methods=(*cross(("full",), ()), *cross(tuple(policies), BUDGETS)),
        lengths=(2048,),
        samples=SAMPLES,
        split=split,
        answer_room=ANSWER_ROOM,
        essays=essays,
    )


def table(records: Iterable[Record], ways: Mapping[str, str]) -> str:
    """Return Markdown: a row for each way, for each budget the mean over tasks of as many samples, and how far it is
    above what it differs from on the same samples, with the 95 % interval by resampling them.

    Args:
        records: Of the run.
        ways: What each policy is called.
    """
    scores: dict[tuple[str, str], dict[tuple[str, int], float]] = {}
    for record in records:
        way = ways.get(record["arm"]["policy"], record["arm"]["policy"])
        for budget in BUDGETS if way == "full" else (record["arm"]["budget"],):
            scores.setdefault((way, budget), {})[record["task"], record["index"]] = float(record["score"])
    lines = [f"| trained | beside | {' | '.join(BUDGETS)} |", f"| --- | --- |{' ---: |' * len(BUDGETS)}"]
    for way in dict.fromkeys(way for way, _ in scores):
        other = BASELINES.get(way, FIRST) if way in WAYS and way != FIRST else ""
        cells = [_cell(scores.get((way, at), {}), scores.get((other, at), {})) for at in BUDGETS]
        lines.append(f"| {way} | {other} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(scores: Mapping[Any, float], baseline: Mapping[Any, float]) -> str:
    if not scores:
        return ""
    above = [score - baseline[key] for key, score in scores.items() if key in baseline]
    if not above:
        return f"{mean(scores.values()):.2f}"
    low, high = bootstrap_interval(above) or (0.0, 0.0)
    return f"{mean(scores.values()):.2f}, {mean(above):+.2f} ({low:+.2f} to {high:+.2f})"


def main(
    data: Annotated[list[str], typer.Option(help="As `vestige train retention` takes it; may be repeated.")],
    gates: Annotated[Path, typer.Option(help="Folder for what is trained.")],
    out: Out,
    essays: Essays = None,
    field: Annotated[str, typer.Option(help="The text field of JSONL lines.")] = "text",
    part: Parts = None,
    dev: Dev = False,
) -> None:
    """Train gates in each way, or go on with it, and compare all that are done."""
    from vestige.utils.files import write_atomically

    for way in chosen(WAYS, part):
        trained(way, tuple(data), field, gates / way)
    ways = {policy_of(way, gates): way for way in WAYS if is_done(gates / way)}
    benched(compared(ways, essays, split_of(dev)), out, model=MODEL, command=COMMAND, label="gates")
    said = f"# Gates trained in other ways\n\nRemade by `{COMMAND}`. {SAID}\n\n{table(records_of(out), ways)}"
    write_atomically(out / "ablations.md", said)


if __name__ == "__main__":
    typer.run(main)
