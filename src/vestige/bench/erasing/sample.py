"""Samples of the benchmark of erasers: a text, its passages to erase, and the questions after the erase."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vestige.bench.sample import BaseSample

Kind = Literal["target", "retained", "leak"]
"""The erase changes the answer; the answer must survive the erase; the answer was erased."""
NUMBER_ROOM = 16
"""Tokens for a number of seven digits, a full stop, and a few words around them."""
_BEGIN, _END = "\ue010", "\ue011"  # private use characters: no text has them


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question after the erase.

    Args:
        kind: The purpose of the question.
        text: As the user asks it.
        answers: Any of them is right after the erase; none if only forbidden values are known.
        answer_prefix: Opens the reply; not part of what is scored.
        forbidden: Values that the reply must not contain: they are in the passages and nowhere else.
        max_new_tokens: Longest reply.
    """

    kind: Kind
    text: str
    answers: tuple[str, ...] = ()
    answer_prefix: str = ""
    forbidden: tuple[str, ...] = ()
    max_new_tokens: int = NUMBER_ROOM

    def correct(self, reply: str) -> bool | None:
        """Return whether a reply has any of the answers, case ignored; None if there are no answers."""
        return _has_any(reply, self.answers) if self.answers else None

    def leaks(self, reply: str) -> bool | None:
        """Return whether a reply has a forbidden value, case ignored; None if there are no such values."""
        return _has_any(reply, self.forbidden) if self.forbidden else None


@dataclass(frozen=True, kw_only=True)
class EraseSample(BaseSample):
    """A text, its passages to erase, and the questions after the erase; each is asked alone, of the edited cache."""

    context: str
    passages: tuple[tuple[int, int], ...]
    """Characters ``[start, end)`` of the context to erase in one call; ascending and disjoint."""
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        rest = self.remaining
        leaks = [value for question in self.questions for value in question.forbidden if _has_any(rest, (value,))]
        assert self.passages, f"sample {self.index} of {self.task} has nothing to erase"
        assert not leaks, f"sample {self.index} of {self.task} says {leaks} outside of what is erased"

    @property
    def remaining(self) -> str:
        """The text without the passages, to check values; the clean prompt is made of ids, not of this text."""
        ends = [0, *(end for _, end in self.passages)]
        starts = [*(start for start, _ in self.passages), len(self.context)]
        return "".join(self.context[a:b] for a, b in zip(ends, starts, strict=True))


def what_is(kind: Kind, what: str, *answers: str, forbidden: Sequence[str] = (), room: int = NUMBER_ROOM) -> Question:
    """Return the plainest question and the beginning of its reply: "What is the code?", "The code is"."""
    return Question(
        kind=kind,
        text=f"What is {what}?",
        answers=answers,
        answer_prefix=f"{what[0].upper()}{what[1:]} is",
        forbidden=tuple(forbidden),
        max_new_tokens=room,
    )


def erased(text: str) -> str:
    """Return a text marked as a passage to erase."""
    return f"{_BEGIN}{text}{_END}"


def unmarked(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return a text without its marks, and the characters that were marked."""
    plain, passages = "", []
    for i, piece in enumerate(text.split(_BEGIN)):
        passage, end, rest = piece.partition(_END)
        if i:
            assert end, "a passage that was begun is ended"
            passages.append((len(plain), len(plain) + len(passage)))
        plain += passage + rest
    return plain, tuple(passages)


def _has_any(text: str, values: Sequence[str]) -> bool:
    return any(value.lower() in text.lower() for value in values)
