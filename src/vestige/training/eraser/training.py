"""``vestige train eraser``: train an adapter on texts, and write it with its card for ``learned(adapter=...)``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.nn.lora import Adapter
from vestige.training.data.documents import Document
from vestige.training.data.sentences import split_all_sentences
from vestige.training.eraser.questions import read_questions, split_questions
from vestige.training.eraser.samples import EraserOptions, Sources
from vestige.training.eraser.task import EraserTask
from vestige.training.task import Task
from vestige.training.trainer import HELD_OUT, Training, Weights


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

    def make_task(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[Document],
        held_out: Sequence[Document],
    ) -> tuple[Task, Weights, dict[str, Any]]:
        questions = split_questions(read_questions(self.qa), share=HELD_OUT)
        sources = Sources(texts=split_all_sentences(documents), questions=questions[0])
        unseen = Sources(texts=split_all_sentences(held_out), questions=questions[1])
        if self.begin is None:
            adapter = Adapter.initialize(model, rank=self.rank, alpha=2.0 * self.rank)
        else:
            adapter = Adapter.load(self.begin, model)
        card = {
            "what": "KVEraser's LoRA version (arXiv 2606.17034): erases a span by replacing its keys and values",
            "qa": [Path(source).name for source in self.qa],
            "options": asdict(self.options),
            "rank": adapter.config.rank,
        }
        task = EraserTask(model, tokenizer, adapter, sources, unseen, self.options, validation=self.validation)
        return task, adapter, card
