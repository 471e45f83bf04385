"""Drafts of questions about paragraphs with a distractor: an erased sentence that gives a wrong answer."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vestige.errors import InputError
from vestige.text.jsonl import Entry
from vestige.training.data.documents import read_entries
from vestige.training.data.sentences import split_sentences
from vestige.training.eraser.quotations import MIN_SENTENCES
from vestige.training.eraser.templates import Draft, Passage, Query
from vestige.training.sampler import derive_seed

PREFIX = "The answer is"
_TRIES = 20


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and the paragraph that answers it."""

    text: str
    paragraph: str
    answer: str
    """Copied from the paragraph."""


def read_questions(sources: Sequence[str | Path]) -> list[Question]:
    """Return the questions of JSONL files and hub data sets whose paragraph contains the answer.

    Args:
        sources: As :func:`~vestige.training.data.documents.read_documents` takes them. Entries have ``question``,
            ``context``, and ``answers``: a text, a list of them, or SQuAD's ``{"text": [...]}``.

    Raises:
        InputError: A source cannot be used, an entry lacks a field, or no paragraph contains its answer.
    """
    found = [_parse_question(entry) for source in sources for entry in read_entries(source)]
    usable = [question for question in found if question is not None]
    if sources and not usable:
        raise InputError(f"no question in {', '.join(map(str, sources))} has an answer that stands in its paragraph")
    return usable


def split_questions(questions: Sequence[Question], *, share: float) -> tuple[list[Question], list[Question]]:
    """Return the questions for training and for validation, split by paragraph; validation may be empty."""
    sides: tuple[list[Question], list[Question]] = ([], [])
    for question in questions:
        sides[derive_seed(question.paragraph) % 1000 < 1000 * share].append(question)
    return sides


def draft_distractor(rng: random.Random, questions: Sequence[Question], length: int) -> Draft | None:
    """Return paragraphs, one of which answers a question, and an erased copy of its sentence with a wrong answer.

    Args:
        rng: Source of all random choices.
        questions: Source of the question, of the surrounding paragraphs and of wrong answers.
        length: Characters of the text, about.

    Returns:
        None if no question that was tried has an answering sentence and a plausible wrong answer.
    """
    for _ in range(_TRIES):
        question = rng.choice(questions)
        sentences = split_sentences(question.paragraph)
        answering = next((sentence for sentence in sentences if question.answer in sentence), None)
        wrong = _draw_wrong_answer(rng, question, questions)
        if answering is None or wrong is None:
            continue
        passages = [Passage(text=sentence) for sentence in _draw_paragraphs(rng, question, questions, length)]
        at = rng.randrange(len(passages) + 1)
        passages[at:at] = [
            Passage(text=sentence, states=question.answer if sentence == answering else "") for sentence in sentences
        ]
        changed = Passage(text=answering.replace(question.answer, wrong), is_erased=True, states=wrong)
        passages.insert(rng.randrange(1, len(passages) + 1), changed)
        query = Query(kind="question", question=question.text, prefix=PREFIX, answer=question.answer, misled=True)
        return Draft(passages=tuple(passages), queries=(query,))
    return None


def _draw_paragraphs(rng: random.Random, question: Question, questions: Sequence[Question], length: int) -> list[str]:
    """Return sentences of other paragraphs that do not contain the answer."""
    found: list[str] = []
    for other in rng.sample(questions, len(questions)):
        if len(found) >= MIN_SENTENCES and sum(map(len, found)) >= length:
            break
        if question.answer not in other.paragraph and other.paragraph != question.paragraph:
            found += split_sentences(other.paragraph)
    return found


def _draw_wrong_answer(rng: random.Random, question: Question, questions: Sequence[Question]) -> str | None:
    """Return another question's answer that resembles the right one and is not in the paragraph."""
    for _ in range(_TRIES):
        other = rng.choice(questions).answer
        alike = _shape(other) == _shape(question.answer)
        if alike and other not in question.paragraph and question.answer not in other:
            return other
    return None


def _shape(answer: str) -> tuple[bool, bool, int]:
    return answer[0].isdigit(), answer[0].isupper(), min(len(answer.split()), 3)


def _parse_question(entry: Entry) -> Question | None:
    answers: Any = entry.columns.get("answers")
    if isinstance(answers, Mapping):
        entry = Entry(where=entry.where, line=entry.line, columns={**entry.columns, "answers": answers.get("text")})
    paragraph, text = entry.text("context"), entry.text("question").strip()
    answers = [answer for raw in entry.texts("answers") if (answer := raw.strip()) and answer in paragraph]
    return Question(text=text, paragraph=paragraph, answer=answers[0]) if answers and text else None
