"""``vestige train eraser``: from texts to an adapter with its card, in a folder that ``learned(adapter=...)`` takes."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.adapter import Adapter
from vestige.errors import InputError
from vestige.learn import documents
from vestige.learn.card import write_card
from vestige.learn.config import LoopConfig
from vestige.learn.erasing import questions
from vestige.learn.erasing.samples import EraserOptions, Texts
from vestige.learn.erasing.task import EraserTask
from vestige.learn.loop import Tell, Trained, train
from vestige.learn.parallel import Processes
from vestige.learn.prose import prose_of

ADAPTER = "adapter"
_HELD = 0.1
"""Share of the texts to validate on."""


@dataclass(frozen=True, kw_only=True)
class EraserTraining:
    """What is trained, on what, for how long.

    Args:
        data: Files, folders or sets, as :func:`vestige.learn.read` takes them.
        field: Of JSONL lines.
        qa: JSONL files and sets of questions with their paragraphs, as :func:`vestige.learn.erasing.questions.read`
            takes them; none is fine.
        loop: Steps, batch, learning rate, ...
        options: Of samples and loss.
        rank: Of the adapter.
        validation: Samples to validate on.

    Raises:
        InputError: No data, or a number out of range.
    """

    data: tuple[str, ...]
    field: str = "text"
    qa: tuple[str, ...] = ()
    loop: LoopConfig
    options: EraserOptions
    rank: int = 16
    validation: int = 24

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("name data to train on: --data FILE, may be repeated")
        if self.rank < 1 or self.validation < 1:
            raise InputError("rank and validation must be at least 1")


def train_eraser(
    training: EraserTraining,
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
    """Train, and write the adapter with its card once all steps are done.

    Args:
        training: What to do.
        model: Frozen by this.
        tokenizer: The model's.
        out: Checkpoints, ``metrics.jsonl``, and in the end ``adapter/``.
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
    asked = questions.split(questions.read(training.qa), share=_HELD)
    texts, held = (Texts(prose=prose_of(side), questions=some) for side, some in zip(sides, asked, strict=True))
    torch.manual_seed(training.loop.seed)
    adapter = Adapter.fresh(model, rank=training.rank, alpha=2.0 * training.rank)
    task = EraserTask(model, tokenizer, adapter, texts, held, training.options, validation=training.validation)
    done = train(task, training.loop, out, resume=resume, among=among, tell=tell)
    if done.finished and (among is None or among.main):
        adapter.save(out / ADAPTER)
        write_card(
            out / ADAPTER,
            out,
            what="KVEraser's LoRA version (arXiv 2606.17034): erases a span by replacing its keys and values",
            model=name,
            documents=[one for side in sides for one in side],
            loop=training.loop,
            command=command,
            qa=[Path(one).name for one in training.qa],
            options=asdict(training.options),
            rank=training.rank,
        )
    return done
