"""What every training command does: read and split documents, train, write the weights and their card."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.nn.lora import Adapter
from vestige.nn.per_layer import PerLayerModule
from vestige.training import metrics
from vestige.training.config import LoopConfig
from vestige.training.data.documents import Document, read_documents, split_documents
from vestige.training.data.sentences import Texts, require_long_documents, split_all_sentences
from vestige.training.distributed import Processes
from vestige.training.loop import OnStep, Outcome, train
from vestige.training.task import Task

HELD_OUT = 0.1
"""Share of the documents that is held out for validation."""
CARD = "card.json"
Made = tuple[Task, Sequence[Adapter | PerLayerModule[Any]], dict[str, Any]]
"""A task, the weights that it trains, and JSON values for their card: ``what`` has their purpose and source."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The folder of a training, the names for its card, and its processes.

    Args:
        out: Folder for checkpoints, ``metrics.jsonl``, and finally a folder of weights.
        name: Name of the model.
        command: Command that repeats the training.
        resume: Whether to continue the run in ``out``.
        world: This process and the number of processes, if there are several.
        on_step: Called after every step.
    """

    out: Path
    name: str
    command: str
    resume: bool = False
    world: Processes | None = None
    on_step: OnStep | None = None


@dataclass(frozen=True, kw_only=True)
class Training(ABC):
    """Options of a training command.

    Args:
        data: Sources, as :func:`~vestige.training.data.documents.read_documents` takes them.
        field: Text field of JSONL lines.
        loop: Options of the loop.
        validation: Number of validation samples.

    Raises:
        InputError: There is no data, or a number is out of range.
    """

    weights: ClassVar[str]
    """Name of the weights, and of their folder."""
    data: tuple[str, ...]
    field: str = "text"
    loop: LoopConfig
    validation: int

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("name data to train on: --data FILE, may be repeated")
        if self.validation < 1:
            raise InputError("validation must be at least 1")

    def require_whole_steps(self, sequences: int, what: str) -> None:
        """Raise an InputError unless the sequences of a first phase fill whole steps."""
        if sequences % self.loop.batch:
            raise InputError(f"the {sequences} sequences of {what} must be whole steps of {self.loop.batch}")

    @abstractmethod
    def make_task(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, held_out: Texts
    ) -> Made:
        """Return the task, the weights that it trains, and JSON values for their card.

        Args:
            model: Becomes frozen.
            tokenizer: The model's tokenizer.
            texts: Sentences of each training text.
            held_out: Sentences of each validation text.

        Raises:
            InputError: The data cannot be used.
        """

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job) -> Outcome:
        """Train, and write the weights with their card after the last step; the model becomes frozen.

        Raises:
            InputError: The data or the folder cannot be used.
            VestigeError: The loss is not finite; the last checkpoint is kept.
        """
        read = require_long_documents(read_documents(self.data, field=self.field))
        documents, held_out = split_documents(read, share=HELD_OUT)
        texts, unseen = split_all_sentences(documents), split_all_sentences(held_out)
        torch.manual_seed(self.loop.seed)
        task, weights, card = self.make_task(model, tokenizer, texts, unseen)
        outcome = train(task, self.loop, job.out, resume=job.resume, world=job.world, on_step=job.on_step)
        if outcome.finished and (job.world is None or job.world.main):
            for part in weights:
                part.save(job.out / self.weights)
            self._write_card(job, [*documents, *held_out], card)
        return outcome

    def _write_card(self, job: Job, documents: Sequence[Document], own: Mapping[str, Any]) -> None:
        """Write ``card.json`` beside the weights; it names the documents without their folders."""
        records = metrics.read(job.out)
        validated = [record["validation"] for record in records if "validation" in record]
        card = {
            "model": job.name,
            "what": own["what"],
            "data": [Path(document.name).name for document in documents],
            "steps": self.loop.steps,
            "minutes": round(sum(record["seconds"] for record in records) / 60, 1),
            "seed": self.loop.seed,
            "command": job.command,
            "loop": asdict(self.loop),
            **own,
            "validation": validated[-1] if validated else {},
        }
        (job.out / self.weights / CARD).write_text(json.dumps(card, indent=1) + "\n")
