"""Samples as long as a length allows: a haystack can have any number of units, and the largest that fits is taken."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vestige.bench.sample import Sample, Turn
from vestige.bench.tasks import TaskSpec
from vestige.errors import InputError


@dataclass(frozen=True, kw_only=True)
class SizedSample:
    """A sample for every size of its haystack. All random choices are made, or follow from the size."""

    build: Callable[[int], Turn]
    """Makes the turn with a number of units (sentences, words, documents) of haystack; equal sizes give equal turns."""
    smallest: int
    largest: int
    """The size at which nothing is left to add; at least ``smallest``."""
    tags: Mapping[str, str | int | float] = field(default_factory=dict)


def named_length(spec: TaskSpec, task: str) -> int:
    """Return the length of a specification, or raise an InputError if it has none."""
    if spec.length is None:
        raise InputError(f"{task} needs --length, such as --length 4096")
    return spec.length


def key(spec: TaskSpec, task: str, index: int) -> str:
    """Return the seed of one sample; other seeds, splits, tasks, lengths and indices share no randomness with it."""
    return f"{spec.seed}/{spec.split}/{task}/{spec.length}/{index}"


def fit(spec: TaskSpec, sized: SizedSample, task: str, index: int) -> Sample:
    """Return the sample with the largest haystack that fits the length; one more unit would not fit.

    Raises:
        InputError: There is no length, or even the smallest haystack does not fit; the message has both numbers.
    """
    length = named_length(spec, task)
    size = largest(lambda n: spec.measure((sized.build(n),)), length, sized.smallest, sized.largest)
    if size is None:
        least = spec.measure((sized.build(sized.smallest),))
        raise InputError(f"{task} needs at least {least} tokens, but --length is {length}")
    return Sample(task=task, index=index, length=length, turns=(sized.build(size),), tags=sized.tags)


def largest(tokens: Callable[[int], int], limit: int, low: int, high: int) -> int | None:
    """Return a size from ``low`` to ``high`` that fits while the next one does not; None if not even ``low`` fits.

    Measuring is slow and tokens grow almost in proportion, so each guess extends the slope of the last two
    measurements. About six measurements are enough, whatever the length.
    """
    at_low = tokens(low)
    if at_low > limit:
        return None
    guess = low + 8
    while low < high:  # low fits; sizes above high do not, or do not exist
        n = min(max(guess, low + 1), high)
        at_n = tokens(n)
        slope = max((at_n - at_low) / (n - low), 0.01)
        if at_n <= limit:
            low, at_low = n, at_n
        else:
            high = n - 1
        guess = low + int((limit - at_low) / slope)
    return low
