"""What the benchmark of erasers asks: a text with passages to take out, and questions for what is left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["target", "retained", "leak"]
"""The answer changes with the erase; it must survive the erase; it is what was erased."""
KINDS: tuple[Kind, ...] = get_args(Kind)
NUMBER_ROOM = 16
"""Tokens for a number of seven digits, a full stop, and what a model says around them."""
_BEGIN, _END = "\ue010", "\ue011"  # private use characters: no text has them


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question behind the erase.

    Args:
        kind: What it is for.
        text: As the user asks it.
        answers: Any of them is right once the passages are gone; none if only what must not be said is known.
        answer_prefix: Opens the reply; not part of what is scored.
        forbidden: What the reply must not contain: values that stand in the passages and nowhere else.
        max_new_tokens: Longest reply.
    """

    kind: Kind
    text: str
    answers: tuple[str, ...] = ()
    answer_prefix: str = ""
    forbidden: tuple[str, ...] = ()
    max_new_tokens: int = NUMBER_ROOM

    def correct(self, reply: str) -> bool | None:
        """Return whether a reply has any of the answers, case ignored; None if there are none."""
        return _has_any(reply, self.answers) if self.answers else None

    def leaks(self, reply: str) -> bool | None:
        """Return whether a reply has anything that is forbidden, case ignored; None if nothing is."""
        return _has_any(reply, self.forbidden) if self.forbidden else None


@dataclass(frozen=True, kw_only=True)
class EraseSample:
    """A text, what is erased of it, and what is asked then.

    Args:
        task: A key of ``TASKS``.
        index: Unique within (task, length).
        length: Nominal: chat text, context, any question and its longest reply are never longer, in tokens.
        context: The whole text.
        passages: Characters ``[start, end)`` of the context that are erased, in one call; ascending and disjoint.
        questions: Each is asked on its own, of one and the same edited cache.
        tags: What results are broken down by.
    """

    task: str
    index: int
    length: int
    context: str
    passages: tuple[tuple[int, int], ...]
    questions: tuple[Question, ...]
    tags: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        left = self.remaining
        told = [value for question in self.questions for value in question.forbidden if _has_any(left, (value,))]
        assert self.passages, f"sample {self.index} of {self.task} has nothing to erase"
        assert not told, f"sample {self.index} of {self.task} says {told} outside of what is erased"

    @property
    def remaining(self) -> str:
        """The text without the passages, to check values; the clean prompt is made of ids, never of this."""
        ends = [0, *(end for _, end in self.passages)]
        starts = [*(start for start, _ in self.passages), len(self.context)]
        return "".join(self.context[a:b] for a, b in zip(ends, starts, strict=True))


def what_is(
    kind: Kind,
    what: str,
    *answers: str,
    forbidden: Sequence[str] = (),
    room: int = NUMBER_ROOM,
) -> Question:
    """Return the plainest question, with a reply that is begun: "What is the code?", "The code is".

    Args:
        kind: What it is for.
        what: Asked for, such as "the code".
        answers: Any is right.
        forbidden: What must not be said.
        room: Longest reply, in tokens.
    """
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
