"""From a plot, lines that stand somewhere in a filler, to a sample that is as long as fits."""

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

_FORM = NEEDLES["niah_single_2"]  # essays, keys of an adjective and a noun, numbers of seven digits


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A sample whose filler has not been sized yet.

    Args:
        opening: Stands before everything.
        lines: In the order in which they stand; passages to erase are marked (``sample.erased``).
        depths: Where each line stands among the filler, from 0 to 1, ascending.
        filler: What grows; it goes round, unless ``once``.
        questions: Asked afterwards.
        joint: Between lines and pieces of filler.
        once: Whether each piece of filler stands once at most.
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
        """Return the marked text with so many pieces of filler."""
        pieces = [self.filler[i % len(self.filler)] for i in range(size)]
        for line, depth in reversed(list(zip(self.lines, self.depths, strict=True))):
            pieces.insert(int(size * depth), line)
        return self.opening + self.joint.join(pieces)


Maker = Callable[[TaskSpec, str], Iterator[EraseSample]]
"""From an order and the name of a task to its samples, one after the other and without end, or until texts run out."""


def each(plot: Callable[[TaskSpec, random.Random], Plot]) -> Maker:
    """Return the maker whose every sample is drawn on its own: sample 7 does not depend on how many are made."""

    def make(order: TaskSpec, task: str) -> Iterator[EraseSample]:
        for index in count():
            yield fit(order, plot(order, seeded(order, task, index)), task, index)

    return make


def seeded(order: TaskSpec, task: str, index: int) -> random.Random:
    """Return what draws one sample: it follows from seed, split, task, length and index alone."""
    return random.Random(key(order, f"erase/{task}", index))


def fit(order: TaskSpec, plot: Plot, task: str, index: int) -> EraseSample:
    """Return the sample with the most filler that fits the order's length.

    Raises:
        InputError: No length, or even the shortest text does not fit; the message has both numbers.
    """
    length, measure = named_length(order, task), _measured(order, plot)
    size = largest(measure, length, 1, len(plot.filler) if plot.once else length)
    if size is None:
        raise InputError(f"{task} needs at least {measure(1)} tokens, but --length is {length}")
    context, passages = unmarked(plot.text(size))
    return EraseSample(
        task=task,
        index=index,
        length=length,
        context=context,
        passages=passages,
        questions=plot.questions,
        tags=plot.tags,
    )


def shortest(order: TaskSpec, plot: Plot) -> int:
    """Return the tokens of the sample with the least filler."""
    return _measured(order, plot)(1)


def _measured(order: TaskSpec, plot: Plot) -> Callable[[int], int]:
    """Return the function from a size to tokens, of the question that takes most."""
    widest = max(plot.questions, key=lambda question: order.measure((as_turn("", question),)))
    return lambda size: order.measure((as_turn(unmarked(plot.text(size))[0], widest),))


def as_turn(context: str, question: Question) -> Turn:
    """Return a context and one question as the rest of the benchmark has them."""
    return Turn(
        context=context,
        question=question.text,
        answers=question.answers,
        answer_prefix=question.answer_prefix,
        max_new_tokens=question.max_new_tokens,
    )


def depths(rng: random.Random, number: int) -> list[float]:
    """Return where lines stand, ascending, each elsewhere."""
    return sorted(rng.sample(DEPTHS, number))


def facts(order: TaskSpec, rng: random.Random, keys: int, values: int = 1) -> list[tuple[str, list[str]]]:
    """Return distinct keys, each with distinct numbers."""
    drawn = draw_pairs(_FORM, keys * values, order, rng)
    names, numbers = list(drawn), [numbers[0] for numbers in drawn.values()]
    return [(names[i], numbers[i * values : (i + 1) * values]) for i in range(keys)]


def sentences(order: TaskSpec, rng: random.Random, avoid: Sequence[str] = ()) -> list[str]:
    """Return the essays' sentences from a random one on, without those that say what must not be said elsewhere."""
    unwanted = [word.lower() for word in avoid]
    return [one for one in haystack(_FORM, order, rng, taken={}) if not any(word in one.lower() for word in unwanted)]


def reaching(order: TaskSpec, lines: Sequence[str], tokens: int) -> int:
    """Return how many lines, joined by spaces, reach so many tokens.

    Raises:
        InputError: All of them do not.
    """
    for number in range(len(lines) + 1):
        if order.count(" ".join(lines[:number])) >= tokens:
            return number
    raise InputError(f"the essays of {order.split} are too short: a passage of {tokens} tokens is needed")


def grouped(lines: Sequence[str], size: int) -> list[str]:
    """Return lines joined by so many, in order."""
    return [" ".join(lines[i : i + size]) for i in range(0, len(lines), size)]
