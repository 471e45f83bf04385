"""``vestige train retention``: train gates on texts, and write them with their card for ``retention(gates=...)``."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.nn.retention_gates import Gates
from vestige.training.data.documents import Document
from vestige.training.data.sentences import split_all_sentences
from vestige.training.retention.task import RetentionOptions, RetentionTask
from vestige.training.task import Task
from vestige.training.trainer import Training, Weights

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

    def make_task(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[Document],
        held_out: Sequence[Document],
    ) -> tuple[Task, Weights, dict[str, Any]]:
        texts, unseen = split_all_sentences(documents), split_all_sentences(held_out)
        shape: dict[str, Any] = {"width": self.width, "depth": self.depth, "tied": self.tied, "bias": self.bias}
        gates = Gates.initialize(model, **shape)
        task = RetentionTask(model, tokenizer, gates, texts, unseen, self.options, validation=self.validation)
        return task, gates, {"what": _WHAT[self.options.forgets], "options": asdict(self.options), "gates": shape}
