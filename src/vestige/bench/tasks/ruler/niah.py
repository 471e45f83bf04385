"""A needle in a haystack, depth by depth: where in the text does a method lose things?

The needle, the essays and the question are those of RULER's ``niah_single_2``: an adjective-noun pair has a number of
seven digits, so scores are exact. Depths take turns; run several lengths for the grid of depth and length.
"""

from vestige.bench.sample import Sample
from vestige.bench.tasks import Order
from vestige.bench.tasks.fitting import fit, key, named_length
from vestige.bench.tasks.ruler.needles import NEEDLES, draft
from vestige.errors import InputError

SAMPLES = 20
"""Samples if none are asked for."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""From the beginning of the haystack to its end, in sentences; sample i takes the (i mod 5)-th."""


def samples(order: Order) -> list[Sample]:
    """Return samples with one needle each, tagged with its depth.

    Raises:
        InputError: A part was named, there is no length or too short a one, or texts are missing.
    """
    if order.part is not None:
        raise InputError(f"niah has no parts, got niah/{order.part}")
    named_length(order, "niah")
    return [_sample(order, index) for index in range(SAMPLES if order.samples is None else order.samples)]


def _sample(order: Order, index: int) -> Sample:
    depth = DEPTHS[index % len(DEPTHS)]
    return fit(order, draft(order, NEEDLES["niah_single_2"], key(order, "niah", index), depth), "niah", index)
