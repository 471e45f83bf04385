"""Several turns over one cache: is what was told early still there when it is asked for later?

``retrieval``: the first turn tells all facts, and every turn asks for another one. ``recall``: every turn brings more
text with facts of its own, and every turn after the first asks for a fact that an earlier one told. Room is made
before each question, so the text of early turns is evicted again and again. Facts are RULER's needles in essays, so
scores are exact; the conversation around them is ours.
"""

import random
from dataclasses import dataclass

from vestige.bench.sample import Sample, Turn
from vestige.bench.tasks import TaskSpec
from vestige.bench.tasks.fitting import key, largest, named_length
from vestige.bench.tasks.ruler.needles import DEPTHS, MAX_NEW_TOKENS, NEEDLES, draw_pairs, haystack, insert, needle_text
from vestige.errors import InputError, unknown_name_message

PARTS = ("retrieval", "recall")
SAMPLES = 20
"""Samples of each part if none are asked for."""
TURNS = 4
_FORM = NEEDLES["niah_single_2"]
_OPENING = "Special magic numbers are hidden in what I tell you. Memorize them: I will ask for them in any turn.\n"
_MORE = "Here is more text, with more special magic numbers in it.\n"


@dataclass(frozen=True)
class _Plan:
    """Which facts each turn tells, and which one it asks for."""

    told: tuple[tuple[str, ...], ...]
    asked: tuple[str, ...]


def samples(order: TaskSpec) -> list[Sample]:
    """Return conversations of one part, or of both; all turns together fit the length.

    Raises:
        InputError: An unknown part, no length, a length that even the shortest texts exceed, or texts missing.
    """
    if order.part is not None and order.part not in PARTS:
        raise InputError(unknown_name_message("part of dialogue", order.part, PARTS))
    number = SAMPLES if order.samples is None else order.samples
    parts = PARTS if order.part is None else (order.part,)
    return [_sample(order, part, index) for part in parts for index in range(number)]


def _sample(order: TaskSpec, part: str, index: int) -> Sample:
    task, length = f"dialogue/{part}", named_length(order, "dialogue")
    rng = random.Random(key(order, task, index))
    values = draw_pairs(_FORM, TURNS if part == "retrieval" else 2 * TURNS, order, rng)
    plan = _retrieval(list(values)) if part == "retrieval" else _recall(list(values), rng)
    depths = [sorted(rng.sample(DEPTHS, len(names))) for names in plan.told]
    sentences = haystack(_FORM, order, rng, taken=values)

    def build(size: int) -> tuple[Turn, ...]:
        """Return the turns with so many sentences in each that tells something."""
        texts = []
        for t, (names, places) in enumerate(zip(plan.told, depths, strict=True)):
            lines = [sentences[(t * size + i) % len(sentences)] for i in range(size)]
            needles = [needle_text(_FORM, name, values[name][0]) for name in names]
            texts.append(" ".join(insert(lines, needles, places)) if names else "")
        return tuple(
            _turn(order, (_MORE if t else _OPENING) + text if text else "", name, values[name][0])
            for t, (text, name) in enumerate(zip(texts, plan.asked, strict=True))
        )

    size = largest(lambda n: order.measure(build(n)), length, 1, length)
    if size is None:
        raise InputError(f"{task} needs at least {order.measure(build(1))} tokens, but --length is {length}")
    return Sample(task=task, index=index, length=length, turns=build(size))


def _retrieval(names: list[str]) -> _Plan:
    return _Plan(told=(tuple(names), *[()] * (TURNS - 1)), asked=tuple(names))


def _recall(names: list[str], rng: random.Random) -> _Plan:
    """Two facts a turn; the first turn asks for one of its own, the others for one of earlier turns, never twice."""
    told = tuple((names[2 * t], names[2 * t + 1]) for t in range(TURNS))
    asked = [rng.choice(told[0])]
    for t in range(1, TURNS):
        asked.append(rng.choice([name for turn in told[:t] for name in turn if name not in asked]))
    return _Plan(told=told, asked=tuple(asked))


def _turn(order: TaskSpec, context: str, name: str, value: str) -> Turn:
    return Turn(
        context=context,
        question=f"What is the special magic number for {name}?",
        answers=(value,),
        answer_prefix=f"The special magic number for {name} is",
        metric="string_match_all",
        max_new_tokens=order.reply_limit((value,), MAX_NEW_TOKENS // TURNS),
    )
