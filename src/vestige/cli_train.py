"""``vestige train``: the commands that learn."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vestige.cli_options import Device, Dtype, Json, Model, Seed, err, out, plain, print_json, typed

if TYPE_CHECKING:
    from vestige.learn.loop import Trained

train = typer.Typer(help="Train what vestige learns.", no_args_is_help=True, rich_markup_mode=None)


@train.callback()
def _train() -> None:
    """Train what vestige learns; long runs can be interrupted and gone on with."""


def _finish(done: "Trained", steps: int, what: str, made: Path, as_json: bool) -> None:
    """Say where the weights are, or how to go on."""
    if not done.finished:
        err.print(f"stopped after {done.step} of {steps} steps; go on with --resume")
        raise typer.Exit(130)
    if as_json:
        return print_json({"step": done.step, "finished": True, "checkpoint": str(done.checkpoint), what: str(made)})
    out.print(f"the {what} {'are' if what.endswith('s') else 'is'} in {plain(str(made))}")


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
    _finish(done, steps, "adapter", to / ADAPTER, as_json)


@train.command("retention")
def train_retention(
    data: Annotated[list[str], typer.Option(help="Text files, folders, JSONL, or hub:owner/name; may be repeated.")],
    to: Annotated[Path, typer.Option("--out", help="A new folder; with --resume one to go on in.")],
    model: Model = "smollm2-135m",
    steps: Annotated[int, typer.Option(help="Updates of the gates.", min=1)] = 1000,
    batch: Annotated[int, typer.Option(help="Sequences of a step.", min=1)] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate after the warm-up.")] = 2e-3,
    warmup: Annotated[int | None, typer.Option(help="Steps of rising learning rate; default: a twentieth.")] = None,
    length: Annotated[int, typer.Option(help="Most tokens of a sequence, of one text or of several.")] = 1024,
    least: Annotated[int, typer.Option(help="Fewest tokens that a text is given.")] = 160,
    capacity: Annotated[float, typer.Option(help="Pairs to keep: below 1 a share of a text, else tokens.")] = 0.05,
    capacity_weight: Annotated[float, typer.Option(help="Of the price of keeping more.")] = 1.0,
    text_weight: Annotated[float, typer.Option(help="Of going on with the text itself, against answers.")] = 0.25,
    warm: Annotated[int, typer.Option(help="First steps that learn from replays of the texts.", min=0)] = 0,
    width: Annotated[int, typer.Option(help="Of the gates' inner layers.", min=1)] = 128,
    depth: Annotated[int, typer.Option(help="Inner layers of the gates.", min=1)] = 2,
    tied: Annotated[bool, typer.Option(help="Share the last projection over all layers.")] = True,
    bias: Annotated[float, typer.Option(help="What the last projection begins with; larger keeps longer.")] = 6.0,
    field: Annotated[str, typer.Option(help="The text field of JSONL lines.")] = "text",
    budget: Annotated[float, typer.Option(help="Share of the pairs that is kept for validation.")] = 0.1,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.", min=1)] = 100,
    validation: Annotated[int, typer.Option(help="Texts to validate on.", min=1)] = 16,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train retention gates on texts; `run --policy "retention(gates=OUT/gates)"` uses them."""
    from vestige import show
    from vestige.download import load
    from vestige.learn.config import LoopConfig
    from vestige.learn.parallel import processes
    from vestige.learn.retention.task import RetentionOptions
    from vestige.learn.retention.training import GATES, RetentionTraining
    from vestige.learn.retention.training import train_retention as job

    loop = LoopConfig(
        steps=steps, batch=batch, lr=lr, warmup=max(steps // 20, 1) if warmup is None else warmup, seed=seed,
        validate_every=validate_every, save_every=save_every,
    )  # fmt: skip
    options = RetentionOptions(
        length=length, least=least, capacity=capacity, capacity_weight=capacity_weight, text_weight=text_weight,
        warm=warm * batch, budget=budget, seed=seed,
    )  # fmt: skip
    training = RetentionTraining(
        data=tuple(data), field=field, loop=loop, options=options, width=width, depth=depth, tied=tied, bias=bias,
        validation=validation,
    )  # fmt: skip
    among = processes()
    network, tokenizer = load(model, device=device if among.device is None else str(among.device), dtype=dtype)
    with show.training_bar(err) as tell:
        done = job(training, network, tokenizer, to, name=model, command=typed(), resume=resume, among=among, tell=tell)
    _finish(done, steps, "gates", to / GATES, as_json)
