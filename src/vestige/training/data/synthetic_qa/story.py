"""Synthetic texts with facts to remember, and questions about them.

Facts stand in sentences, tables, lists, code or dialogue. A model must remember each of them over the rest of the text,
because nothing in it tells which one a question will ask for. The templates and words are none of our benchmarks';
tests compare both sides.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vestige.training.data.vocabulary import (
    JOINTS,
    RELATIONS,
    Relation,
    Topic,
    draw_distinct,
    draw_name,
    draw_subject,
    draw_weighted,
)

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


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a text, the words that open the reply, and the answer that continues them."""

    question: str
    prefix: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Story:
    """A text of one kind, and questions about it in random order."""

    kind: str
    text: str
    questions: tuple[Question, ...]


TextWithQuestions = tuple[str, list[Question]]


def make_story(rng: random.Random, sentences: Sequence[str]) -> Story:
    """Return a story of a random kind.

    Args:
        rng: Source of all random choices.
        sentences: Filler among which the facts are placed, in order; at least four.
    """
    kind = draw_weighted(rng, {kind: weight for kind, (_, weight) in KINDS.items()})
    text, questions = KINDS[kind][0](rng, sentences)
    rng.shuffle(questions)
    return Story(kind=kind, text=text, questions=tuple(questions))


def make_statements(rng: random.Random, sentences: Sequence[str]) -> TextWithQuestions:
    """State each fact once, at random places among the sentences."""
    lines, topics = list(sentences), _draw_topics(rng, _draw_count(rng, min(12, len(sentences))))
    for topic, value in topics:
        statement = topic.state(rng, value)
        lines.insert(rng.randrange(len(lines) + 1), statement)
    return _join(rng, lines), [_ask(rng, *topic) for topic in topics]


def make_noise(rng: random.Random, sentences: Sequence[str]) -> TextWithQuestions:
    """State facts among a few sentences that are repeated many times."""
    few = rng.sample(list(sentences), min(rng.randint(2, 5), len(sentences)))
    lines = [rng.choice(few) if rng.random() < 0.3 else few[i % len(few)] for i in range(len(sentences))]
    return make_statements(rng, lines)


def make_table(rng: random.Random, sentences: Sequence[str]) -> TextWithQuestions:
    """Place a table between the sentences: a row for each name, a column for each relation."""
    names = draw_distinct(rng, draw_subject, rng.randint(3, 10))
    columns = rng.sample(RELATIONS, rng.randint(1, 3))
    cells = {name: [column.value(rng) for column in columns] for name in names}
    bar = rng.choice((" | ", ", ", "\t", "; "))
    rows = [["name", *(column.what for column in columns)], *([name, *values] for name, values in cells.items())]
    questions = [question for name, values in cells.items() for question in _ask_row(rng, name, columns, values)]
    return _place_block(rng, sentences, "\n".join(map(bar.join, rows))), questions


def make_listing(rng: random.Random, sentences: Sequence[str]) -> TextWithQuestions:
    """Place named entries of a few lines each between the sentences."""
    names = draw_distinct(rng, draw_name, rng.randint(2, 6))
    columns = rng.sample(RELATIONS, rng.randint(1, 3))
    lines, questions = list[str](), list[Question]()
    for name in names:
        values = [column.value(rng) for column in columns]
        lines += [f"[{name}]", *(f"  {column.what}: {v}" for column, v in zip(columns, values, strict=True))]
        questions += _ask_row(rng, name, columns, values)
    return _place_block(rng, sentences, "\n".join(lines)), questions


def make_assignments(rng: random.Random, sentences: Sequence[str]) -> TextWithQuestions:
    """Place lines of a settings file or a program among the sentences."""
    form = rng.choice(ASSIGNED)
    names = [name.lower() for name in draw_distinct(rng, draw_name, rng.randint(2, min(10, len(sentences))))]
    values = {name: rng.choice(RELATIONS).value(rng) for name in names}
    lines = list(sentences)
    places = sorted((rng.randrange(len(lines) + 1) for _ in names), reverse=True)
    for place, (name, value) in zip(places, values.items(), strict=True):
        lines.insert(place, form.format(n=name, v=value))
    question = rng.choice(ASK_ASSIGNED)
    before, quote = form.split("{v}")[0].rstrip(' "'), '"' if '"' in form else ""
    questions = [
        Question(question=question.format(n=name), prefix=before.format(n=name), answer=f"{quote}{value}{quote}")
        for name, value in values.items()
    ]
    return "\n".join(lines), questions


def make_dialogue(rng: random.Random, sentences: Sequence[str]) -> TextWithQuestions:
    """Make the sentences a dialogue in which one speaker states a fact now and then."""
    teller, hearer = rng.sample(("Guest", "Host", "Caller", "Clerk", "Pupil", "Tutor"), 2)
    topics = _draw_topics(rng, _draw_count(rng, min(8, len(sentences))))
    lines = [f"{(teller, hearer)[i % 2]}: {sentence}" for i, sentence in enumerate(sentences)]
    for topic, value in topics:
        statement = topic.state(rng, value, TOLD)
        place = rng.randrange(len(lines) + 1)
        lines[place:place] = [f"{teller}: {statement}", f"{hearer}: {rng.choice(HEARD)}"]
    return "\n".join(lines), [_ask(rng, *topic) for topic in topics]


def make_quotations(rng: random.Random, sentences: Sequence[str]) -> TextWithQuestions:
    """Ask how sentences continue after their first words, so that every sentence matters a little."""
    questions = []
    for sentence in rng.sample(list(sentences), min(2, len(sentences))):
        words = sentence.split()
        half = len(words) // 2
        if half >= 4:
            prefix, answer = " ".join(words[:half]), " ".join(words[half : half + 10])
            questions.append(Question(question=rng.choice(QUOTE), prefix=prefix, answer=answer))
    return _join(rng, sentences), questions


KINDS: dict[str, tuple[Callable[[random.Random, Sequence[str]], TextWithQuestions], float]] = {
    "statements": (make_statements, 0.4),
    "noise": (make_noise, 0.15),
    "table": (make_table, 0.1),
    "assignments": (make_assignments, 0.1),
    "talk": (make_dialogue, 0.1),
    "listing": (make_listing, 0.1),
    "quotation": (make_quotations, 0.05),
}
"""Function and probability of each kind."""


def _draw_count(rng: random.Random, most: int) -> int:
    """Return a count from 1 to ``most``, uniform in its logarithm."""
    return int((most + 1) ** rng.random())


def _draw_topics(rng: random.Random, count: int) -> list[tuple[Topic, str]]:
    """Return topics of distinct subjects, each with a value."""
    subjects = draw_distinct(rng, draw_subject, count)
    return [(topic := Topic(who, rng.choice(RELATIONS)), topic.relation.value(rng)) for who in subjects]


def _ask(rng: random.Random, topic: Topic, value: str) -> Question:
    return Question(**topic.ask(rng), answer=value)


def _ask_row(rng: random.Random, name: str, columns: Sequence[Relation], values: Sequence[str]) -> list[Question]:
    return [_ask(rng, Topic(name, column), value) for column, value in zip(columns, values, strict=True)]


def _join(rng: random.Random, lines: Sequence[str]) -> str:
    return draw_weighted(rng, JOINTS).join(lines)


def _place_block(rng: random.Random, sentences: Sequence[str], block: str) -> str:
    place = rng.randrange(len(sentences) + 1)
    before, after = " ".join(sentences[:place]), " ".join(sentences[place:])
    return "\n\n".join(part for part in (before, block, after) if part)
