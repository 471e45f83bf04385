"""``vestige train retention``: from texts to gates with their card, in a folder that ``retention(gates=...)`` takes."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.gates import Gates
from vestige.learn import documents
from vestige.learn.config import LoopConfig
from vestige.learn.job import HELD_OUT, Job
from vestige.learn.loop import Trained
from vestige.learn.prose import prose_of
from vestige.learn.retention.task import RetentionOptions, RetentionTask


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

    weights: ClassVar[str] = "gates"
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

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job) -> Trained:
        """Train, and write the gates with their card once all steps are done; the model is frozen by this.

        Raises:
            InputError: The data or the folder cannot be used.
            VestigeError: The loss is not finite; the last checkpoint is kept.
        """
        sides = documents.split(documents.read(self.data, field=self.field), share=HELD_OUT)
        prose, held = (prose_of(side) for side in sides)
        torch.manual_seed(self.loop.seed)
        gates = Gates.fresh(model, width=self.width, depth=self.depth, tied=self.tied, bias=self.bias)
        task = RetentionTask(model, tokenizer, gates, prose, held, self.options, validation=self.validation)
        return job.carry_out(
            task,
            self.loop,
            gates,
            self.weights,
            what="retention gates after DBTrimKV (arXiv 2605.09649): what each pair is worth, from when it is written",
            documents=[one for side in sides for one in side],
            options=asdict(self.options),
            gates={"width": self.width, "depth": self.depth, "tied": self.tied, "bias": self.bias},
        )
