"""RULER (arXiv 2404.06654): thirteen tasks of any length, written anew from its templates and constants.

Each family has a file: needles, variable tracking, counting words, questions over documents. Here is what they share.
The context is the template up to the end of the haystack, so that it can be read before the question is known; the
answer prefix opens the reply. Differs from RULER for all: a haystack is the longest that fits the length, where RULER
grows it in coarse steps once for all samples; spaces around an answer prefix are left out.

``qa_1`` wants a SQuAD file and ``qa_2`` a HotpotQA file. All thirteen with one ``--qa`` file make both from that file.
"""

from collections.abc import Callable, Iterator
from itertools import islice

from vestige.bench.sample import Sample
from vestige.bench.tasks import Order
from vestige.bench.tasks.fitting import Draft, fit, named_length
from vestige.bench.tasks.ruler import needles, qa, variable_tracking, word_counts
from vestige.errors import InputError, unknown_name_message

SAMPLES = 20
"""Samples of each part if none are asked for."""
PARTS: dict[str, Callable[[Order, str], Iterator[Draft]]] = {
    **dict.fromkeys(needles.NEEDLES, needles.drafts),
    "vt": variable_tracking.drafts,
    "cwe": word_counts.common,
    "fwe": word_counts.frequent,
    **dict.fromkeys(qa.WANTED, qa.drafts),
}


def samples(order: Order) -> list[Sample]:
    """Return samples of one part of RULER, or of all thirteen.

    Sample ``i`` of a part depends on seed, split, part, length and ``i``, not on how many are made.

    Raises:
        InputError: An unknown part, no length, a length that even the smallest haystack exceeds, or texts missing.
    """
    if order.part is not None and order.part not in PARTS:
        raise InputError(unknown_name_message("part of ruler", order.part, PARTS))
    named_length(order, "ruler")
    names = PARTS if order.part is None else [order.part]
    return [sample for name in names for sample in _part(order, name)]


def _part(order: Order, name: str) -> Iterator[Sample]:
    number = SAMPLES if order.samples is None else order.samples
    for index, draft in enumerate(islice(PARTS[name](order, name), number)):
        yield fit(order, draft, f"ruler/{name}", index)
