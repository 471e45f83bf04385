"""``vestige train eraser``: train an adapter on texts, and write it with its card for ``learned(adapter=...)``."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.nn.lora import Adapter
from vestige.training.data.sentences import split_documents
from vestige.training.eraser.questions import read_questions, split_questions
from vestige.training.eraser.samples import EraserOptions, Sources
from vestige.training.eraser.task import EraserTask
from vestige.training.loop import Outcome
from vestige.training.trainer import HELD_OUT, Job, Training


@dataclass(frozen=True, kw_only=True)
class EraserTraining(Training):
    """Options of ``vestige train eraser``, beside those of every training.

    Args:
        qa: JSONL files and hub data sets of questions, as :func:`~.questions.read_questions` takes them; may be empty.
        options: Options of samples and loss.
        rank: Rank of the adapter.
        begin: Folder of an adapter to start from; None starts with an adapter that changes nothing.

    Raises:
        InputError: As :class:`~vestige.training.trainer.Training`; or the rank is out of range.
    """

    weights: ClassVar[str] = "adapter"
    qa: tuple[str, ...] = ()
    options: EraserOptions
    rank: int = 16
    begin: Path | None = None
    validation: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise InputError("rank must be at least 1")

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job) -> Outcome:
        sides = self.split_data()
        questions = split_questions(read_questions(self.qa), share=HELD_OUT)
        train_on, held_out = (
            Sources(texts=split_documents(documents), questions=asked)
            for documents, asked in zip(sides, questions, strict=True)
        )
        torch.manual_seed(self.loop.seed)
        if self.begin is None:
            adapter = Adapter.fresh(model, rank=self.rank, alpha=2.0 * self.rank)
        else:
            adapter = Adapter.load(self.begin, model)
        task = EraserTask(model, tokenizer, adapter, train_on, held_out, self.options, validation=self.validation)
        return job.run(
            task,
            self.loop,
            adapter,
            self.weights,
            what="KVEraser's LoRA version (arXiv 2606.17034): erases a span by replacing its keys and values",
            documents=[document for side in sides for document in side],
            qa=[Path(source).name for source in self.qa],
            options=asdict(self.options),
            rank=adapter.config.rank,
        )
