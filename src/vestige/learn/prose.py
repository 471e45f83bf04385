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


def prose_of(documents: Sequence[Document]) -> list[list[str]]:
    """Return the sentences of every document that has enough of them.

    Raises:
        InputError: None has.
    """
    found = [sentences(document.text) for document in documents]
    long = [text for text in found if len(text) >= SHORTEST]
    if not long:
        raise InputError(f"no text to train or validate on has {SHORTEST} sentences or more")
    return long
