"""Needles in haystacks: eight of RULER's tasks, and the samples of the ``niah`` grid.

A needle gives a key its value: "One of the special magic numbers for red-fox is: 1234567." Values are numbers of
seven digits or UUIDs; keys are adjective-noun pairs or UUIDs. The haystack is one repeated line (noise), essays, or
needles of other keys.

Source: RULER, arXiv 2404.06654, its templates and constants. Differs: essays begin at a random sentence and wrap
around, where RULER shows every sample the same beginning; they grow by sentences, found by punctuation; keys and values
of a sample are distinct.
"""

import random
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vestige.bench.sample import Turn
from vestige.bench.tasks import TaskSpec, sources
from vestige.bench.tasks.fitting import SizedSample, named_length

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = tuple(round(100 * i / 39) / 100 for i in range(40))
"""Depths of needles in an essay: forty even steps, rounded to percent."""
MAX_NEW_TOKENS = 128
_SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["')\]]))\s(?=["'(\[]?[A-Z0-9])""")
_LONGEST_SENTENCE = 60
"""Words of a sentence at most; longer ones are cut."""
_SHORTEST_NEEDLE = 8
"""Tokens of a needle at least."""

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True, kw_only=True)
class Needles:
    """One way of hiding needles; RULER's words for it are type_haystack, num_needle_k and so on."""

    haystack: Literal["noise", "essay", "needle"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    """Per key."""
    num_queries: int = 1
    """Keys in the question."""

    @property
    def single(self) -> bool:
        """Whether the question is about one value."""
        return self.num_queries * self.num_values == 1


NEEDLES: dict[str, Needles] = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(haystack="essay"),
    "niah_single_3": Needles(haystack="essay", values="uuids"),
    "niah_multikey_1": Needles(haystack="essay", num_keys=4),
    "niah_multikey_2": Needles(haystack="needle"),
    "niah_multikey_3": Needles(haystack="needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles(haystack="essay", num_values=4),
    "niah_multiquery": Needles(haystack="essay", num_keys=4, num_queries=4),
}


def make_sized_sample(spec: TaskSpec, seed: str, form: Needles, depth: float | None = None) -> SizedSample:
    """Return one needle sample; the depth of a single needle among noise or essays is a tag.

    The depth is from 0 (beginning) to 1 (end); None draws it and rounds its tag.
    """
    rng = random.Random(seed)
    hidden = draw_pairs(form, form.num_keys, spec, rng)
    needles = [needle_text(form, name, value) for name, values in hidden.items() for value in values]
    rng.shuffle(needles)
    queried = rng.sample(list(hidden), form.num_queries)
    depths = [depth] if depth is not None else _depths(form, len(needles), rng)
    lines = haystack(form, spec, rng, taken=hidden)

    def build(size: int) -> Turn:
        pieces = insert([lines[i % len(lines)] for i in range(size)], needles, depths)
        text = (" " if form.haystack == "essay" else "\n").join(pieces)
        return _turn(form, text, queried, [value for name in queried for value in hidden[name]], spec)

    largest = len(lines) if form.haystack == "needle" else named_length(spec, "a needle task")
    shown = depths[0] if depth is not None else round(depths[0], 1)
    alone = len(needles) == 1 and form.haystack != "needle"
    return SizedSample(build=build, smallest=1, largest=largest, tags={"depth": shown} if alone else {})


def draw_pairs(form: Needles, number: int, spec: TaskSpec, rng: random.Random) -> dict[str, list[str]]:
    """Return distinct keys with their distinct values."""
    names = _draw(form.keys, number, spec, rng)
    values = _draw(form.values, number * form.num_values, spec, rng)
    return {name: values[i * form.num_values : (i + 1) * form.num_values] for i, name in enumerate(names)}


def _draw(kind: Kind, number: int, spec: TaskSpec, rng: random.Random) -> list[str]:
    if kind == "uuids":
        return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(number)]
    if kind == "numbers":
        return [str(value) for value in rng.sample(range(1_000_000, 10_000_000), number)]
    listed = sources.words(spec.split)
    drawn = rng.sample(range(len(listed.adjectives) * len(listed.nouns)), number)
    splits = (divmod(i, len(listed.nouns)) for i in drawn)
    return [f"{listed.adjectives[a]}-{listed.nouns[n]}" for a, n in splits]


def needle_text(form: Needles, name: str, value: str) -> str:
    """Return the sentence that gives a key its value."""
    return f"One of the special magic {form.values} for {name} is: {value}."


def _depths(form: Needles, number: int, rng: random.Random) -> list[float]:
    """Return the depths of the needles, ascending: even steps in essays, anywhere before the last line otherwise."""
    if form.haystack == "essay":
        return sorted(rng.sample(DEPTHS, number))
    return sorted(rng.random() for _ in range(number))


def haystack(form: Needles, spec: TaskSpec, rng: random.Random, taken: dict[str, list[str]]) -> Sequence[str]:
    """Return the haystack's lines or sentences; noise and essays may be repeated, other needles may not."""
    if form.haystack == "noise":
        return (NOISE,)
    if form.haystack == "needle":
        number = named_length(spec, "a needle task") // _SHORTEST_NEEDLE + 1
        others = draw_pairs(form, number, spec, rng)
        used = {value for values in taken.values() for value in values}
        pairs = [(name, values[0]) for name, values in others.items() if name not in taken and values[0] not in used]
        return [needle_text(form, name, value) for name, value in pairs]
    sentences = [sentence for text in sources.essays(spec) for sentence in split_sentences(text)]
    first = rng.randrange(len(sentences))
    return sentences[first:] + sentences[:first]


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text in order, white space made single; one of over 60 words is cut."""
    split = (sentence.split(" ") for sentence in _SENTENCE_END.split(" ".join(text.split())) if sentence)
    return [" ".join(w[i : i + _LONGEST_SENTENCE]) for w in split for i in range(0, len(w), _LONGEST_SENTENCE)]


def insert(lines: list[str], needles: list[str], depths: list[float]) -> list[str]:
    """Return the lines with each needle at its depth, in order."""
    places = [int(len(lines) * depth) for depth in depths]
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: -pair[0]):
        lines.insert(place, needle)
    return lines


def _turn(form: Needles, text: str, queried: list[str], answers: list[str], spec: TaskSpec) -> Turn:
    """Return the turn with RULER's words around a haystack."""
    names = queried[0] if len(queried) == 1 else ", ".join(queried[:-1]) + ", and " + queried[-1]
    kind = form.values[:-1] if form.single else form.values
    opening = f"A special magic {kind} is" if form.single else f"Some special magic {kind} are"
    what, verb = ("What is", "is") if form.single else ("What are all", "are")
    return Turn(
        context=f"{opening} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n{text}",
        question=f"{what} the special magic {kind} for {names} mentioned in the provided text?",
        answers=tuple(answers),
        answer_prefix=f"The special magic {kind} for {names} mentioned in the provided text {verb}",
        metric="string_match_all",
        max_new_tokens=spec.reply_limit(answers, MAX_NEW_TOKENS, every=True),
    )
