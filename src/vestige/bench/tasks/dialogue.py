"""Dialogues over one cache: later turns ask for facts of earlier ones.

``retrieval``: the first turn states all facts, and every turn asks for another one. ``recall``: every turn brings more
text with facts of its own, and every turn after the first asks for a fact of an earlier one. An eviction precedes each
question, so the text of early turns is evicted again and again. Facts are RULER's needles in essays, so scores are
exact; the dialogue around them is ours.
"""

import random

from vestige.bench.sample import Sample, Turn
from vestige.bench.tasks import TaskSpec
from vestige.bench.tasks.fitting import key, largest, named_length
from vestige.bench.tasks.ruler.needles import DEPTHS, MAX_NEW_TOKENS, NEEDLES, draw_pairs, haystack, insert, needle_text
from vestige.errors import InputError

PARTS = ("retrieval", "recall")
TURNS = 4
_FORM = NEEDLES["niah_single_2"]
_OPENING = "Special magic numbers are hidden in what I tell you. Memorize them: I will ask for them in any turn.\n"
_MORE = "Here is more text, with more special magic numbers in it.\n"


def samples(order: TaskSpec) -> list[Sample]:
    """Return dialogues of one part, or of both; all turns together fit the length.

    Raises:
        InputError: The part is unknown, the length is missing or too short for any text, or texts are missing.
    """
    parts = order.choose_parts("part of dialogue", PARTS)
    return [_make_sample(order, part, index) for part in parts for index in range(order.num_samples)]


def _make_sample(order: TaskSpec, part: str, index: int) -> Sample:
    task, length = f"dialogue/{part}", named_length(order, "dialogue")
    rng = random.Random(key(order, task, index))
    values = draw_pairs(_FORM, TURNS if part == "retrieval" else 2 * TURNS, order, rng)
    facts = list(values)
    stated, queried = ([facts, *[[]] * (TURNS - 1)], facts) if part == "retrieval" else _plan_recall(facts, rng)
    depths = [sorted(rng.sample(DEPTHS, len(names))) for names in stated]
    sentences = haystack(_FORM, order, rng, taken=values)

    def build(size: int) -> tuple[Turn, ...]:
        """Return the turns, with ``size`` sentences in each that states facts."""
        texts = []
        for t, (names, places) in enumerate(zip(stated, depths, strict=True)):
            lines = [sentences[(t * size + i) % len(sentences)] for i in range(size)]
            needles = [needle_text(_FORM, name, values[name][0]) for name in names]
            texts.append(" ".join(insert(lines, needles, places)) if names else "")
        return tuple(
            _make_turn(order, (_MORE if t else _OPENING) + text if text else "", name, values[name][0])
            for t, (text, name) in enumerate(zip(texts, queried, strict=True))
        )

    size = largest(lambda n: order.measure(build(n)), length, 1, length)
    if size is None:
        raise InputError(f"{task} needs at least {order.measure(build(1))} tokens, but --length is {length}")
    return Sample(task=task, index=index, length=length, turns=build(size))


def _plan_recall(facts: list[str], rng: random.Random) -> tuple[list[list[str]], list[str]]:
    """Return the two facts that each turn states, and the fact that it asks for.

    The first turn asks for its own, the others for those of earlier turns, never twice.
    """
    stated = [facts[2 * t : 2 * t + 2] for t in range(TURNS)]
    queried = [rng.choice(stated[0])]
    for t in range(1, TURNS):
        queried.append(rng.choice([name for turn in stated[:t] for name in turn if name not in queried]))
    return stated, queried


def _make_turn(order: TaskSpec, context: str, name: str, value: str) -> Turn:
    return Turn(
        context=context,
        question=f"What is the special magic number for {name}?",
        answers=(value,),
        answer_prefix=f"The special magic number for {name} is",
        metric="string_match_all",
        max_new_tokens=order.reply_limit((value,), MAX_NEW_TOKENS // TURNS),
    )
