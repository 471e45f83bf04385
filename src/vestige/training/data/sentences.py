"""Sentences of documents: what made-up texts are put among."""

import random
import re
from collections.abc import Callable, Sequence

from vestige.errors import InputError
from vestige.training.data.documents import Document

SHORTEST = 12
"""Sentences that a document must have."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, white space made single, without very short and very long ones."""
    found = _SENTENCE.split(" ".join(text.split()))
    return [one for one in found if 20 <= len(one) <= 400]


def require_long_documents(documents: Sequence[Document]) -> list[Document]:
    """Return the documents that have enough sentences.

    Raises:
        InputError: Fewer than two different ones have, and one is to validate on.
    """
    long = [one for one in documents if len(split_sentences(one.text)) >= SHORTEST]
    if (count := len({one.text for one in long})) < 2:
        raise InputError(
            f"training takes two texts of {SHORTEST} sentences or more, one of them to validate on; there is "
            f"{count or 'none'} among {len(documents)}"
        )
    return long


def draw_sentences(
    rng: random.Random, text: Sequence[str], room: int, count: Callable[[str], int], *, fewest: int
) -> list[str]:
    """Return sentences of a text from a random one on, going round.

    Args:
        rng: Says where to begin.
        text: Its sentences.
        room: So many tokens in all, or a sentence more.
        count: Says how many tokens a sentence has.
        fewest: Sentences, whatever they have.
    """
    at, total, found = rng.randrange(len(text)), 0, list[str]()
    while len(found) < fewest or total < room:
        found.append(text[at])
        total += count(text[at])
        at = (at + 1) % len(text)
    return found


def split_documents(documents: Sequence[Document]) -> list[list[str]]:
    """Return the sentences of every document."""
    return [split_sentences(document.text) for document in documents]
