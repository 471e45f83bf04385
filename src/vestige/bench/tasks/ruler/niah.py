"""A needle in a haystack at several depths: at which depth does a method lose it?

The needle, the essays and the question are those of RULER's ``niah_single_2``: an adjective-noun pair has a number of
seven digits, so scores are exact. Samples take the depths in turn; run several lengths for a grid of depth and length.
"""

from itertools import cycle

from vestige.bench.sample import Sample
from vestige.bench.tasks import TaskSpec
from vestige.bench.tasks.fitting import fit, key, named_length
from vestige.bench.tasks.ruler.needles import NEEDLES, make_sized_sample
from vestige.errors import InputError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""From the beginning of the haystack to its end, in sentences; sample i takes the (i mod 5)-th."""


def samples(spec: TaskSpec) -> list[Sample]:
    """Return samples with one needle each, tagged with its depth.

    Raises:
        InputError: A part was named, there is no length or too short a one, or texts are missing.
    """
    if spec.part is not None:
        raise InputError(f"niah has no parts, got niah/{spec.part}")
    named_length(spec, "niah")
    made = []
    for index, depth in zip(range(spec.num_samples), cycle(DEPTHS), strict=False):
        sized = make_sized_sample(spec, key(spec, "niah", index), NEEDLES["niah_single_2"], depth)
        made.append(fit(spec, sized, "niah", index))
    return made
