"""What the trainers on stories share: options, a stream of sequences, validation samples, random shares to keep."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.models.layout import check
from vestige.training.data.sentences import Texts
from vestige.training.data.synthetic_qa.sequences import PackedSequence, SequenceMaker, TokenizedDocument
from vestige.training.data.synthetic_qa.validation import ValidationSample, find_validation_samples
from vestige.training.sampler import derive_seed
from vestige.training.task import identify_model

MIN_SHARE, MAX_SHARE = 0.02, 0.4
Parts = dict[str, Tensor]
"""Parts of a loss by name; ``loss`` is minimised."""


@dataclass(frozen=True, kw_only=True)
class StoryOptions:
    """Options of the sequences and of validation."""

    length: int = 1024
    """Most tokens of a sequence, which holds one document or several."""
    least: int = 160
    """Fewest tokens planned for a document; lengths are drawn uniformly in their logarithm."""
    asked: int = 4
    """Most questions about a text."""
    budget: float = 0.1
    """Share of the pairs kept in validation."""
    seed: int = 0


class StoryTask:
    """A stream of sequences of stories, each a function of its name alone; the model stays frozen.

    Args:
        model: Frozen by the constructor.
        tokenizer: The model's tokenizer.
        texts: Sentences of each training text.
        held_out: Sentences of each validation text.
        options: Options of the sequences.
        others: Number of text positions to train on, beside the answers.
        validation: Number of validation samples.

    Raises:
        InputError: Sequences are longer than the model's context, or the options contradict each other.
    """

    num_samples = None
    """The sequences are an endless stream."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Texts,
        held_out: Texts,
        options: StoryOptions,
        *,
        others: int = 0,
        validation: int = 16,
    ) -> None:
        length, limit = options.length, check(model).max_positions
        if limit is not None and length > limit:
            raise InputError(f"sequences of {length} tokens do not fit the model's {limit} positions")
        self.model = model.requires_grad_(False).eval()
        self.maker = SequenceMaker(
            tokenizer, length=length, least=options.least, others=others, asked=options.asked, seed=options.seed
        )
        self.texts, self.held_out, self.validation = texts, held_out, validation

    def sequence(self, *name: str | int) -> PackedSequence:
        """Return the sequence of a name, on the model's device."""
        return self.maker.make_sequence(name, self.texts).to(self.model.device)

    @cached_property
    def _validation_samples(self) -> list[ValidationSample]:
        return find_validation_samples(self.maker, self.model, self.held_out, self.validation)

    def identity(self) -> Mapping[str, Any]:
        """Return the identity of the model and the data; tasks add their shapes and options."""
        return {
            **identify_model(self.model),
            "documents": [derive_seed(*text) for text in (*self.texts, *self.held_out)],
        }


def average_over_documents(packed: PackedSequence, loss: Callable[[TokenizedDocument], Mapping[str, Tensor]]) -> Parts:
    """Return the parts of a loss of each document, averaged with the lengths of their texts as weights."""
    found = [loss(document) for document in packed.documents()]
    weights = packed.texts / packed.texts.sum()
    return {name: (torch.stack([parts[name] for parts in found]) * weights).sum() for name in found[0]}


def draw_share() -> float:
    """Return a share of the pairs to keep, uniform in its logarithm, drawn from torch's global generator."""
    return MIN_SHARE * math.exp(float(torch.rand(())) * math.log(MAX_SHARE / MIN_SHARE))
