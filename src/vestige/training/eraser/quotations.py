"""Drafts whose answer stands in the prose itself: quotations across a hole, and sentences with another word in them."""

import random
import re
from collections.abc import Sequence

from vestige.training.data.vocabulary import of_syllables
from vestige.training.eraser.templates import Draft, Passage, Query

ANCHOR = 24
"""Words of a quotation that is to be gone on with: a small model loses the thread of shorter ones."""
LEAST_ANCHOR = 5
FEWEST = 6
"""Sentences of prose that a draft needs."""
QUOTE = (
    "Go on quoting the text from where the reply begins.",
    "Repeat word for word what the text says after these words.",
    "Continue the quotation exactly as it stands in the text.",
)
_NUMBER = re.compile(r"\b\d(?:[\d,.]*\d)?\b")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}(?: [A-Z][a-z]+)*\b")
_ANSWER_WORDS = 9


def draft_neighbour(rng: random.Random, prose: Sequence[str], other: Sequence[str]) -> Draft:
    """Return a text with a foreign passage: to be quoted across the hole, and elsewhere, where nothing may change.

    Args:
        rng: Says where and what.
        prose: Sentences of the text, in order, at least six.
        other: Sentences of another text.
    """
    hole = rng.randrange(2, len(prose) - 2)
    begin, count = rng.randrange(len(other)), rng.randint(1, 5)
    passages = [Passage(text=one) for one in prose]
    passages[hole:hole] = [Passage(text=one, is_erased=True) for one in other[begin : begin + count]]
    queries = (_quoted(rng, prose, hole, "across"), _elsewhere(rng, prose, hole))
    return Draft(passages=tuple(passages), queries=queries)


def draft_altered(rng: random.Random, prose: Sequence[str], other: Sequence[str]) -> Draft | None:
    """Return a text in which a sentence stands a second time, with another name or number in it; that one is erased.

    Args:
        rng: Says which and where.
        prose: Sentences of the text, in order, at least six.
        other: Sentences of another text; one of them may be erased along.

    Returns:
        None if no sentence has a name or a number behind words enough.
    """
    fitting = [(i, match) for i, one in enumerate(prose) if i for match in _values(one)]
    if not fitting:
        return None
    at, match = rng.choice(fitting)
    sentence, value = prose[at], match[0]
    wrong = _another(rng, value, [prose, other], sentence)
    changed = sentence[: match.start()] + wrong + sentence[match.end() :]
    passages = [Passage(text=one, states=value if i == at else "") for i, one in enumerate(prose)]
    place = rng.choice([i for i in range(1, len(prose)) if abs(i - at) > 1])
    passages.insert(place, Passage(text=changed, is_erased=True, states=wrong))
    if rng.random() < 0.4:
        passages.insert(place, Passage(text=rng.choice(other), is_erased=True))
    begun = " ".join(sentence[: match.start()].split()[-ANCHOR:])
    asked = Query(kind="altered", question=rng.choice(QUOTE), prefix=begun, answer=value, misled=True)
    return Draft(passages=tuple(passages), queries=(asked, _elsewhere(rng, prose, at)))


def _elsewhere(rng: random.Random, prose: Sequence[str], hole: int) -> Query:
    return _quoted(rng, prose, rng.choice([i for i in range(1, len(prose)) if i != hole]), "elsewhere")


def _quoted(rng: random.Random, prose: Sequence[str], anchor: int, kind: str) -> Query:
    """Return the query for what a sentence says, by the words before it."""
    return Query(
        kind=kind,
        question=rng.choice(QUOTE),
        prefix=" ".join(" ".join(prose[:anchor]).split()[-ANCHOR:]),
        answer=" ".join(prose[anchor].split()[:_ANSWER_WORDS]),
        misled=kind == "across",
        verbatim=True,
    )


def _values(sentence: str) -> list[re.Match[str]]:
    """Return the names and numbers of a sentence that stand behind words enough to tell where one is."""
    found = [*_NUMBER.finditer(sentence), *_NAME.finditer(sentence)]
    return [match for match in found if len(sentence[: match.start()].split()) >= LEAST_ANCHOR]


def _another(rng: random.Random, value: str, texts: Sequence[Sequence[str]], sentence: str) -> str:
    """Return another value of the same kind, one that the sentence does not have, of the texts or made up."""
    pattern = _NUMBER if value[0].isdigit() else _NAME
    known: list[str] = sorted({found for text in texts for one in text for found in pattern.findall(one)})
    free = [one for one in known if one not in sentence and value not in one]
    if free and rng.random() < 0.7:
        return rng.choice(free)
    if value[0].isdigit():
        return str(int(re.sub(r"\D", "", value)) + rng.randint(1, 40))
    return of_syllables(rng, 3)
