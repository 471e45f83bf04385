"""``vestige train retention``: from texts to gates with their card, in a folder that ``retention(gates=...)`` takes."""

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.nn.retention_gates import Gates
from vestige.training.data.sentences import split_documents
from vestige.training.loop import Outcome
from vestige.training.retention.task import RetentionOptions, RetentionTask
from vestige.training.trainer import Job, Training

_WHAT = {
    "gradually": "retention gates as in DBTrimKV (arXiv 2605.09649): what each pair is worth, from when it is written",
    "at_once": "retention gates shaped as in DBTrimKV (arXiv 2605.09649), trained by soft evictions of our own: what "
    "each pair is worth, from when it is written",
}
_MOST_BIAS = 18.0  # the papers'; at 20.7 nothing is left of a gradient


@dataclass(frozen=True, kw_only=True)
class RetentionTraining(Training):
    """What gates are trained on, and how, beside what every training says; it validates on tales.

    Args:
        options: Of sequences and loss.
        width: Of the gates' inner layers.
        depth: How many of these there are.
        tied: Whether all layers share the last projection.
        bias: What that begins with.
    """

    weights: ClassVar[str] = "gates"
    options: RetentionOptions
    width: int = 128
    depth: int = 2
    tied: bool = True
    bias: float = 6.0
    validation: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_whole_steps(self.options.warm, "the warm start")
        if not self.bias <= _MOST_BIAS:
            raise InputError(f"bias must be at most {_MOST_BIAS:g}, or gates live too long to learn; got {self.bias}")

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job) -> Outcome:
        sides = self.sides()
        prose, held = (split_documents(side) for side in sides)
        torch.manual_seed(self.loop.seed)
        gates = Gates.fresh(model, width=self.width, depth=self.depth, tied=self.tied, bias=self.bias)
        task = RetentionTask(model, tokenizer, gates, prose, held, self.options, validation=self.validation)
        return job.carry_out(
            task,
            self.loop,
            gates,
            self.weights,
            what=_WHAT[self.options.forgets],
            documents=[one for side in sides for one in side],
            options=asdict(self.options),
            gates={"width": self.width, "depth": self.depth, "tied": self.tied, "bias": self.bias},
        )
