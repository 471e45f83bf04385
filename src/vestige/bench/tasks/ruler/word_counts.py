"""RULER's two counting tasks: the ten most common words of a list, the three most frequent words of a coded text.

Source: RULER, arXiv 2404.06654. Common words: ten words occur 30 times each and the others 3 times, after a solved
example with 10 and 3; below 4,096 tokens 6 times and once, the example 3 times and once. Frequent words: the word of
rank k takes k^-2 / zeta(2) of the text, the first rank is "..." and does not count, the vocabulary is a fiftieth of the
length. Differs: no word of the example is in the list; words are distinct; the list ends where the word lists do
(RULER goes on with a larger dictionary: about 60,000 tokens and beyond).
"""

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from vestige.bench.sample import Turn
from vestige.bench.tasks import TaskSpec, sources
from vestige.bench.tasks.fitting import SizedSample, named_length

COMMON = 10
"""Common words of a list."""
COMMON_MAX_NEW_TOKENS = 120
FREQUENT_MAX_NEW_TOKENS = 50
FULL_LENGTH = 4096
"""Length in tokens from which on words are repeated as often as in RULER's paper."""
ALPHA = 2.0
_ZETA = math.pi**2 / 6  # zeta(2), since ALPHA = 2
_CODED_LETTERS = 6
_FEWEST_CODED = 80
"""Words of a coded text at least: from here on ranks 2, 3, 4 and 5 always differ in their counts."""


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Counts of words in a list of common words, and in its solved example."""

    common: int
    uncommon: int
    example_words: int
    """Distinct words of the example, common ones included."""
    example_common: int
    example_uncommon: int


LONG = Repeats(common=30, uncommon=3, example_words=40, example_common=10, example_uncommon=3)
SHORT = Repeats(common=6, uncommon=1, example_words=20, example_common=3, example_uncommon=1)


def make_common(spec: TaskSpec, seed: str) -> SizedSample:
    """Return one sample of common words; its units are uncommon words of the list."""
    rng = random.Random(seed)
    repeats = SHORT if named_length(spec, "ruler/cwe") < FULL_LENGTH else LONG
    pool = list(sources.words(spec.split).all())
    rng.shuffle(pool)
    shown, listed = pool[: repeats.example_words], pool[repeats.example_words :]
    found, rest = listed[:COMMON], listed[COMMON:]
    example = _list(shown[:COMMON], shown[COMMON:], repeats.example_common, repeats.example_uncommon, rng)
    solved = f"{example}\n{_QUESTION} {_ANSWER_PREFIX} {' '.join(_numbered(shown[:COMMON]))}\n"

    def build(size: int) -> Turn:
        shuffle = random.Random(f"{seed}/{size}")
        return Turn(
            context=solved + _list(found, rest[:size], repeats.common, repeats.uncommon, shuffle),
            question=_QUESTION,
            answers=tuple(found),
            answer_prefix=_ANSWER_PREFIX,
            metric="string_match_all",
            max_new_tokens=spec.reply_limit(_numbered(found), COMMON_MAX_NEW_TOKENS, every=True),
        )

    return SizedSample(build=build, smallest=1, largest=len(rest))


_QUESTION = f"Question: What are the {COMMON} most common words in the above list?"
_ANSWER_PREFIX = f"Answer: The top {COMMON} words that appear most often in the list are:"


def _list(common: list[str], others: list[str], often: int, seldom: int, rng: random.Random) -> str:
    """Return RULER's opening and the numbered list."""
    words = common * often + others * seldom
    rng.shuffle(words)
    opening = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    return opening + " ".join(_numbered(words))


def _numbered(words: Sequence[str]) -> list[str]:
    return [f"{i}. {word}" for i, word in enumerate(words, 1)]


def make_frequent(spec: TaskSpec, seed: str) -> SizedSample:
    """Return one sample of frequent words; its units are words of the coded text."""
    rng = random.Random(seed)
    length = named_length(spec, "ruler/fwe")
    vocabulary: dict[str, None] = {"...": None}
    while len(vocabulary) < max(length // 50, 5):
        vocabulary["".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS))] = None
    words = list(vocabulary)
    answers = words[1:4]

    def build(size: int) -> Turn:
        text = [word for rank, word in enumerate(words, 1) for _ in range(int(size * rank**-ALPHA / _ZETA))]
        random.Random(f"{seed}/{size}").shuffle(text)
        return Turn(
            context="Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(text)}",
            question="Question: Do not provide any explanation. Please ignore the dots '....'. "
            "What are the three most frequently appeared words in the above coded text?",
            answers=tuple(answers),
            answer_prefix="Answer: According to the coded text above, the three most frequently appeared words are:",
            metric="string_match_all",
            max_new_tokens=spec.reply_limit(answers, FREQUENT_MAX_NEW_TOKENS, every=True),
        )

    return SizedSample(build=build, smallest=_FEWEST_CODED, largest=max(_FEWEST_CODED, 2 * length))
