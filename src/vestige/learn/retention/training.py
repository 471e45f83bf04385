"""``vestige train retention``: from texts to gates with their card, in a folder that ``retention(gates=...)`` takes."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.gates import Gates
from vestige.learn import documents
from vestige.learn.card import write_card
from vestige.learn.config import LoopConfig
from vestige.learn.loop import Tell, Trained, train
from vestige.learn.parallel import Processes
from vestige.learn.prose import prose_of
from vestige.learn.retention.task import RetentionOptions, RetentionTask

GATES = "gates"
_HELD = 0.1
"""Share of the texts to validate on."""


@dataclass(frozen=True, kw_only=True)
class RetentionTraining:
    """What is trained, on what, for how long.

    Args:
        data: Files, folders or sets, as :func:`vestige.learn.read` takes them.
        field: Of JSONL lines.
        loop: Steps, batch, learning rate, ...
        options: Of sequences and loss.
        width: Of the gates' inner layers.
        depth: How many of these there are.
        tied: Whether all layers share the last projection.
        bias: What that begins with.
        validation: Tales to validate on.

    Raises:
        InputError: No data, or a number out of range.
    """

    data: tuple[str, ...]
    field: str = "text"
    loop: LoopConfig
    options: RetentionOptions
    width: int = 128
    depth: int = 2
    tied: bool = True
    bias: float = 6.0
    validation: int = 16

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("name data to train on: --data FILE, may be repeated")
        if self.validation < 1:
            raise InputError("validation must be at least 1")


def train_retention(
    training: RetentionTraining,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    name: str,
    command: str,
    resume: bool = False,
    among: Processes | None = None,
    tell: Tell | None = None,
) -> Trained:
    """Train, and write the gates with their card once all steps are done.

    Args:
        training: What to do.
        model: Frozen by this.
        tokenizer: The model's.
        out: Checkpoints, ``metrics.jsonl``, and in the end ``gates/``.
        name: Of the model, for the card.
        command: That does the same again, for the card.
        resume: Go on with what is in ``out``.
        among: This process among several.
        tell: Hears of every step.

    Raises:
        InputError: The data or the folder cannot be used.
        VestigeError: The loss is not finite; the last checkpoint is kept.
    """
    sides = documents.split(documents.read(training.data, field=training.field), share=_HELD)
    prose, held = (prose_of(side) for side in sides)
    torch.manual_seed(training.loop.seed)
    gates = Gates.fresh(model, width=training.width, depth=training.depth, tied=training.tied, bias=training.bias)
    task = RetentionTask(model, tokenizer, gates, prose, held, training.options, validation=training.validation)
    done = train(task, training.loop, out, resume=resume, among=among, tell=tell)
    if done.finished and (among is None or among.main):
        gates.save(out / GATES)
        write_card(
            out / GATES,
            out,
            what="retention gates after DBTrimKV (arXiv 2605.09649): what each pair is worth, from when it is written",
            model=name,
            documents=[one for side in sides for one in side],
            loop=training.loop,
            command=command,
            options=asdict(training.options),
            gates={"width": training.width, "depth": training.depth, "tied": training.tied, "bias": training.bias},
        )
    return done
