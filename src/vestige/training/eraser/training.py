"""``vestige train eraser``: from texts to an adapter with its card, in a folder that ``learned(adapter=...)`` takes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.nn.lora import Adapter
from vestige.training.data.sentences import split_documents
from vestige.training.eraser import questions
from vestige.training.eraser.samples import EraserOptions, Texts
from vestige.training.eraser.task import EraserTask
from vestige.training.loop import Outcome
from vestige.training.trainer import HELD_OUT, Job, Training


@dataclass(frozen=True, kw_only=True)
class EraserTraining(Training):
    """What an adapter is trained on, and how, beside what every training says.

    Args:
        qa: JSONL files and sets of questions with their paragraphs, as :func:`~.questions.read_questions`
            takes them; none is fine.
        options: Of samples and loss.
        rank: Of the adapter.
        begin: A folder with an adapter to go on from; None begins with one that changes nothing.

    Raises:
        InputError: Those of :class:`~vestige.training.trainer.Training`, or a rank out of range.
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
        sides = self.sides()
        asked = questions.split_questions(questions.read_questions(self.qa), share=HELD_OUT)
        texts, held = (
            Texts(prose=split_documents(side), questions=some) for side, some in zip(sides, asked, strict=True)
        )
        torch.manual_seed(self.loop.seed)
        if self.begin is None:
            adapter = Adapter.fresh(model, rank=self.rank, alpha=2.0 * self.rank)
        else:
            adapter = Adapter.load(self.begin, model)
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
            rank=adapter.config.rank,
        )
