"""RULER's variable tracking: which variables have a value, by a chain of assignments hidden in noise?

Source: RULER, arXiv 2404.06654: one chain of four hops, names of five letters, a solved example of ten noise lines
with names of three letters before the task. Differs: every sample has an example of its own with another value; names
of a sample are distinct; "assgined" in RULER's first version is spelt as in the later ones.
"""

import random
import string
from itertools import pairwise

from vestige.bench.sample import Turn
from vestige.bench.tasks import TaskSpec
from vestige.bench.tasks.fitting import SizedSample, named_length
from vestige.bench.tasks.ruler.needles import NOISE

HOPS = 4
MAX_NEW_TOKENS = 30
EXAMPLE_LINES = 10
"""Noise lines of the solved example: as many as fit RULER's 500 tokens for it."""
_SMALLEST = HOPS + 2
"""Noise lines at least: more than there are assignments, so that each has its own place."""


def make_sized_sample(spec: TaskSpec, seed: str) -> SizedSample:
    """Return one sample; its units are noise lines."""
    rng = random.Random(seed)
    shown_value, value = (str(number) for number in rng.sample(range(10_000, 100_000), 2))
    shown, names = _names(3, rng), _names(5, rng)
    example = _text(shown, shown_value, EXAMPLE_LINES, f"{seed}/example")
    solved = f"{example}\n{_question(shown_value)} {_answer_prefix(shown_value)} {' '.join(shown)}\n\n\n"

    def build(size: int) -> Turn:
        return Turn(
            context=solved + _text(names, value, size, seed),
            question=_question(value),
            answers=names,
            answer_prefix=_answer_prefix(value),
            metric="string_match_all",
            max_new_tokens=spec.reply_limit(names, MAX_NEW_TOKENS, every=True),
        )

    return SizedSample(build=build, smallest=_SMALLEST, largest=named_length(spec, "ruler/vt"))


def _names(letters: int, rng: random.Random) -> tuple[str, ...]:
    """Return distinct names, one more than there are hops."""
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return tuple(names)


def _text(names: tuple[str, ...], value: str, size: int, seed: str) -> str:
    """Return RULER's opening and ``size`` lines of noise with the chain among them, in order.

    The places of the assignments are drawn for this size.
    """
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {later} = VAR {earlier} " for earlier, later in pairwise(names)]
    lines = [f"{NOISE}\n"] * size
    places = sorted(random.Random(f"{seed}/{size}").sample(range(size), len(chain)))
    for place, assignment in sorted(zip(places, chain, strict=True), reverse=True):
        lines.insert(place, assignment)
    opening = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    return opening + " ".join(lines)


def _question(value: str) -> str:
    return f"Question: Find all variables that are assigned the value {value} in the text above."


def _answer_prefix(value: str) -> str:
    return (
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{HOPS + 1} variables are assigned the value {value}, they are:"
    )
