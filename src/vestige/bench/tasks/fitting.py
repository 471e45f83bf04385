"""Samples as long as fit: a draft can be built with any number of units of haystack, and the largest is taken."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vestige.bench.sample import Sample, Turn
from vestige.bench.tasks import Order
from vestige.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A sample whose haystack has not been sized yet. All random choices are made, or follow from the size."""

    build: Callable[[int], Turn]
    """The turn with so many units (sentences, words, documents) of haystack; equal sizes give equal turns."""
    smallest: int
    largest: int
    """The size at which nothing is left to add; at least ``smallest``."""
    tags: Mapping[str, str | int | float] = field(default_factory=dict)


def named_length(order: Order, task: str) -> int:
    """Return the length of an order, or raise an InputError if it has none."""
    if order.length is None:
        raise InputError(f"{task} needs --length, such as --length 4096")
    return order.length


def key(order: Order, task: str, index: int) -> str:
    """Return what seeds one sample: samples of other seeds, splits, tasks, lengths and indices share no randomness."""
    return f"{order.seed}/{order.split}/{task}/{order.length}/{index}"


def fit(order: Order, draft: Draft, task: str, index: int) -> Sample:
    """Return the sample with the largest haystack that fits the order's length; one more unit would not fit.

    Raises:
        InputError: The order has no length, or even the smallest haystack does not fit; the message has both numbers.
    """
    length = named_length(order, task)
    size = largest(lambda n: order.measure((draft.build(n),)), length, draft.smallest, draft.largest)
    if size is None:
        least = order.measure((draft.build(draft.smallest),))
        raise InputError(f"{task} needs at least {least} tokens, but --length is {length}")
    return Sample(task=task, index=index, length=length, turns=(draft.build(size),), tags=draft.tags)


def largest(tokens: Callable[[int], int], limit: int, low: int, high: int) -> int | None:
    """Return a size from ``low`` to ``high`` that fits while the next one does not; None if not even ``low`` fits.

    Measuring is dear and tokens grow almost in proportion, so each guess extends the slope of the last two
    measurements: about six of them are taken, however long the text.
    """
    at_low = tokens(low)
    if at_low > limit:
        return None
    guess = low + 8
    while low < high:  # low fits; what is above high does not, or does not exist
        n = min(max(guess, low + 1), high)
        at_n = tokens(n)
        slope = max((at_n - at_low) / (n - low), 0.01)
        if at_n <= limit:
            low, at_low = n, at_n
        else:
            high = n - 1
        guess = low + int((limit - at_low) / slope)
    return low
