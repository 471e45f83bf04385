"""``vestige train eraser``: from texts to an adapter with its card, in a folder that ``learned(adapter=...)`` takes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.adapter import Adapter
from vestige.errors import InputError
from vestige.learn import documents
from vestige.learn.config import LoopConfig
from vestige.learn.erasing import questions
from vestige.learn.erasing.samples import EraserOptions, Texts
from vestige.learn.erasing.task import EraserTask
from vestige.learn.job import HELD_OUT, Job
from vestige.learn.loop import Trained
from vestige.learn.prose import prose_of


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

    weights: ClassVar[str] = "adapter"
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

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job) -> Trained:
        """Train, and write the adapter with its card once all steps are done; the model is frozen by this.

        Raises:
            InputError: The data or the folder cannot be used.
            VestigeError: The loss is not finite; the last checkpoint is kept.
        """
        sides = documents.split(documents.read(self.data, field=self.field), share=HELD_OUT)
        asked = questions.split(questions.read(self.qa), share=HELD_OUT)
        texts, held = (Texts(prose=prose_of(side), questions=some) for side, some in zip(sides, asked, strict=True))
        torch.manual_seed(self.loop.seed)
        adapter = Adapter.fresh(model, rank=self.rank, alpha=2.0 * self.rank)
        task = EraserTask(model, tokenizer, adapter, texts, held, self.options, validation=self.validation)
        return job.carry_out(
            task,
            self.loop,
            adapter,
            self.weights,
            what="KVEraser's LoRA version (arXiv 2606.17034): erases a span by replacing its keys and values",
            documents=[one for side in sides for one in side],
            qa=[Path(one).name for one in self.qa],
            options=asdict(self.options),
            rank=self.rank,
        )
