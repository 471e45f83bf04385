"""What the parts of the gates' training are worth: gates trained in other ways, each for some minutes, side by side.

``make results-gates DATA=DIR ESSAYS=DIR`` trains and compares them, and goes on with what is there after an interrupt.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from vestige.bench.arms import Arm, cross
from vestige.bench.config import BenchConfig
from vestige.recipes.retention import ANSWER_ROOM, MODEL
from vestige.recipes.running import Dev, Essays, Out, Parts, benched, chosen, split_of

STEPS, WARM, LENGTH, LEAST, ASKED = 300, 100, 1536, 500, 16
WAYS: dict[str, dict[str, Any]] = {
    "at-once": {},
    "per-layer": {"tied": False, "share": "layer"},
    "per-head": {"tied": False, "share": "head"},
    "start-alone": {"warm": STEPS},
    "start-by-lives": {"warm": STEPS, "warm_loss": "lives"},
    "start-by-replay": {"warm": STEPS, "warm_by": "replay"},
    "gradually": {"forgets": "gradually"},
    "without-capacity": {"forgets": "gradually", "capacity_weight": 0.0},
}
"""What is different in each way from the first, which trains as the shipped gates were trained."""
TASKS = ("ruler/niah_single_2", "ruler/niah_multikey_1", "dialogue/retrieval")
BUDGETS, SAMPLES = ("0.25", "0.1", "0.05"), 20
COMMAND = "make results-gates DATA=DIR ESSAYS=DIR"


def training(way: str, data: tuple[str, ...], field: str) -> Any:
    """Return one of the ways as a training."""
    from vestige.learn.config import LoopConfig
    from vestige.learn.retention.task import RetentionOptions
    from vestige.learn.retention.training import RetentionTraining

    changed = dict(WAYS[way])
    tied = changed.pop("tied", True)
    common: dict[str, Any] = {"warm": WARM, "warm_loss": "ranking", "forgets": "at_once"}
    options = RetentionOptions(length=LENGTH, least=LEAST, asked=ASKED, **(common | changed))
    loop = LoopConfig(steps=STEPS, batch=1, lr=2e-3, warmup=STEPS // 20, validate_every=STEPS, save_every=50)
    return RetentionTraining(data=data, field=field, loop=loop, options=options, tied=tied)


def trained(way: str, data: tuple[str, ...], field: str, folder: Path) -> Path:
    """Return the folder of the gates of one way, trained if they are not there yet."""
    from rich.console import Console

    from vestige import show
    from vestige.download import load
    from vestige.learn.job import Job

    if not (folder / "gates").exists():
        network, tokenizer = load(MODEL)
        with show.training_bar(Console(stderr=True)) as tell:
            job = Job(out=folder, name=MODEL, command=COMMAND, resume=folder.exists(), tell=tell)
            training(way, data, field).run(network, tokenizer, job)
    return folder / "gates"


def compared(gates: Path, way: str, essays: Path | None, split: str) -> BenchConfig:
    """Return the run of one way's gates."""
    share = WAYS[way].get("share", "model")
    arms: tuple[Arm, ...] = cross((f"retention(gates={gates})",), BUDGETS, shares=(share,))
    return BenchConfig(
        tasks=TASKS,
        arms=(*cross(("full",), ()), *arms),
        lengths=(2048,),
        samples=SAMPLES,
        split=split,
        answer_room=ANSWER_ROOM,
        essays=essays,
    )


def table(scores: dict[str, dict[str, float]]) -> str:
    """Return Markdown: a row for each way, a column for each budget, the mean over tasks and samples."""
    lines = [f"| trained | {' | '.join(BUDGETS)} | full |", f"| --- |{' ---: |' * (len(BUDGETS) + 1)}"]
    for way, found in scores.items():
        cells = [f"{found[budget]:.2f}" if budget in found else "" for budget in (*BUDGETS, "1.0")]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(
    data: Annotated[list[str], typer.Option(help="As `vestige train retention` takes it; may be repeated.")],
    gates: Annotated[Path, typer.Option(help="Folder for what is trained.")],
    out: Out,
    essays: Essays = None,
    field: Annotated[str, typer.Option(help="The text field of JSONL lines.")] = "text",
    part: Parts = None,
    dev: Dev = False,
) -> None:
    """Train gates in each way, or go on with it, and compare them."""
    from vestige.bench.store import write_atomically

    scores: dict[str, dict[str, float]] = {}
    for way in chosen(WAYS, part):
        made = trained(way, tuple(data), field, gates / way)
        config = compared(made, way, essays, split_of(dev))
        rows = benched(config, out / way, model=MODEL, command=COMMAND, label=way)
        for row in rows:
            found = scores.setdefault(way, {})
            found[row["budget"]] = found.get(row["budget"], 0.0) + row["score"] / len(TASKS)
    write_atomically(
        out / "ablations.md", f"# Gates trained in other ways\n\nRemade by `{COMMAND}`.\n\n{table(scores)}"
    )


if __name__ == "__main__":
    typer.run(main)
