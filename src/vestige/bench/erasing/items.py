"""Samples as token ids: each context is tokenised once, and what is erased are ids of that one tokenisation."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import torch
from jaxtyping import Int
from torch import Tensor

from vestige.bench.erasing import tasks
from vestige.bench.erasing.config import EraseBenchConfig
from vestige.bench.erasing.sample import EraseSample
from vestige.bench.tokenization import Renderer
from vestige.errors import InputError
from vestige.models.layout import check
from vestige.spans import Span, within
from vestige.text.chat_template import ChatTemplate
from vestige.text.locate import tokens_at


@dataclass(frozen=True)
class Item:
    """A sample and its ids, on the CPU."""

    sample: EraseSample
    context: Int[Tensor, "1 context"]
    spans: tuple[Span, ...]
    """Where the passages stand among the ids."""
    questions: tuple[Int[Tensor, "1 _question"], ...]

    @property
    def clean(self) -> Int[Tensor, "1 remaining"]:
        """The ids without the passages."""
        return self.context[:, ~within(torch.arange(self.context.shape[1]), self.spans)]

    @property
    def tokens(self) -> int:
        """Tokens of the context, the longest question and its longest reply."""
        asked = zip(self.questions, self.sample.questions, strict=True)
        return self.context.shape[1] + max(ids.shape[1] + question.max_new_tokens for ids, question in asked)

    @property
    def digest(self) -> str:
        """What tells whether a record was made from these very ids, and judged by these answers."""
        ids = [tensor.tolist() for tensor in (self.context, *self.questions)]
        return sha256(repr((ids, self.spans, self.sample.questions)).encode()).hexdigest()[:16]


def collect(config: EraseBenchConfig, renderer: Renderer) -> list[Item]:
    """Return every sample with its ids.

    Raises:
        InputError: A task does not fit a length, texts are missing, or a sample leaves no position for a reply: before
            hours of work, not after.
    """
    return list(_collect(config, renderer))


def _collect(config: EraseBenchConfig, renderer: Renderer) -> Iterator[Item]:
    limit, frame = check(renderer.model).max_positions, ChatTemplate(renderer.tokenizer)
    for length in dict.fromkeys(config.lengths):
        if limit is not None and length > limit:
            raise InputError(f"--length {length} is more than the model's {limit} positions")
        for name in config.tasks_at(length):
            for sample in tasks.make(name, config.order(renderer, length)):
                yield as_item(sample, frame)


def as_item(sample: EraseSample, frame: ChatTemplate) -> Item:
    """Return a sample as ids."""
    offsets = frame.offsets(sample.context)
    spans = tuple(tokens_at(sample.context, start, end, offsets) for start, end in sample.passages)
    questions = tuple(frame.question(question.text, question.answer_prefix) for question in sample.questions)
    return Item(sample, frame.context(sample.context), spans, questions)
