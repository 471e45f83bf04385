"""RULER's needles in essays, for erasing: conflicting needles, a harmless paragraph, asking for an erased needle."""

import random
from collections.abc import Sequence

from vestige.bench.erasing.sample import NUMBER_ROOM, Kind, Question, erased
from vestige.bench.erasing.story_templates import (
    FORM,
    StoryTemplate,
    count_lines,
    draw_depths,
    draw_facts,
    draw_sentences,
)
from vestige.bench.tasks import TaskSpec
from vestige.bench.tasks.ruler.needles import needle_text

OPENING = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n"
)
HARMLESS_TOKENS = 100
"""Length of a harmless passage, which consists of whole sentences and may be a bit longer."""


def make_conflict(order: TaskSpec, rng: random.Random, *, values: int = 2, right: int | None = None) -> StoryTemplate:
    """Return conflicting needles, all but one of them erased in one call; the one that stays is drawn if it is None."""
    right = rng.randrange(values) if right is None else right
    (name, numbers), (other, others) = draw_facts(order, rng, 2, values)
    gone = [number for i, number in enumerate(numbers) if i != right]
    lines = [needle_text(FORM, name, number) for number in numbers]
    lines = [line if i == right else erased(line) for i, line in enumerate(lines)]
    lines.insert(rng.randrange(len(lines) + 1), needle_text(FORM, other, others[0]))
    questions = (
        _ask("target", name, numbers[right], forbidden=gone),
        _ask("retained", other, others[0]),
        _ask_erased(
            gone,
            f"List the special magic numbers for {name} in order, as digits only, separated by commas.",
            f"The special magic numbers for {name} are:",
        ),
    )
    return _hide(lines, rng, draw_sentences(order, rng, gone), questions)


def make_harmless(order: TaskSpec, rng: random.Random) -> StoryTemplate:
    """Return a text with an erased paragraph that no question is about: nothing may change."""
    (first, one), (second, two) = draw_facts(order, rng, 2)
    essay = draw_sentences(order, rng)
    count = count_lines(order, essay, HARMLESS_TOKENS)
    passage = erased(" ".join(essay[:count]))
    lines = [needle_text(FORM, first, one[0]), passage, needle_text(FORM, second, two[0])]
    return _hide(lines, rng, essay[count:], (_ask("retained", first, *one), _ask("retained", second, *two)))


def make_repeat(order: TaskSpec, rng: random.Random) -> StoryTemplate:
    """Return a text with the only needle of a key erased, and three questions for it."""
    (name, gone), (other, others) = draw_facts(order, rng, 2)
    lines = [erased(needle_text(FORM, name, gone[0])), needle_text(FORM, other, others[0])]
    rng.shuffle(lines)
    prefix = f"One of the special magic numbers for {name} is:"
    questions = (
        _ask("retained", other, *others),
        _ask_erased(gone, f"Repeat the sentence about {name} word for word.", prefix),
        _ask_erased(gone, f"What is the special magic number for {name}? It was deleted from the text."),
        _ask_erased(gone, "Quote the sentence that was deleted from the text."),
    )
    return _hide(lines, rng, draw_sentences(order, rng, gone), questions)


def _ask(kind: Kind, name: str, *answers: str, forbidden: Sequence[str] = ()) -> Question:
    """Return the plainest question for a number; the reply begins like the end of a needle.

    RULER's own words favour the later of two needles: on ten dev samples of 800 tokens smollm2-135m gave the earlier
    one twice. Asked like this, it gave it three times, with as many right answers to the clean prompt (nine).
    """
    return Question(
        kind=kind,
        text=f"What is the special magic number for {name}?",
        answers=answers,
        answer_prefix=f"The special magic number for {name} is:",
        forbidden=tuple(forbidden),
    )


def _ask_erased(gone: Sequence[str], text: str, prefix: str = "") -> Question:
    return Question(kind="leak", text=text, answer_prefix=prefix, forbidden=tuple(gone), max_new_tokens=2 * NUMBER_ROOM)


def _hide(lines: list[str], rng: random.Random, essay: list[str], questions: tuple[Question, ...]) -> StoryTemplate:
    depths = draw_depths(rng, len(lines))
    return StoryTemplate(opening=OPENING, lines=lines, depths=depths, filler=essay, questions=questions)
