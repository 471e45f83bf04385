"""``vestige train retention``: train gates on texts, and write them with their card for ``retention(gates=...)``."""

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
_MOST_BIAS = 18.0  # the papers' value; at 20.7 gradients vanish


@dataclass(frozen=True, kw_only=True)
class RetentionTraining(Training):
    """Options of ``vestige train retention``, beside those of every training; it validates on synthetic questions.

    Args:
        options: Options of sequences and loss.
        width: Width of the gates' inner layers.
        depth: Number of these layers.
        tied: Whether all layers share the last projection.
        bias: Initial bias of the last projection.
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
        sides = self.split_data()
        texts, held_out = map(split_documents, sides)
        torch.manual_seed(self.loop.seed)
        gates = Gates.fresh(model, width=self.width, depth=self.depth, tied=self.tied, bias=self.bias)
        task = RetentionTask(model, tokenizer, gates, texts, held_out, self.options, validation=self.validation)
        return job.run(
            task,
            self.loop,
            gates,
            self.weights,
            what=_WHAT[self.options.forgets],
            documents=[document for side in sides for document in side],
            options=asdict(self.options),
            gates={"width": self.width, "depth": self.depth, "tied": self.tied, "bias": self.bias},
        )
