"""What every training command does around the loop: read and split data, train, write the weights and their card."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.training.config import LoopConfig
from vestige.training.data.documents import Document, read_documents, split_documents
from vestige.training.data.sentences import require_long_documents
from vestige.training.distributed import Processes
from vestige.training.loop import OnStep, Outcome, train
from vestige.training.model_card import write_card
from vestige.training.task import Task

HELD_OUT = 0.1
"""Share of the documents that is held out for validation."""


@runtime_checkable
class Weights(Protocol):
    """Trained weights that can be written to a folder."""

    def save(self, folder: Path) -> None:
        """Write safetensors and JSON into a folder that may not exist yet."""
        ...


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

    def run(
        self,
        task: Task,
        loop: LoopConfig,
        weights: Weights,
        folder: str,
        *,
        what: str,
        documents: Sequence[Document],
        **more: Any,
    ) -> Outcome:
        """Train, and write the weights and their card after the last step.

        Args:
            task: The task.
            loop: Options of the loop.
            weights: Weights that the task trains.
            folder: Folder of the weights within ``out``.
            what: Purpose of the weights and source of the method, for the card.
            documents: Training and validation documents.
            more: JSON values for the card.

        Raises:
            InputError: The data or the folder cannot be used.
            VestigeError: The loss is not finite; the last checkpoint is kept.
        """
        outcome = train(task, loop, self.out, resume=self.resume, world=self.world, on_step=self.on_step)
        if outcome.finished and (self.world is None or self.world.main):
            weights.save(self.out / folder)
            write_card(
                self.out / folder,
                self.out,
                what=what,
                model=self.name,
                documents=documents,
                loop=loop,
                command=self.command,
                **more,
            )
        return outcome


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

    def split_data(self) -> tuple[list[Document], list[Document]]:
        """Return the training and the validation documents.

        Raises:
            InputError: The data cannot be used.
        """
        return split_documents(require_long_documents(read_documents(self.data, field=self.field)), share=HELD_OUT)

    @abstractmethod
    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job) -> Outcome:
        """Train, and write the weights with their card after the last step; the model becomes frozen.

        Raises:
            InputError: The data or the folder cannot be used.
            VestigeError: The loss is not finite; the last checkpoint is kept.
        """
