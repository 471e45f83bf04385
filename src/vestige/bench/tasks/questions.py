"""Questions and their paragraphs, read from SQuAD's and HotpotQA's formats, in two splits.

The articles of a SQuAD file take turns, dev first; if there is one article, its paragraphs do. The questions of
HotpotQA take turns, and a paragraph belongs to the first question that shows it. Later questions of the other split
lose the paragraph, and are left out if they cannot be answered without it.
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
    """A question and its paragraphs."""

    question: str
    answers: tuple[str, ...]
    """Any of them is right."""
    gold: tuple[str, ...]
    """Paragraphs without which it cannot be answered."""
    near: tuple[str, ...]
    """Distractors: other paragraphs of the same article, or those that HotpotQA chose."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """One split of a set of questions."""

    source: Source
    questions: tuple[Question, ...]
    paragraphs: tuple[str, ...]
    """All paragraphs of the split, each once."""


def take_turns(items: Sequence[T], split: Split) -> Sequence[T]:
    """Return every second item, from the first one on for dev and from the second one on for test."""
    return items[SPLITS.index(split) :: len(SPLITS)]


def parse(data: Any, split: Split, where: str) -> Questions:
    """Return the questions of a split.

    Args:
        data: The parsed JSON: ``{"data": [article]}`` is SQuAD's format, a list is HotpotQA's.
        split: Which half.
        where: Name of the data in errors.

    Raises:
        InputError: Neither format, a field missing or of the wrong kind, with its place, or the split is empty.
    """
    if isinstance(data, dict) and "data" in data:
        found = _read_squad(data, split, where)
    elif isinstance(data, list):
        found = _read_hotpot(data, split, where)
    else:
        raise InputError(f"{where} is neither SQuAD's format ({{'data': [...]}}) nor HotpotQA's (a list of questions)")
    if not found.questions:
        raise InputError(f"{where} has no question for the {split} split")
    return found


def _read_squad(data: Any, split: Split, where: str) -> Questions:
    """Read data -> paragraphs -> context and qas -> question and answers -> text."""
    read = []
    for i, article in enumerate(_require_field(data, "data", list, where)):
        at = f"{where}: data[{i}]"
        listed = enumerate(_require_field(article, "paragraphs", list, at))
        read.append([_read_squad_paragraph(entry, f"{at}.paragraphs[{j}]") for j, entry in listed])
    articles = [take_turns(read[0], split)] if len(read) == 1 else take_turns(read, split)
    questions = []
    for article in articles:
        texts = list(dict.fromkeys(text for text, _ in article))
        for text, answered in article:
            near = tuple(distractor for distractor in texts if distractor != text)
            questions += [Question(question=q, answers=a, gold=(text,), near=near) for q, a in answered]
    paragraphs = dict.fromkeys(text for article in articles for text, _ in article)
    return Questions(source="squad", questions=tuple(questions), paragraphs=tuple(paragraphs))


def _read_squad_paragraph(entry: Any, where: str) -> tuple[str, list[tuple[str, tuple[str, ...]]]]:
    """Return a paragraph and its (question, answers); unanswerable questions (SQuAD 2) are left out."""
    answered = []
    for k, item in enumerate(_require_field(entry, "qas", list, where)):
        at = f"{where}.qas[{k}]"
        question = _require_field(item, "question", str, at)
        if item.get("is_impossible"):
            continue
        texts = [
            _require_field(answer, "text", str, f"{at}.answers") for answer in _require_field(item, "answers", list, at)
        ]
        if not texts or not all(text.strip() for text in texts):
            raise InputError(f"{at}: an answerable question needs answers that are not empty")
        answered.append((question, tuple(dict.fromkeys(texts))))
    return _require_field(entry, "context", str, where), answered


def _read_hotpot(data: list[Any], split: Split, where: str) -> Questions:
    """Read question, answer, context [[title, [sentence]]] and, if present, supporting_facts [[title, sentence]]."""
    owner: dict[str, Split] = {}
    questions = []
    for i, item in enumerate(data):
        at, side = f"{where}: [{i}]", SPLITS[i % len(SPLITS)]
        question, answer = _require_field(item, "question", str, at), _require_field(item, "answer", str, at)
        if not answer.strip():
            raise InputError(f"{at}: the answer is empty")
        shown = _read_hotpot_paragraphs(item, at)
        for _, text in shown:
            owner.setdefault(text, side)
        supporting = _read_supporting(item, at)
        gold = [text for title, text in shown if not supporting or title in supporting]
        if side != split or not gold or any(owner[text] != side for text in gold):
            continue
        near = tuple(text for _, text in shown if text not in gold and owner[text] == side)
        questions.append(Question(question=question, answers=(answer,), gold=tuple(gold), near=near))
    paragraphs = tuple(text for text, side in owner.items() if side == split)
    return Questions(source="hotpot", questions=tuple(questions), paragraphs=paragraphs)


def _read_hotpot_paragraphs(item: Any, where: str) -> list[tuple[str, str]]:
    """Return (title, title and text) of each paragraph of one entry."""
    shown = {}
    for j, pair in enumerate(_require_field(item, "context", list, where)):
        fits = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], list)
        if not fits or not all(isinstance(sentence, str) for sentence in pair[1]):
            raise InputError(f"{where}.context[{j}]: expected [title, [sentence, ...]]")
        shown[f"{pair[0]}\n{''.join(pair[1])}"] = pair[0]
    return [(title, text) for text, title in shown.items()]


def _read_supporting(item: Any, where: str) -> set[str]:
    """Return the titles of the supporting paragraphs; none if the file has no such list."""
    facts = _require_field(item, "supporting_facts", list, where) if "supporting_facts" in item else []
    for fact in facts:
        if not isinstance(fact, list) or not fact or not isinstance(fact[0], str):
            raise InputError(f"{where}.supporting_facts: expected [title, sentence], got {fact!r}")
    return {fact[0] for fact in facts}


def _require_field(item: Any, key: str, kind: type, where: str) -> Any:
    """Return the value of a key in an object, or raise an InputError with its place."""
    if not isinstance(item, dict):
        raise InputError(f"{where}: expected an object with {key!r}, got {type(item).__name__}")
    if not isinstance(item.get(key), kind):
        got = type(item[key]).__name__ if key in item else "nothing"
        raise InputError(f"{where}: expected {key!r} to be a {kind.__name__}, got {got}")
    return item[key]
