"""``vestige train``: the commands that learn."""

from pathlib import Path
from typing import Annotated

import typer

from vestige.cli_options import Device, Dtype, Json, Model, Seed, err, out, plain, print_json, typed

train = typer.Typer(help="Train what vestige learns.", no_args_is_help=True, rich_markup_mode=None)


@train.callback()
def _train() -> None:
    """Train what vestige learns; long runs can be interrupted and gone on with."""


@train.command("eraser")
def train_eraser(
    data: Annotated[list[str], typer.Option(help="Text files, folders, JSONL, or hub:owner/name; may be repeated.")],
    to: Annotated[Path, typer.Option("--out", help="A new folder; with --resume one to go on in.")],
    model: Model = "smollm2-135m",
    steps: Annotated[int, typer.Option(help="Updates of the adapter.", min=1)] = 500,
    batch: Annotated[int, typer.Option(help="Samples of a step.", min=1)] = 4,
    lr: Annotated[float, typer.Option(help="Learning rate after the warm-up.")] = 3e-4,
    warmup: Annotated[int | None, typer.Option(help="Steps of rising learning rate; default: a twentieth.")] = None,
    rank: Annotated[int, typer.Option(help="Of the adapter.", min=1)] = 16,
    neighbours: Annotated[int | None, typer.Option(help="Samples of stage 1; default: a quarter of all.")] = None,
    least: Annotated[int, typer.Option(help="Shortest text, in tokens, about.")] = 300,
    most: Annotated[int, typer.Option(help="Longest text, in tokens, about.")] = 2000,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the clean text's logits.")] = 0.0,
    field: Annotated[str, typer.Option(help="The text field of JSONL lines.")] = "text",
    qa: Annotated[
        list[str] | None,
        typer.Option(help="Questions to distract from: JSONL (question, context, answers), or hub:owner/name."),
    ] = None,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.", min=1)] = 50,
    validation: Annotated[int, typer.Option(help="Samples to validate on.", min=1)] = 24,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 25,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train the learned eraser on texts; `erase --method "learned(adapter=OUT/adapter)"` uses it."""
    from vestige import show
    from vestige.download import load
    from vestige.learn.config import LoopConfig
    from vestige.learn.erasing.samples import EraserOptions
    from vestige.learn.erasing.training import ADAPTER, EraserTraining
    from vestige.learn.erasing.training import train_eraser as job
    from vestige.learn.parallel import processes

    loop = LoopConfig(
        steps=steps, batch=batch, lr=lr, warmup=max(steps // 20, 1) if warmup is None else warmup, seed=seed,
        validate_every=validate_every, save_every=save_every,
    )  # fmt: skip
    first = steps * batch // 4 if neighbours is None else neighbours
    options = EraserOptions(neighbours=first, least=least, most=most, kl=kl, seed=seed)
    training = EraserTraining(
        data=tuple(data), field=field, qa=tuple(qa or ()), loop=loop, options=options, rank=rank, validation=validation
    )
    among = processes()
    network, tokenizer = load(model, device=device if among.device is None else str(among.device), dtype=dtype)
    with show.training_bar(err) as tell:
        done = job(training, network, tokenizer, to, name=model, command=typed(), resume=resume, among=among, tell=tell)
    if not done.finished:
        err.print(f"stopped after {done.step} of {steps} steps; go on with --resume")
        raise typer.Exit(130)
    if as_json:
        row = {"step": done.step, "finished": True, "checkpoint": str(done.checkpoint), "adapter": str(to / ADAPTER)}
        return print_json(row)
    out.print(f"the adapter is in {plain(str(to / ADAPTER))}")
