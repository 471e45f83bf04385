"""Samples as token ids: each context is tokenised once, and the erased ids are a part of that one tokenisation."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from vestige.bench.erasing import tasks
from vestige.bench.erasing.config import EraseBenchConfig
from vestige.bench.erasing.sample import EraseSample
from vestige.bench.items import hash_parts
from vestige.bench.sample import BaseItem
from vestige.bench.tokenization import Renderer
from vestige.errors import InputError
from vestige.models.layout import check
from vestige.spans import Span, within
from vestige.text.chat_template import ChatTemplate
from vestige.text.locate import tokens_at


@dataclass(frozen=True)
class Item(BaseItem):
    """A sample and its ids, on the CPU."""

    sample: EraseSample
    context: Int[Tensor, "1 context"]
    spans: tuple[Span, ...]
    """The passages, as positions among the ids."""
    questions: tuple[Int[Tensor, "1 _question"], ...]

    @property
    def clean(self) -> Int[Tensor, "1 remaining"]:
        """The ids without the passages."""
        return self.context[:, ~within(torch.arange(self.context.shape[1]), self.spans)]

    @property
    def tokens(self) -> int:
        """Tokens of the context, the longest question and its longest reply."""
        pairs = zip(self.questions, self.sample.questions, strict=True)
        return self.context.shape[1] + max(ids.shape[1] + question.max_new_tokens for ids, question in pairs)

    @property
    def digest(self) -> str:
        ids = [tensor.tolist() for tensor in (self.context, *self.questions)]
        return hash_parts(ids, self.spans, self.sample.questions)


def collect(config: EraseBenchConfig, renderer: Renderer) -> list[Item]:
    """Return every sample with its ids.

    Raises:
        InputError: A task does not fit a length, texts are missing, or a sample leaves no position for a reply: before
            hours of work, not after.
    """
    limit, frame = check(renderer.model).max_positions, ChatTemplate(renderer.tokenizer)
    items = []
    for length in dict.fromkeys(config.lengths):
        if limit is not None and length > limit:
            raise InputError(f"--length {length} is more than the model's {limit} positions")
        for name in config.tasks_at(length):
            items += [as_item(sample, frame) for sample in tasks.make(name, config.task_spec(renderer, length))]
    return items


def as_item(sample: EraseSample, frame: ChatTemplate) -> Item:
    """Return a sample as ids."""
    offsets = frame.offsets(sample.context)
    spans = tuple(tokens_at(sample.context, start, end, offsets) for start, end in sample.passages)
    questions = tuple(frame.question(question.text, question.answer_prefix) for question in sample.questions)
    return Item(sample, frame.context(sample.context), spans, questions)
