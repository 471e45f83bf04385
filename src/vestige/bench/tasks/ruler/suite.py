"""RULER (arXiv 2404.06654): thirteen tasks of any length, from its templates and constants.

Each family has a file: needles, variable tracking, counting words, questions over documents. This file has the dict of
their names. The context is the template up to the end of the haystack, so that it can be read before the question is
known; the answer prefix opens the reply. Differs from RULER for all: a haystack is the longest that fits the length,
where RULER grows it in coarse steps once for all samples; spaces around an answer prefix are left out.

``qa_1`` wants a SQuAD file and ``qa_2`` a HotpotQA file. All thirteen with one ``--qa`` file make both from that file.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice

from vestige.bench.sample import Sample
from vestige.bench.tasks import TaskSpec
from vestige.bench.tasks.fitting import SizedSample, fit, key, named_length
from vestige.bench.tasks.ruler import needles, qa, variable_tracking, word_counts


def _repeat(make: Callable[[TaskSpec, str], SizedSample]) -> Callable[[TaskSpec, str], Iterator[SizedSample]]:
    """Return a function that yields samples without end, made of a specification and a seed each."""

    def generate(spec: TaskSpec, name: str) -> Iterator[SizedSample]:
        return (make(spec, key(spec, f"ruler/{name}", index)) for index in count())

    return generate


PARTS: dict[str, Callable[[TaskSpec, str], Iterator[SizedSample]]] = {
    **{name: _repeat(partial(needles.make_sized_sample, form=form)) for name, form in needles.NEEDLES.items()},
    "vt": _repeat(variable_tracking.make_sized_sample),
    "cwe": _repeat(word_counts.make_common),
    "fwe": _repeat(word_counts.make_frequent),
    **dict.fromkeys(qa.WANTED, qa.generate),
}


def samples(spec: TaskSpec) -> list[Sample]:
    """Return samples of one part of RULER, or of all thirteen.

    Sample ``i`` of a part depends on seed, split, part, length and ``i``, not on the number of samples.

    Raises:
        InputError: An unknown part, no length, a length that even the smallest haystack exceeds, or texts missing.
    """
    names = spec.choose_parts("part of ruler", PARTS)
    named_length(spec, "ruler")
    return [
        fit(spec, sized, f"ruler/{name}", index)
        for name in names
        for index, sized in enumerate(islice(PARTS[name](spec, name), spec.num_samples))
    ]
