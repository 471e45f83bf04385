"""The benchmark's texts: essays, questions with paragraphs, and word lists. Dev and test share none of them.

Essays. Every fifth file of the sorted folder (the 5th, the 10th, ...) is for benchmarks only: trainers leave it out,
and haystacks use no other file. The 1st, 3rd, ... of these files are dev and the others test. A folder of fewer than
ten files has too few of them, so all its files take turns, dev first; a single file is cut in two halves.

Questions. See :mod:`vestige.bench.tasks.questions`.

Words. The sorted list of all words takes turns, dev first; each half is then divided into nouns, adjectives and verbs.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from vestige.bench import hub
from vestige.bench.tasks import SPLITS, Split, TaskSpec
from vestige.bench.tasks.questions import Questions, Source, parse, take_turns
from vestige.errors import InputError
from vestige.text.files import read_text

RESERVED_EVERY = 5
"""One file in this many is for benchmarks only and never for training."""
FEWEST_FILES = 2 * RESERVED_EVERY
"""With fewer files there are not two reserved ones, and all are used."""
ESSAYS_SET = "baber/paul_graham_essays"
SQUAD_SET = "rajpurkar/squad"
HOTPOT_SET = "hotpotqa/hotpot_qa"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Words:
    """One split of the word lists, sorted. A word can be several parts of speech."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]

    def all(self) -> tuple[str, ...]:
        """Return every word once, sorted."""
        return tuple(sorted({*self.nouns, *self.adjectives, *self.verbs}))


def essays(spec: TaskSpec) -> tuple[str, ...]:
    """Return the essays of the specification's split, from its folder or online.

    Raises:
        InputError: The folder has no ``*.txt``, a file cannot be used, or the essays cannot be fetched.
    """
    listed = _fetch_essays() if spec.essays is None else _list_essays(spec.essays)
    if len(listed) == 1:
        return (_cut_half(_read_essay(listed[0]), spec.split),)
    return tuple(_read_essay(essay) for essay in take_turns(reserved(listed), spec.split))


def reserved(essays: Sequence[T]) -> Sequence[T]:
    """Return the sorted essays that are for benchmarks only; all of them if there are fewer than ten."""
    return essays if len(essays) < FEWEST_FILES else essays[RESERVED_EVERY - 1 :: RESERVED_EVERY]


def _list_essays(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        raise InputError(f"--essays {folder} is not a folder")
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise InputError(f"--essays {folder} has no *.txt files")
    return paths


def _read_essay(essay: str | Path) -> str:
    return read_text(essay) if isinstance(essay, Path) else essay


def _cut_half(text: str, split: Split) -> str:
    """Return the first or second half of a text, cut at a space."""
    cut = text.find(" ", len(text) // 2)
    halves = (text[:cut], text[cut + 1 :])
    if cut < 0 or not all(half.strip() for half in halves):
        raise InputError("the only essay is too short to be cut into a dev and a test half")
    return halves[SPLITS.index(split)]


@cache
def words(split: Split) -> Words:
    """Return the words of a split, from the word lists of the wonderwords package.

    Raises:
        InputError: The package is absent.
    """
    lists = _word_lists()
    half = set(take_turns(sorted({word for listed in lists for word in listed}), split))
    nouns, adjectives, verbs = (tuple(word for word in listed if word in half) for listed in lists)
    return Words(nouns=nouns, adjectives=adjectives, verbs=verbs)


@cache
def _word_lists() -> tuple[tuple[str, ...], ...]:
    """Return all nouns, adjectives and verbs in lower case, sorted; entries of two words are left out."""
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise InputError('word lists need wonderwords: pip install "vestige[bench]"') from None
    generator = RandomWord()
    kinds = ("noun", "adjective", "verb")
    listed = (generator.filter(include_categories=[kind]) for kind in kinds)
    return tuple(tuple(sorted({word.lower() for word in some if " " not in word})) for some in listed)


def qa(spec: TaskSpec, wanted: Source) -> Questions:
    """Return the questions of the specification's split.

    Args:
        spec: Its ``qa`` file is read if there is one, whatever its format: look at the result's ``source``.
        wanted: The set to fetch online if there is no file.

    Raises:
        InputError: The file is malformed, with the place; a set cannot be fetched; or the split is empty.
    """
    if spec.qa is not None:
        data, where = _read_json(spec.qa), str(spec.qa)
    else:
        data, where = _fetch_squad() if wanted == "squad" else _fetch_hotpot(), wanted
    return parse(data, spec.split, where)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None


@cache
def _fetch_essays() -> Sequence[str | Path]:
    rows = hub.fetch(ESSAYS_SET, None, "train", "--essays DIR")
    return tuple(str(row["text"]) for row in rows)


@cache
def _fetch_squad() -> dict[str, Any]:
    """Return SQuAD's development set in the format of its file."""
    articles: dict[str, dict[str, list[Any]]] = {}
    for row in hub.fetch(SQUAD_SET, None, "validation", "--qa FILE"):
        answers = [{"text": text} for text in row["answers"]["text"]]
        questions = articles.setdefault(row["title"], {}).setdefault(row["context"], [])
        questions.append({"question": row["question"], "answers": answers})
    paragraphs = [
        [{"context": text, "qas": questions} for text, questions in article.items()] for article in articles.values()
    ]
    return {"data": [{"paragraphs": listed} for listed in paragraphs]}


@cache
def _fetch_hotpot() -> list[dict[str, Any]]:
    """Return HotpotQA's development set (distractor setting) in the format of its file."""
    entries = []
    for row in hub.fetch(HOTPOT_SET, "distractor", "validation", "--qa FILE"):
        shown, facts = row["context"], row["supporting_facts"]
        entries.append(
            {
                "question": row["question"],
                "answer": row["answer"],
                "context": [list(pair) for pair in zip(shown["title"], shown["sentences"], strict=True)],
                "supporting_facts": [list(pair) for pair in zip(facts["title"], facts["sent_id"], strict=True)],
            }
        )
    return entries
