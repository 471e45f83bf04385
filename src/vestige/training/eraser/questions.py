"""Drafts of questions about paragraphs, with a harmful distractor: a sentence that answers wrongly, and is erased."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.errors import InputError
from vestige.training.data import documents
from vestige.training.data.sentences import split_sentences
from vestige.training.eraser.quotations import FEWEST
from vestige.training.eraser.templates import Draft, Passage, Query
from vestige.training.sampler import derive_seed
from vestige.utils.jsonl import Entry

PREFIX = "The answer is"
_TRIES = 20


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and the paragraph that answers it."""

    text: str
    paragraph: str
    answer: str
    """As it stands in the paragraph."""


def read_questions(sources: Sequence[str | Path]) -> list[Question]:
    """Return the questions of JSONL files and sets on the hub whose answer stands in their paragraph.

    Args:
        sources: As :func:`~vestige.training.data.documents.read_documents` takes them. Lines have ``question``, ``context``, and
            ``answers``: a text, a list of them, or SQuAD's ``{"text": [...]}``.

    Raises:
        InputError: A source cannot be used, a line has not these fields, or no answer stands in its paragraph.
    """
    found = [_question(entry) for source in sources for entry in documents.read_entries(source)]
    usable = [one for one in found if one is not None]
    if sources and not usable:
        raise InputError(f"no question in {', '.join(map(str, sources))} has an answer that stands in its paragraph")
    return usable


def split_questions(questions: Sequence[Question], *, share: float) -> tuple[list[Question], list[Question]]:
    """Return the questions to train on and those to validate on, by paragraph; validation may have none."""
    held = [derive_seed(one.paragraph) % 1000 < 1000 * share for one in questions]
    sides = [[one for one, out in zip(questions, held, strict=True) if out == side] for side in (False, True)]
    return sides[0], sides[1]


def draft_distractor(rng: random.Random, questions: Sequence[Question], length: int) -> Draft | None:
    """Return paragraphs, one of which answers a question, and the sentence that answers it with another answer in it.

    Args:
        rng: Says which and where.
        questions: Their paragraphs surround it, their answers replace the right one.
        length: Characters of the text, about.

    Returns:
        None if no question that was looked at has a sentence for its answer, or nothing wrong to put there.
    """
    for _ in range(_TRIES):
        asked = rng.choice(questions)
        sentence = next((one for one in split_sentences(asked.paragraph) if asked.answer in one), None)
        wrong = _wrong(rng, asked, questions)
        if sentence is None or wrong is None:
            continue
        around = _paragraphs(rng, asked, questions, length)
        right = [
            Passage(text=one, states=asked.answer if one == sentence else "")
            for one in split_sentences(asked.paragraph)
        ]
        at = rng.randrange(len(around) + 1)
        passages = [Passage(text=one) for one in around[:at]] + right + [Passage(text=one) for one in around[at:]]
        changed = Passage(text=sentence.replace(asked.answer, wrong), is_erased=True, states=wrong)
        passages.insert(rng.randrange(1, len(passages) + 1), changed)
        query = Query(kind="question", question=asked.text, prefix=PREFIX, answer=asked.answer, misled=True)
        return Draft(passages=tuple(passages), queries=(query,))
    return None


def _paragraphs(rng: random.Random, asked: Question, questions: Sequence[Question], length: int) -> list[str]:
    """Return sentences of other paragraphs that do not have the answer."""
    found: list[str] = []
    for other in rng.sample(questions, len(questions)):
        if len(found) >= FEWEST and sum(map(len, found)) >= length:
            break
        if asked.answer not in other.paragraph and other.paragraph != asked.paragraph:
            found += split_sentences(other.paragraph)
    return found


def _wrong(rng: random.Random, asked: Question, questions: Sequence[Question]) -> str | None:
    """Return the answer to another question that looks like the right one, and that the paragraph does not have."""
    for _ in range(_TRIES):
        other = rng.choice(questions).answer
        alike = _look(other) == _look(asked.answer)
        if alike and other not in asked.paragraph and asked.answer not in other:
            return other
    return None


def _look(answer: str) -> tuple[bool, bool, int]:
    return answer[0].isdigit(), answer[0].isupper(), min(len(answer.split()), 3)


def _question(entry: Entry) -> Question | None:
    answers: Any = entry.columns.get("answers")
    if isinstance(answers, Mapping):
        entry = Entry(where=entry.where, line=entry.line, columns={**entry.columns, "answers": answers.get("text")})
    paragraph, text = entry.text("context"), entry.text("question").strip()
    standing = [one.strip() for one in entry.texts("answers") if one.strip() and one.strip() in paragraph]
    return Question(text=text, paragraph=paragraph, answer=standing[0]) if standing and text else None
