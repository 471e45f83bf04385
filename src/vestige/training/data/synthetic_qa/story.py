"""Made-up texts in which a few things matter later: stated in prose, in tables, lists, code or talk, then asked for.

What is asked must be remembered over everything that stands behind it, and nothing tells in advance what it will be. No
template of a benchmark of ours is among these, and no value or name that one draws; tests compare both sides.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vestige.training.data.vocabulary import (
    ASK,
    RELATIONS,
    REPLY,
    STATED,
    Relation,
    made_up,
    subject,
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a tale: what opens the reply, and how that goes on."""

    question: str
    prefix: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Story:
    """A text, and questions that its parts answer, in random order."""

    kind: str
    text: str
    asked: tuple[Question, ...]


def make_story(rng: random.Random, prose: Sequence[str]) -> Story:
    """Return a tale of a random kind.

    Args:
        rng: Everything that is drawn follows from it.
        prose: Sentences to put things among, in order, at least four.
    """
    kind = rng.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
    make, _ = KINDS[kind]
    text, asked = make(rng, prose)
    rng.shuffle(asked)
    return Story(kind=kind, text=text, asked=tuple(asked))


Made = tuple[str, list[Question]]


def statements(rng: random.Random, prose: Sequence[str]) -> Made:
    """State who has what, each once, among the sentences."""
    topics = _topics(rng, _some(rng, min(12, len(prose))))
    lines = list(prose)
    for who, relation, value in topics:
        line = rng.choice(STATED).format(s=who, what=relation.what, v=value)
        lines.insert(rng.randrange(len(lines) + 1), line)
    return _joined(rng, lines), [_about(rng, *topic) for topic in topics]


def noise(rng: random.Random, prose: Sequence[str]) -> Made:
    """State who has what among a few sentences that come again and again."""
    few = rng.sample(list(prose), min(rng.randint(2, 5), len(prose)))
    lines = [rng.choice(few) if rng.random() < 0.3 else few[i % len(few)] for i in range(len(prose))]
    return statements(rng, lines)


def table(rng: random.Random, prose: Sequence[str]) -> Made:
    """Put a table between the sentences: a row for each name, a column for each relation."""
    names = _distinct(rng, subject, rng.randint(3, 10))
    columns = rng.sample(RELATIONS, rng.randint(1, 3))
    cells = {name: [column.value(rng) for column in columns] for name in names}
    bar = rng.choice((" | ", ", ", "\t", "; "))
    rows = [bar.join(["name", *(column.what for column in columns)])]
    rows += [bar.join([name, *values]) for name, values in cells.items()]
    asked = [
        _about(rng, name, column, value)
        for name, values in cells.items()
        for column, value in zip(columns, values, strict=True)
    ]
    return _between(rng, prose, "\n".join(rows)), asked


def make_assignments(rng: random.Random, prose: Sequence[str]) -> Made:
    """Put lines of a settings file or a program among the sentences."""
    form = rng.choice(ASSIGNED)
    names = [name.lower() for name in _distinct(rng, made_up, rng.randint(2, min(10, len(prose))))]
    values = {name: rng.choice(RELATIONS).value(rng) for name in names}
    lines = list(prose)
    at = sorted((rng.randrange(len(lines) + 1) for _ in names), reverse=True)
    for place, (name, value) in zip(at, values.items(), strict=True):
        lines.insert(place, form.format(n=name, v=value))
    question = rng.choice(ASK_ASSIGNED)
    before, quote = form.split("{v}")[0].rstrip(' "'), '"' if '"' in form else ""
    asked = [
        Question(question=question.format(n=n), prefix=before.format(n=n), answer=f"{quote}{v}{quote}")
        for n, v in values.items()
    ]
    return "\n".join(lines), asked


def talk(rng: random.Random, prose: Sequence[str]) -> Made:
    """Have two people talk; one tells something now and then."""
    one, other = rng.sample(("Guest", "Host", "Caller", "Clerk", "Pupil", "Tutor"), 2)
    topics = _topics(rng, _some(rng, min(8, len(prose))))
    lines = [f"{(one, other)[i % 2]}: {said}" for i, said in enumerate(prose)]
    for who, relation, value in topics:
        told = rng.choice(TOLD).format(s=who, what=relation.what, v=value)
        place = rng.randrange(len(lines) + 1)
        lines[place:place] = [f"{one}: {told}", f"{other}: {rng.choice(HEARD)}"]
    return "\n".join(lines), [_about(rng, *topic) for topic in topics]


def listing(rng: random.Random, prose: Sequence[str]) -> Made:
    """Put named entries between the sentences, each a few lines long."""
    names = _distinct(rng, made_up, rng.randint(2, 6))
    columns = rng.sample(RELATIONS, rng.randint(1, 3))
    blocks, asked = [], []
    for name in names:
        values = [(column, column.value(rng)) for column in columns]
        blocks.append("\n".join([f"[{name}]", *(f"  {column.what}: {value}" for column, value in values)]))
        asked += [_about(rng, name, column, value) for column, value in values]
    return _between(rng, prose, "\n".join(blocks)), asked


def quotation(rng: random.Random, prose: Sequence[str]) -> Made:
    """Ask for what follows some words of the text, which makes every sentence matter a little."""
    asked = []
    for sentence in rng.sample(list(prose), min(2, len(prose))):
        words = sentence.split()
        half = len(words) // 2
        if half >= 4:
            anchor, rest = " ".join(words[:half]), " ".join(words[half : half + 10])
            asked.append(Question(question=rng.choice(QUOTE), prefix=anchor, answer=rest))
    return _joined(rng, list(prose)), asked


KINDS: dict[str, tuple[Callable[[random.Random, Sequence[str]], Made], float]] = {
    "statements": (statements, 0.4),
    "noise": (noise, 0.15),
    "table": (table, 0.1),
    "assignments": (make_assignments, 0.1),
    "talk": (talk, 0.1),
    "listing": (listing, 0.1),
    "quotation": (quotation, 0.05),
}
"""How to make each kind, and how often it comes."""

ASSIGNED = ("{n} = {v}", "set {n} to {v}", "{n}: {v}", 'const {n} = "{v}";', "let {n} be {v}", "{n} := {v};")
ASK_ASSIGNED = ("What is {n} set to?", "What does {n} hold?", "Give the value of {n}.")
TOLD = (
    "By the way, {s}'s {what} is {v}.",
    "Before I forget: the {what} of {s} is {v}.",
    "I found out that {v} is {s}'s {what}.",
    "You should write down {v}, that is {s}'s {what}.",
)
HEARD = ("I see.", "Good, I have noted it.", "Thank you, go on.", "I will keep that in mind.")
QUOTE = ("Go on with these words as the text does.", "How does the text go on here?")

_JOINTS = {" ": 0.7, "\n": 0.2, "\n\n": 0.1}


def _some(rng: random.Random, most: int) -> int:
    """Return a count from 1 on, few more often than many: evenly by its logarithm."""
    return int((most + 1) ** rng.random())


def _topics(rng: random.Random, count: int) -> list[tuple[str, Relation, str]]:
    """Return who has what: nobody twice."""
    return [(who, one := rng.choice(RELATIONS), one.value(rng)) for who in _distinct(rng, subject, count)]


def _about(rng: random.Random, who: str, relation: Relation, value: str) -> Question:
    question, prefix = (rng.choice(some).format(s=who, what=relation.what) for some in (ASK, REPLY))
    return Question(question=question, prefix=prefix, answer=value)


def _distinct(rng: random.Random, make: Callable[[random.Random], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(rng)] = None
    return list(found)


def _joined(rng: random.Random, lines: Sequence[str]) -> str:
    return rng.choices(list(_JOINTS), list(_JOINTS.values()))[0].join(lines)


def _between(rng: random.Random, prose: Sequence[str], block: str) -> str:
    place = rng.randrange(len(prose) + 1)
    before, after = " ".join(prose[:place]), " ".join(prose[place:])
    return "\n\n".join(part for part in (before, block, after) if part)
