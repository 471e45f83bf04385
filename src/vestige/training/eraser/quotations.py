"""Drafts whose answers stand in the sentences: quotations across an erased passage, and altered copies of sentences."""

import random
import re
from collections.abc import Sequence

from vestige.training.data.vocabulary import draw_syllables
from vestige.training.eraser.templates import Draft, Passage, Query

ANCHOR = 24
"""Words that open a quotation; small models cannot continue shorter ones."""
MIN_ANCHOR = 5
MIN_SENTENCES = 6
"""Sentences that a draft needs."""
QUOTE = (
    "Go on quoting the text from where the reply begins.",
    "Repeat word for word what the text says after these words.",
    "Continue the quotation exactly as it stands in the text.",
)
_NUMBER = re.compile(r"\b\d(?:[\d,.]*\d)?\b")
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}(?: [A-Z][a-z]+)*\b")
_ANSWER_WORDS = 9


def draft_neighbour(rng: random.Random, sentences: Sequence[str], other: Sequence[str]) -> Draft:
    """Return a text with an erased foreign passage, to be quoted across the passage and elsewhere.

    Args:
        rng: Source of all random choices.
        sentences: Sentences of the text, in order; at least six.
        other: Sentences of another text.
    """
    hole = rng.randrange(2, len(sentences) - 2)
    begin, count = rng.randrange(len(other)), rng.randint(1, 5)
    passages = [Passage(text=sentence) for sentence in sentences]
    passages[hole:hole] = [Passage(text=sentence, is_erased=True) for sentence in other[begin : begin + count]]
    queries = (_quote(rng, sentences, hole, "across"), _quote_elsewhere(rng, sentences, hole))
    return Draft(passages=tuple(passages), queries=queries)


def draft_altered(rng: random.Random, sentences: Sequence[str], other: Sequence[str]) -> Draft | None:
    """Return a text with an erased copy of a sentence, in which a name or number is exchanged.

    Args:
        rng: Source of all random choices.
        sentences: Sentences of the text, in order; at least six.
        other: Sentences of another text; one of them may be erased too.

    Returns:
        None if no sentence has a name or number after enough words.
    """
    fitting = [(i, match) for i, sentence in enumerate(sentences) if i for match in _find_values(sentence)]
    if not fitting:
        return None
    at, match = rng.choice(fitting)
    sentence, value = sentences[at], match[0]
    wrong = _draw_wrong_value(rng, value, [sentences, other], sentence)
    changed = sentence[: match.start()] + wrong + sentence[match.end() :]
    passages = [Passage(text=text, states=value if i == at else "") for i, text in enumerate(sentences)]
    place = rng.choice([i for i in range(1, len(sentences)) if abs(i - at) > 1])
    passages.insert(place, Passage(text=changed, is_erased=True, states=wrong))
    if rng.random() < 0.4:
        passages.insert(place, Passage(text=rng.choice(other), is_erased=True))
    prefix = " ".join(sentence[: match.start()].split()[-ANCHOR:])
    query = Query(kind="altered", question=rng.choice(QUOTE), prefix=prefix, answer=value, misled=True)
    return Draft(passages=tuple(passages), queries=(query, _quote_elsewhere(rng, sentences, at)))


def _quote_elsewhere(rng: random.Random, sentences: Sequence[str], hole: int) -> Query:
    return _quote(rng, sentences, rng.choice([i for i in range(1, len(sentences)) if i != hole]), "elsewhere")


def _quote(rng: random.Random, sentences: Sequence[str], at: int, kind: str) -> Query:
    """Return the query for a sentence, opened by the words before it."""
    return Query(
        kind=kind,
        question=rng.choice(QUOTE),
        prefix=" ".join(" ".join(sentences[:at]).split()[-ANCHOR:]),
        answer=" ".join(sentences[at].split()[:_ANSWER_WORDS]),
        misled=kind == "across",
        verbatim=True,
    )


def _find_values(sentence: str) -> list[re.Match[str]]:
    """Return the names and numbers of a sentence that follow enough words to be identified by them."""
    found = [*_NUMBER.finditer(sentence), *_NAME.finditer(sentence)]
    return [match for match in found if len(sentence[: match.start()].split()) >= MIN_ANCHOR]


def _draw_wrong_value(rng: random.Random, value: str, texts: Sequence[Sequence[str]], sentence: str) -> str:
    """Return a value of the same kind that the sentence does not have, from the texts or made up."""
    pattern = _NUMBER if value[0].isdigit() else _NAME
    known: list[str] = sorted({found for text in texts for other in text for found in pattern.findall(other)})
    free = [candidate for candidate in known if candidate not in sentence and value not in candidate]
    if free and rng.random() < 0.7:
        return rng.choice(free)
    if value[0].isdigit():
        return str(int(re.sub(r"\D", "", value)) + rng.randint(1, 40))
    return draw_syllables(rng, 3)
