"""Size a template, lines placed in filler that can grow, to the longest sample that fits."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from vestige.bench.erasing.sample import EraseSample, Question, unmarked
from vestige.bench.sample import Turn
from vestige.bench.tasks import TaskSpec
from vestige.bench.tasks.fitting import key, largest, named_length
from vestige.bench.tasks.ruler.needles import DEPTHS, NEEDLES, draw_pairs, haystack
from vestige.errors import InputError

FORM = NEEDLES["niah_single_2"]
"""Needles in essays: keys of an adjective and a noun, numbers of seven digits."""


@dataclass(frozen=True, kw_only=True)
class StoryTemplate:
    """A sample whose filler has no size yet.

    Args:
        opening: Stands before everything else.
        lines: Planted lines, in order; passages to erase are marked (``sample.erased``).
        depths: Place of each line among the filler, from 0 to 1, ascending.
        filler: Pieces that make up the rest; they repeat, unless ``once``.
        questions: Asked after the erase.
        joint: Separator of lines and pieces of filler.
        once: Whether each piece of filler occurs at most once.
        tags: As in samples.
    """

    opening: str
    lines: Sequence[str]
    depths: Sequence[float]
    filler: Sequence[str]
    questions: tuple[Question, ...]
    joint: str = " "
    once: bool = False
    tags: Mapping[str, str | int | float] = field(default_factory=dict)

    def text(self, size: int) -> str:
        """Return the marked text with ``size`` pieces of filler."""
        pieces = [self.filler[i % len(self.filler)] for i in range(size)]
        for line, depth in reversed(list(zip(self.lines, self.depths, strict=True))):
            pieces.insert(int(size * depth), line)
        return self.opening + self.joint.join(pieces)


Maker = Callable[[TaskSpec, str], Iterator[EraseSample]]
"""Yields the samples of a task, by an order and the task's name, without end or until texts run out."""


def make_each(make_template: Callable[[TaskSpec, random.Random], StoryTemplate]) -> Maker:
    """Return the maker that draws every sample on its own: sample 7 does not depend on the number of samples."""

    def make(order: TaskSpec, task: str) -> Iterator[EraseSample]:
        for index in count():
            rng = random.Random(key(order, f"erase/{task}", index))
            yield fit(order, make_template(order, rng), task, index)

    return make


def fit(order: TaskSpec, template: StoryTemplate, task: str, index: int) -> EraseSample:
    """Return the sample with the most filler that fits the order's length.

    Raises:
        InputError: There is no length, or even the shortest text does not fit; the message has both numbers.
    """
    length, measure = named_length(order, task), make_measure(order, template)
    size = largest(measure, length, 1, len(template.filler) if template.once else length)
    if size is None:
        raise InputError(f"{task} needs at least {measure(1)} tokens, but --length is {length}")
    context, passages = unmarked(template.text(size))
    return EraseSample(
        task=task,
        index=index,
        length=length,
        context=context,
        passages=passages,
        questions=template.questions,
        tags=template.tags,
    )


def make_measure(order: TaskSpec, template: StoryTemplate) -> Callable[[int], int]:
    """Return the function from a size to the tokens of the sample with its longest question."""
    longest = max(template.questions, key=lambda question: order.measure((as_turn("", question),)))
    return lambda size: order.measure((as_turn(unmarked(template.text(size))[0], longest),))


def as_turn(context: str, question: Question) -> Turn:
    """Return a context and one question as a turn of the other benchmarks."""
    return Turn(
        context=context,
        question=question.text,
        answers=question.answers,
        answer_prefix=question.answer_prefix,
        max_new_tokens=question.max_new_tokens,
    )


def draw_depths(rng: random.Random, number: int) -> list[float]:
    """Return distinct depths, ascending."""
    return sorted(rng.sample(DEPTHS, number))


def draw_facts(order: TaskSpec, rng: random.Random, keys: int, values: int = 1) -> list[tuple[str, list[str]]]:
    """Return distinct keys, each with distinct numbers."""
    drawn = draw_pairs(FORM, keys * values, order, rng)
    names, numbers = list(drawn), [numbers[0] for numbers in drawn.values()]
    return [(names[i], numbers[i * values : (i + 1) * values]) for i in range(keys)]


def draw_sentences(order: TaskSpec, rng: random.Random, avoid: Sequence[str] = ()) -> list[str]:
    """Return the essays' sentences from a random one on, without those that contain a word of ``avoid``."""
    unwanted = [word.lower() for word in avoid]
    sentences = haystack(FORM, order, rng, taken={})
    return [sentence for sentence in sentences if not any(word in sentence.lower() for word in unwanted)]


def count_lines(order: TaskSpec, lines: Sequence[str], tokens: int) -> int:
    """Return the number of lines that, joined by spaces, reach ``tokens``.

    Raises:
        InputError: All of them together are shorter.
    """
    for number in range(len(lines) + 1):
        if order.count(" ".join(lines[:number])) >= tokens:
            return number
    raise InputError(f"the essays of {order.split} are too short: a passage of {tokens} tokens is needed")


def group_lines(lines: Sequence[str], size: int) -> list[str]:
    """Return the lines in groups of ``size``, each joined by spaces."""
    return [" ".join(lines[i : i + size]) for i in range(0, len(lines), size)]
