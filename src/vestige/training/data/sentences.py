"""Sentences of documents, used as filler in synthetic samples."""

import random
import re
from collections.abc import Callable, Sequence

from vestige.errors import InputError
from vestige.training.data.documents import Document

Texts = Sequence[Sequence[str]]
"""Sentences of each text."""
MIN_SENTENCES = 12
"""Sentences that a document must have."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def split_sentences(text: str) -> list[str]:
    """Return the sentences of 20 to 400 characters, with single spaces."""
    sentences = _SENTENCE_END.split(" ".join(text.split()))
    return [sentence for sentence in sentences if 20 <= len(sentence) <= 400]


def split_all_sentences(documents: Sequence[Document]) -> list[list[str]]:
    """Return the sentences of every document."""
    return [split_sentences(document.text) for document in documents]


def require_long_documents(documents: Sequence[Document]) -> list[Document]:
    """Return the documents that have enough sentences.

    Raises:
        InputError: Fewer than two different documents have enough: one is needed for training, one for validation.
    """
    long = [document for document in documents if len(split_sentences(document.text)) >= MIN_SENTENCES]
    if (count := len({document.text for document in long})) < 2:
        raise InputError(
            f"training takes two texts of {MIN_SENTENCES} sentences or more, one of them to validate on; there is "
            f"{count or 'none'} among {len(documents)}"
        )
    return long


def draw_sentences(
    rng: random.Random, sentences: Sequence[str], tokens: int, count: Callable[[str], int], *, fewest: int
) -> list[str]:
    """Return consecutive sentences from a random one on, starting over at the end of the text.

    Args:
        rng: Draws the first sentence.
        sentences: Sentences of one text.
        tokens: Length to reach; the last sentence may exceed it.
        count: Returns the tokens of a sentence.
        fewest: Least number of sentences, whatever their length.
    """
    at, total, drawn = rng.randrange(len(sentences)), 0, list[str]()
    while len(drawn) < fewest or total < tokens:
        drawn.append(sentences[at])
        total += count(sentences[at])
        at = (at + 1) % len(sentences)
    return drawn
