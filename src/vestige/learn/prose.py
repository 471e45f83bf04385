"""Sentences of documents: what made-up texts are put among."""

import re
from collections.abc import Sequence

from vestige.errors import InputError
from vestige.learn.documents import Document

SHORTEST = 12
"""Sentences that a document must have."""
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, white space made single, without very short and very long ones."""
    found = _SENTENCE.split(" ".join(text.split()))
    return [one for one in found if 20 <= len(one) <= 400]


def usable(documents: Sequence[Document]) -> list[Document]:
    """Return the documents that have enough sentences.

    Raises:
        InputError: Fewer than two different ones have, and one is to validate on.
    """
    long = [one for one in documents if len(sentences(one.text)) >= SHORTEST]
    if (count := len({one.text for one in long})) < 2:
        raise InputError(
            f"training takes two texts of {SHORTEST} sentences or more, one of them to validate on; there is "
            f"{count or 'none'} among {len(documents)}"
        )
    return long


def prose_of(documents: Sequence[Document]) -> list[list[str]]:
    """Return the sentences of every document."""
    return [sentences(document.text) for document in documents]
