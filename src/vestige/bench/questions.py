"""Questions with the paragraphs they are about, read from SQuAD's and HotpotQA's formats, in two splits.

Articles of a SQuAD file take turns, dev first (paragraphs do, if there is one article). Of HotpotQA the questions take
turns, and a paragraph belongs to the first question that shows it: later questions of the other split lose it, and are
left out if they cannot be answered without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from vestige.bench.tasks import SPLITS, Split
from vestige.errors import InputError

Source = Literal["squad", "hotpot"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and the paragraphs that it is about."""

    question: str
    answers: tuple[str, ...]
    """Any of them is right."""
    gold: tuple[str, ...]
    """Paragraphs without which it cannot be answered."""
    near: tuple[str, ...]
    """Others that look as if they could answer it: of the same article, or those that HotpotQA chose."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """One split of a set of questions."""

    source: Source
    questions: tuple[Question, ...]
    paragraphs: tuple[str, ...]
    """All paragraphs of the split, each once."""


def take_turns(items: Sequence[T], split: Split) -> Sequence[T]:
    """Return every other item: from the first one on for dev, from the second one on for test."""
    return items[SPLITS.index(split) :: len(SPLITS)]


def parse(data: Any, split: Split, where: str) -> Questions:
    """Return the questions of a split.

    Args:
        data: The parsed JSON: ``{"data": [article]}`` is SQuAD's format, a list is HotpotQA's.
        split: Which half.
        where: Names the data in errors.

    Raises:
        InputError: Neither format, a field missing or of the wrong kind, with its place, or the split is empty.
    """
    if isinstance(data, dict) and "data" in data:
        found = _squad(data, split, where)
    elif isinstance(data, list):
        found = _hotpot(data, split, where)
    else:
        raise InputError(f"{where} is neither SQuAD's format ({{'data': [...]}}) nor HotpotQA's (a list of questions)")
    if not found.questions:
        raise InputError(f"{where} has no question for the {split} split")
    return found


def _squad(data: Any, split: Split, where: str) -> Questions:
    """Read data -> paragraphs -> context and qas -> question and answers -> text."""
    read = []
    for i, article in enumerate(_field(data, "data", list, where)):
        at = f"{where}: data[{i}]"
        listed = enumerate(_field(article, "paragraphs", list, at))
        read.append([_squad_paragraph(entry, f"{at}.paragraphs[{j}]") for j, entry in listed])
    articles = [take_turns(read[0], split)] if len(read) == 1 else take_turns(read, split)
    questions = []
    for article in articles:
        texts = list(dict.fromkeys(text for text, _ in article))
        for text, asked in article:
            near = tuple(other for other in texts if other != text)
            questions += [Question(question=q, answers=a, gold=(text,), near=near) for q, a in asked]
    paragraphs = dict.fromkeys(text for article in articles for text, _ in article)
    return Questions(source="squad", questions=tuple(questions), paragraphs=tuple(paragraphs))


def _squad_paragraph(entry: Any, where: str) -> tuple[str, list[tuple[str, tuple[str, ...]]]]:
    """Return a paragraph and its (question, answers); unanswerable questions (SQuAD 2) are left out."""
    asked = []
    for k, item in enumerate(_field(entry, "qas", list, where)):
        at = f"{where}.qas[{k}]"
        question = _field(item, "question", str, at)
        if item.get("is_impossible"):
            continue
        texts = [_field(answer, "text", str, f"{at}.answers") for answer in _field(item, "answers", list, at)]
        if not texts or not all(text.strip() for text in texts):
            raise InputError(f"{at}: an answerable question needs answers that are not empty")
        asked.append((question, tuple(dict.fromkeys(texts))))
    return _field(entry, "context", str, where), asked


def _hotpot(data: list[Any], split: Split, where: str) -> Questions:
    """Read question, answer, context [[title, [sentence]]] and, if present, supporting_facts [[title, sentence]]."""
    owner: dict[str, Split] = {}
    questions = []
    for i, item in enumerate(data):
        at, side = f"{where}: [{i}]", SPLITS[i % len(SPLITS)]
        question, answer = _field(item, "question", str, at), _field(item, "answer", str, at)
        if not answer.strip():
            raise InputError(f"{at}: the answer is empty")
        shown = _hotpot_paragraphs(item, at)
        for _, text in shown:
            owner.setdefault(text, side)
        supporting = _supporting(item, at)
        gold = [text for title, text in shown if not supporting or title in supporting]
        if side != split or not gold or any(owner[text] != side for text in gold):
            continue
        near = tuple(text for _, text in shown if text not in gold and owner[text] == side)
        questions.append(Question(question=question, answers=(answer,), gold=tuple(gold), near=near))
    paragraphs = tuple(text for text, side in owner.items() if side == split)
    return Questions(source="hotpot", questions=tuple(questions), paragraphs=paragraphs)


def _hotpot_paragraphs(item: Any, where: str) -> list[tuple[str, str]]:
    """Return (title, title and text) of each paragraph of one entry."""
    shown = {}
    for j, pair in enumerate(_field(item, "context", list, where)):
        fits = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], list)
        if not fits or not all(isinstance(sentence, str) for sentence in pair[1]):
            raise InputError(f"{where}.context[{j}]: expected [title, [sentence, ...]]")
        shown[f"{pair[0]}\n{''.join(pair[1])}"] = pair[0]
    return [(title, text) for text, title in shown.items()]


def _supporting(item: Any, where: str) -> set[str]:
    """Return the titles of the paragraphs that matter; none if the file does not say."""
    facts = _field(item, "supporting_facts", list, where) if "supporting_facts" in item else []
    for fact in facts:
        if not isinstance(fact, list) or not fact or not isinstance(fact[0], str):
            raise InputError(f"{where}.supporting_facts: expected [title, sentence], got {fact!r}")
    return {fact[0] for fact in facts}


def _field(item: Any, key: str, kind: type, where: str) -> Any:
    """Return what an object has under a key, or raise an InputError that says where it should have been."""
    if not isinstance(item, dict):
        raise InputError(f"{where}: expected an object with {key!r}, got {type(item).__name__}")
    if not isinstance(item.get(key), kind):
        got = type(item[key]).__name__ if key in item else "nothing"
        raise InputError(f"{where}: expected {key!r} to be a {kind.__name__}, got {got}")
    return item[key]
