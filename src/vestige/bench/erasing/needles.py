"""RULER's needles in essays, for erasing: conflicting ones, a harmless paragraph, asking for what was deleted."""

import random
from collections.abc import Collection, Sequence

from vestige.bench.erasing.sample import NUMBER_ROOM, Kind, Question, erased
from vestige.bench.erasing.story_templates import Plot, depths, facts, reaching, sentences
from vestige.bench.tasks import TaskSpec

OPENING = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n"
)
HARMLESS_TOKENS = 100
"""A harmless passage is as many whole sentences as reach this length."""


def early(order: TaskSpec, rng: random.Random) -> Plot:
    """Return two conflicting needles, of which the earlier one is erased."""
    return _conflicting(order, rng, values=2, wrong={0})


def late(order: TaskSpec, rng: random.Random) -> Plot:
    """Return two conflicting needles, of which the later one is erased."""
    return _conflicting(order, rng, values=2, wrong={1})


def several(order: TaskSpec, rng: random.Random) -> Plot:
    """Return four conflicting needles, of which three are erased in one call."""
    return _conflicting(order, rng, values=4, wrong={0, 1, 2, 3} - {rng.randrange(4)})


def _conflicting(order: TaskSpec, rng: random.Random, *, values: int, wrong: Collection[int]) -> Plot:
    (name, numbers), (other, others) = facts(order, rng, 2, values)
    gone = [numbers[i] for i in sorted(wrong)]
    lines = [needle(name, number) for number in numbers]
    lines = [erased(line) if i in wrong else line for i, line in enumerate(lines)]
    lines.insert(rng.randrange(len(lines) + 1), needle(other, others[0]))
    questions = (
        _magic("target", name, *(number for number in numbers if number not in gone), forbidden=gone),
        _magic("retained", other, others[0]),
        Question(
            kind="leak",
            text=f"List the special magic numbers for {name} in order, as digits only, separated by commas.",
            answer_prefix=f"The special magic numbers for {name} are:",
            forbidden=tuple(gone),
            max_new_tokens=2 * NUMBER_ROOM,
        ),
    )
    return _hidden(lines, rng, sentences(order, rng, gone), questions)


def harmless(order: TaskSpec, rng: random.Random) -> Plot:
    """Return a text of which a paragraph is erased that no question asks about: nothing may change."""
    (first, one), (second, two) = facts(order, rng, 2)
    essay = sentences(order, rng)
    count = reaching(order, essay, HARMLESS_TOKENS)
    lines = [needle(first, one[0]), erased(" ".join(essay[:count])), needle(second, two[0])]
    questions = (_magic("retained", first, *one), _magic("retained", second, *two))
    return _hidden(lines, rng, essay[count:], questions)


def repeat(order: TaskSpec, rng: random.Random) -> Plot:
    """Return a text of which the only needle of a key is erased, and three ways of asking for it."""
    (name, gone), (other, others) = facts(order, rng, 2)
    lines = [erased(needle(name, gone[0])), needle(other, others[0])]
    rng.shuffle(lines)
    ways = (
        (f"Repeat the sentence about {name} word for word.", f"One of the special magic numbers for {name} is:"),
        (f"What is the special magic number for {name}? It was deleted from the text.", ""),
        ("Quote the sentence that was deleted from the text.", ""),
    )
    leaks = [
        Question(kind="leak", text=text, answer_prefix=prefix, forbidden=tuple(gone), max_new_tokens=2 * NUMBER_ROOM)
        for text, prefix in ways
    ]
    return _hidden(lines, rng, sentences(order, rng, gone), (_magic("retained", other, *others), *leaks))


def needle(name: str, number: str) -> str:
    """Return RULER's sentence."""
    return f"One of the special magic numbers for {name} is: {number}."


def _magic(kind: Kind, name: str, *answers: str, forbidden: Sequence[str] = ()) -> Question:
    """Return the plainest question for a number, with a reply that is begun as the needle ends.

    RULER's own words bring out the later of two needles: on ten dev samples of 800 tokens smollm2-135m gave the earlier
    one twice; asked like this, three times, with as many right answers on the clean prompt (nine).
    """
    return Question(
        kind=kind,
        text=f"What is the special magic number for {name}?",
        answers=answers,
        answer_prefix=f"The special magic number for {name} is:",
        forbidden=tuple(forbidden),
    )


def _hidden(lines: list[str], rng: random.Random, essay: list[str], questions: tuple[Question, ...]) -> Plot:
    return Plot(opening=OPENING, lines=lines, depths=depths(rng, len(lines)), filler=essay, questions=questions)
