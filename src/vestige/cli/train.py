"""``vestige train``: the commands that train weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from vestige.cli.options import Device, Dtype, Json, Model, Seed, command_line, err, escape_markup, out, print_json

if TYPE_CHECKING:
    from vestige.training.config import LoopConfig
    from vestige.training.trainer import Training

Data = Annotated[list[str], Option(help="Text files, folders, JSONL, or hub:owner/name; may be repeated.")]
Field = Annotated[str, Option(help="The text field of JSONL lines.")]
To = Annotated[Path, Option("--out", help="A new folder; with --resume one to go on in.")]
Steps = Annotated[int, Option(help="Updates of what is trained.", min=1)]
Batch = Annotated[int, Option(help="Samples of a step.", min=1)]
LearningRate = Annotated[float, Option(help="After the warm-up.")]
Warmup = Annotated[int | None, Option(help="Steps of rising learning rate; default: a twentieth.")]
ValidateEvery = Annotated[int, Option(help="Steps between validations.", min=1)]
Validation = Annotated[int, Option(help="Samples to validate on.", min=1)]
SaveEvery = Annotated[int, Option(help="Steps between checkpoints.", min=1)]
Length = Annotated[int, Option(help="Most tokens of a sequence, of one text or of several.")]
Least = Annotated[int, Option(help="Fewest tokens that a text is given.")]
Asked = Annotated[int, Option(help="Most questions about one text.", min=1)]
Kept = Annotated[float, Option(help="Share of the pairs that is kept for validation.")]
Resume = Annotated[bool, Option("--resume", help="Go on with the run in --out.")]

train = typer.Typer(help="Train what vestige learns.", no_args_is_help=True, rich_markup_mode=None)


@train.callback()
def _train() -> None:
    """Train what vestige learns; long runs can be interrupted and gone on with."""


def _make_loop(steps: int, warmup: int | None, **options: Any) -> "LoopConfig":
    from vestige.training.config import LoopConfig

    return LoopConfig(steps=steps, warmup=max(steps // 20, 1) if warmup is None else warmup, **options)


def _run(
    training: "Training", to: Path, *, model: str, device: str | None, dtype: str | None, resume: bool, as_json: bool
) -> None:
    """Train, and print where the weights are, or how to resume."""
    from vestige.cli import render
    from vestige.models.loading import load
    from vestige.training.checkpoint import Checkpoints
    from vestige.training.data.documents import require_sources
    from vestige.training.distributed import find_processes
    from vestige.training.trainer import Job

    require_sources(training.data)  # before the model is downloaded
    Checkpoints(to, {}).check(resume=resume)
    world = find_processes()
    network, tokenizer = load(model, device=device if world.device is None else str(world.device), dtype=dtype)
    with render.training_bar(err) as on_step:
        job = Job(out=to, name=model, command=command_line(), resume=resume, world=world, on_step=on_step)
        outcome = training.run(network, tokenizer, job)
    if not outcome.finished:
        err.print(f"stopped after {outcome.step} of {training.loop.steps} steps; go on with --resume")
        raise typer.Exit(130)
    what, made = training.weights, to / training.weights
    if as_json:
        return print_json(
            {"step": outcome.step, "finished": True, "checkpoint": str(outcome.checkpoint), what: str(made)}
        )
    out.print(f"the {what} {'are' if what.endswith('s') else 'is'} in {escape_markup(str(made))}")


@train.command("eraser")
def train_eraser(
    data: Data,
    to: To,
    model: Model = "smollm2-135m",
    steps: Steps = 500,
    batch: Batch = 4,
    lr: LearningRate = 3e-4,
    warmup: Warmup = None,
    rank: Annotated[int, Option(help="Of the adapter; one to go on from keeps its own.", min=1)] = 16,
    passes: Annotated[int, Option(help="How often each sample is trained on.", min=1)] = 4,
    pool: Annotated[int, Option(help="Samples in memory that the passes go over.", min=1)] = 64,
    neighbours: Annotated[int | None, Option(help="Samples of stage 1; default: a quarter of all.")] = None,
    least: Annotated[int, Option(help="Shortest text, in tokens, about.")] = 300,
    most: Annotated[int, Option(help="Longest text, in tokens, about.")] = 2000,
    right: Annotated[
        bool, Option(help="Train only where the clean text's reply is right, or wherever the passage changes it.")
    ] = True,
    begin: Annotated[Path | None, Option(help="A folder with an adapter to go on from.")] = None,
    nll: Annotated[float, Option(help="Weight of the clean text's reply as the one right answer.")] = 0.0,
    kl: Annotated[float, Option(help="Weight of the divergence from the clean text's reply.")] = 1.0,
    question_kl: Annotated[float, Option(help="Weight of the divergence over the question.")] = 0.25,
    field: Field = "text",
    qa: Annotated[
        list[str] | None,
        Option(help="Questions to distract from: JSONL (question, context, answers), or hub:owner/name."),
    ] = None,
    validate_every: ValidateEvery = 50,
    validation: Validation = 24,
    save_every: SaveEvery = 25,
    resume: Resume = False,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train the learned eraser on texts; `erase --method "learned(adapter=OUT/adapter)"` uses it."""
    from vestige.training.eraser.samples import EraserOptions
    from vestige.training.eraser.task import EraserTraining

    loop = _make_loop(
        steps, warmup, batch=batch, lr=lr, seed=seed, validate_every=validate_every, save_every=save_every
    )
    first = steps * batch // passes // 4 if neighbours is None else neighbours
    options = EraserOptions(
        neighbours=first, least=least, most=most, passes=passes, pool=pool, right=right, nll=nll, kl=kl,
        question_kl=question_kl, seed=seed,
    )  # fmt: skip
    training = EraserTraining(
        data=tuple(data), field=field, qa=tuple(qa or ()), loop=loop, options=options, rank=rank, begin=begin,
        validation=validation,
    )  # fmt: skip
    _run(training, to, model=model, device=device, dtype=dtype, resume=resume, as_json=as_json)


@train.command("retention")
def train_retention(
    data: Data,
    to: To,
    model: Model = "smollm2-135m",
    steps: Steps = 1000,
    batch: Batch = 1,
    lr: LearningRate = 2e-3,
    warmup: Warmup = None,
    length: Length = 1024,
    least: Least = 160,
    capacity: Annotated[
        float, Option(help="If gradually: pairs to keep, below 1 a share of a text, else tokens.")
    ] = 0.05,
    capacity_weight: Annotated[float, Option(help="If gradually: of the price of keeping more.")] = 1.0,
    text_weight: Annotated[float, Option(help="If gradually: of going on with the text itself.")] = 0.25,
    warm: Annotated[
        int | None, Option(help="First steps that learn what later tokens look at; default: an eighth.", min=0)
    ] = None,
    warm_by: Annotated[str, Option(help="Which later tokens: answers (and questions) or replay.")] = "answers",
    warm_loss: Annotated[str, Option(help="How: ranking (worth lost) or lives (regression).")] = "ranking",
    asked: Asked = 4,
    forgets: Annotated[
        str, Option(help="In training: at_once (behind a text, to several budgets) or gradually (with age).")
    ] = "at_once",
    share: Annotated[str, Option(help="Whose pairs compete for room: model, layer or head.")] = "model",
    width: Annotated[int, Option(help="Of the gates' inner layers.", min=1)] = 128,
    depth: Annotated[int, Option(help="Inner layers of the gates.", min=1)] = 2,
    tied: Annotated[bool, Option(help="Share the last projection over all layers.")] = True,
    bias: Annotated[float, Option(help="What the last projection begins with; larger keeps longer.")] = 6.0,
    field: Field = "text",
    budget: Kept = 0.1,
    validate_every: ValidateEvery = 100,
    validation: Validation = 16,
    save_every: SaveEvery = 50,
    resume: Resume = False,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train retention gates on texts; `run --policy "retention(gates=OUT/gates)"` uses them."""
    from vestige.policies.selection import parse_share
    from vestige.training.retention.task import RetentionOptions, RetentionTraining

    loop = _make_loop(
        steps, warmup, batch=batch, lr=lr, seed=seed, validate_every=validate_every, save_every=save_every
    )
    first = steps // 8 if warm is None else warm
    options = RetentionOptions(
        length=length, least=least, capacity=capacity, capacity_weight=capacity_weight, text_weight=text_weight,
        warm=first * batch, warm_by=warm_by, warm_loss=warm_loss, asked=asked, forgets=forgets,
        share=parse_share(share), budget=budget, seed=seed,
    )  # fmt: skip
    training = RetentionTraining(
        data=tuple(data), field=field, loop=loop, options=options, width=width, depth=depth, tied=tied, bias=bias,
        validation=validation,
    )  # fmt: skip
    _run(training, to, model=model, device=device, dtype=dtype, resume=resume, as_json=as_json)


@train.command("indexmem")
def train_indexmem(
    data: Data,
    to: To,
    model: Model = "smollm2-135m",
    steps: Steps = 1000,
    batch: Batch = 1,
    lr: LearningRate = 1e-3,
    warmup: Warmup = None,
    schedule: Annotated[str, Option(help="Of the learning rate: wsd, cosine or constant.")] = "wsd",
    alone: Annotated[int | None, Option(help="First steps, of the indexer alone; default: half.", min=0)] = None,
    length: Length = 1024,
    least: Least = 160,
    asked: Asked = 4,
    teacher: Annotated[
        str, Option(help="The indexer foretells what answers look at, or what the text itself does.")
    ] = "answers",
    aware: Annotated[float, Option(help="Share of the texts whose first question the indexer sees too.")] = 0.5,
    apart: Annotated[bool, Option(help="Scores of each KV head; if not, one for all of a layer.")] = True,
    heads: Annotated[int, Option(help="Index heads for each KV head.", min=1)] = 1,
    dim: Annotated[int, Option(help="Of each KV head's part of the index key.", min=1)] = 8,
    memory: Annotated[
        list[str] | None,
        Option(help="A memory to train: linear or slots; may be repeated. Default: both; none: the indexer alone."),
    ] = None,
    width: Annotated[int | None, Option(help="Of the memories' projections; default: 32, 16 slots.", min=1)] = None,
    decays: Annotated[bool, Option(help="Older pairs count less in the memories.")] = False,
    asks: Annotated[bool, Option(help="The linear memory's gate looks at the query.")] = False,
    memory_weight: Annotated[float, Option(help="Of the memories' errors.")] = 0.3,
    field: Field = "text",
    budget: Kept = 0.1,
    validate_every: ValidateEvery = 100,
    validation: Validation = 16,
    save_every: SaveEvery = 50,
    resume: Resume = False,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train IndexMem on texts; `run --policy "indexmem(indexer=OUT/indexmem)" --memory "slots(latent=OUT/indexmem)"`
    uses it.
    """
    from vestige.nn.latent_memory import KINDS, kind_of
    from vestige.training.indexmem.task import IndexMemOptions, IndexMemTraining

    kinds = () if memory == ["none"] else tuple(dict.fromkeys(map(kind_of, memory or KINDS)))
    loop = _make_loop(
        steps, warmup, batch=batch, lr=lr, schedule=schedule, seed=seed, validate_every=validate_every,
        save_every=save_every,
    )  # fmt: skip
    first = steps // 2 if alone is None else alone
    options = IndexMemOptions(
        length=length, least=least, asked=asked, teacher=teacher, aware=aware, alone=first * batch,
        memory_weight=memory_weight, budget=budget, seed=seed,
    )  # fmt: skip
    training = IndexMemTraining(
        data=tuple(data), field=field, loop=loop, options=options, heads=heads, dim=dim, apart=apart,
        memories=kinds, width=width, decays=decays, asks=asks, validation=validation,
    )  # fmt: skip
    _run(training, to, model=model, device=device, dtype=dtype, resume=resume, as_json=as_json)
