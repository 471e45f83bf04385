"""What all tasks on tales have in common: a stream of sequences, and tales to validate on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vestige.errors import InputError
from vestige.models.anatomy import check
from vestige.training.data.synthetic_qa.sequences import PackedSequence, SequenceMaker, TokenizedDocument
from vestige.training.data.synthetic_qa.validation import ValidationSample, find_validation_samples
from vestige.training.sampler import derive_seed
from vestige.training.task import model_identity

Parts = dict[str, Tensor]
"""Of a loss, by name: ``loss`` is what is learned by."""


class StoryTask:
    """A stream of sequences of tales, each a function of its name alone, about a model that stays as it is.

    Args:
        model: Frozen by this.
        tokenizer: The model's.
        prose: Sentences to train on, by document.
        held: Sentences to validate on, by document.
        length: Most tokens of a sequence, of one document or of several.
        least: Fewest tokens that a document is given.
        others: Places of the texts to look at, beside the answers.
        asked: Most questions about one text.
        seed: Everything that is drawn follows from it and a name.
        validation: Tales to validate on.

    Raises:
        InputError: Sequences would be longer than the model can read, or their numbers do not go together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prose: Sequence[Sequence[str]],
        held: Sequence[Sequence[str]],
        *,
        length: int,
        least: int,
        others: int,
        asked: int,
        seed: int,
        validation: int,
    ) -> None:
        limit = check(model).max_positions
        if limit is not None and length > limit:
            raise InputError(f"sequences of {length} tokens do not fit the model's {limit} positions")
        self.model = model.requires_grad_(False).eval()
        self.maker = SequenceMaker(tokenizer, length=length, least=least, others=others, asked=asked, seed=seed)
        self.prose, self.held, self.validation = prose, held, validation
        self._to_validate: list[ValidationSample] | None = None

    @property
    def num_samples(self) -> None:
        """Sequences come in a stream."""
        return None

    def sequence(self, *name: str | int) -> PackedSequence:
        """Return the sequence of a name."""
        return self.maker.make_sequence(name, self.prose).to(self.model.device)

    def to_validate(self) -> list[ValidationSample]:
        """Return tales about texts that are not trained on; looked for once."""
        if self._to_validate is None:
            self._to_validate = find_validation_samples(self.maker, self.model, self.held, self.validation)
        return self._to_validate

    def identity(self) -> Mapping[str, Any]:
        """Return the model and the data; tasks add their shapes and options."""
        return {
            **model_identity(self.model),
            "documents": [derive_seed(*text) for text in (*self.prose, *self.held)],
        }


def average_over_documents(packed: PackedSequence, of: Callable[[TokenizedDocument], Mapping[str, Tensor]]) -> Parts:
    """Return the parts of a loss over the documents of a sequence, the mean over the tokens of their texts."""
    found = [of(one) for one in packed.documents()]
    shares = packed.texts / packed.texts.sum()
    return {name: (torch.stack([parts[name] for parts in found]) * shares).sum() for name in found[0]}
