"""What every training command does around the loop: it trains, and leaves the weights with their card."""

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
"""Share of the documents to validate on."""


@runtime_checkable
class Weights(Protocol):
    """What is trained, and can be kept."""

    def save(self, folder: Path) -> None:
        """Write safetensors and JSON into a folder that may not exist yet."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where a training writes, under which names, and who works on it.

    Args:
        out: A folder for checkpoints, ``metrics.jsonl``, and in the end a folder of weights.
        name: Of the model, for the card.
        command: That does the same again, for the card.
        resume: Go on with what is in ``out``.
        among: This process among several.
        tell: Hears of every step.
    """

    out: Path
    name: str
    command: str
    resume: bool = False
    world: Processes | None = None
    on_step: OnStep | None = None

    def carry_out(
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
        """Train, and once all steps are done write the weights and their card.

        Args:
            task: What to train on.
            loop: For how long.
            weights: Those that the task trains.
            folder: Within ``out``, for the weights.
            what: The weights do, and whose method that is.
            documents: They are trained or validated on.
            more: For the card, as JSON values.

        Raises:
            InputError: The data or the folder cannot be used.
            VestigeError: The loss is not finite; the last checkpoint is kept.
        """
        done = train(task, loop, self.out, resume=self.resume, world=self.world, on_step=self.on_step)
        if done.finished and (self.world is None or self.world.main):
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
        return done


@dataclass(frozen=True, kw_only=True)
class Training(ABC):
    """What is trained, on what, for how long: what a training command makes of its options.

    Args:
        data: Files, folders or sets, as :func:`vestige.training.data.documents.read_documents` takes them.
        field: Of JSONL lines.
        loop: Steps, batch, learning rate, ...
        validation: Samples to validate on.

    Raises:
        InputError: No data, or a number out of range.
    """

    weights: ClassVar[str]
    """What is made, as it is called; and the folder for it."""
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
        """Raise an InputError unless the first so many sequences, learned from otherwise, fill their steps."""
        if sequences % self.loop.batch:
            raise InputError(f"the {sequences} sequences of {what} must be whole steps of {self.loop.batch}")

    def sides(self) -> tuple[list[Document], list[Document]]:
        """Return the documents to train and to validate on.

        Raises:
            InputError: The data cannot be used.
        """
        return split_documents(require_long_documents(read_documents(self.data, field=self.field)), share=HELD_OUT)

    @abstractmethod
    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job) -> Outcome:
        """Train, and write the weights with their card once all steps are done; the model is frozen by this.

        Raises:
            InputError: The data or the folder cannot be used.
            VestigeError: The loss is not finite; the last checkpoint is kept.
        """
