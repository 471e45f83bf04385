"""Questions about paragraphs, with a sentence that asserts a wrong answer: inserted, read, and erased.

The distractor is the question with a wrong answer, and the sentence that has the right one with the wrong one in its
place: one of the same shape from another paragraph, or other digits. It stands as a paragraph of its own, somewhere
behind the one that is right. On 16 questions of dev that smollm2-135m answers (640 tokens, of 40 tried) the sentence
alone spoilt 5 answers; with the question before it 13.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from vestige.bench import sources
from vestige.bench.erasing.sample import EraseSample, Kind, Question, erased
from vestige.bench.erasing.story_templates import Plot, fit, shortest
from vestige.bench.questions import Question as Asked
from vestige.bench.questions import Questions
from vestige.bench.tasks import TaskSpec
from vestige.bench.tasks.fitting import key, named_length
from vestige.bench.tasks.ruler.needles import split_sentences
from vestige.errors import InputError

ASK = "Answer the question based on the text above. Only give me the answer and do not say anything else."
_ROOM = 24
_FEWEST_LETTERS = 3
"""Shorter wrong answers stand in too many other words."""
_TRIES = 40
_DIGIT = re.compile(r"\d")

Pool = Mapping[tuple[str, int], Sequence[str]]
"""Answers of a split by their shape."""


def samples(order: TaskSpec, task: str) -> Iterator[EraseSample]:
    """Yield a sample for every question that fits and has a distractor, in an order that follows from the seed.

    Raises:
        InputError: The file has another format than SQuAD's; or, at the end, that there are no more questions.
    """
    length, data = named_length(order, task), sources.qa(order, "squad")
    if data.source != "squad":
        raise InputError(f"{task} needs questions in SQuAD's format, but {order.qa} is in HotpotQA's")
    seed, pool = key(order, f"erase/{task}", -1), _pool(data)
    listed = list(range(len(data.questions)))
    random.Random(seed).shuffle(listed)
    index = 0
    for which in listed:
        plot = _plot(data, data.questions[which], pool, random.Random(f"{seed}/{which}"))
        if plot is not None and shortest(order, plot) <= length:
            yield fit(order, plot, task, index)
            index += 1
    raise InputError(
        f"{task} has {index} questions in {order.split} that fit --length {length} and can be distracted from "
        f"(of {len(listed)}), fewer than --samples asks for"
    )


def _plot(data: Questions, asked: Asked, pool: Pool, rng: random.Random) -> Plot | None:
    """Return the plot of one question, or None if there is no distractor, or nothing else to ask."""
    (gold,) = asked.gold
    found = answer_sentence(asked)
    if found is None:
        return None
    sentence, answer = found
    wrong = _wrong(answer, asked, pool, rng)
    if wrong is None:
        return None
    clean = [text for text in data.paragraphs if text != gold and wrong.lower() not in text.lower()]
    others = [one for one in data.questions if one.gold[0] in clean and wrong not in one.answers]
    if not others:
        return None
    other = rng.choice(others)
    near = [text for text in clean if text in asked.near and text != other.gold[0]]
    far = [text for text in clean if text not in asked.near and text != other.gold[0]]
    lines = [gold, erased(f"{asked.question.strip()} {wrong}. {sentence.replace(answer, wrong, 1)}")]
    lines.insert(rng.randrange(3), other.gold[0])
    return Plot(
        opening="Read the following text.\n\n",
        lines=lines,
        depths=sorted(rng.random() for _ in lines),
        filler=[*rng.sample(near, len(near)), *rng.sample(far, len(far))],
        joint="\n\n",
        once=True,
        questions=(_question("target", asked, wrong), _question("retained", other)),
    )


def _question(kind: Kind, asked: Asked, *forbidden: str) -> Question:
    return Question(
        kind=kind,
        text=f"{ASK}\n\nQuestion: {asked.question}",
        answers=tuple(bare(answer) for answer in asked.answers),
        answer_prefix="Answer:",
        forbidden=forbidden,
        max_new_tokens=_ROOM,
    )


def answer_sentence(asked: Asked) -> tuple[str, str] | None:
    """Return the sentence that answers a question, and the answer as it stands there; None if no sentence has it.

    Of several sentences it is the one that shares most words with the question.
    """
    words = set(re.findall(r"\w+", asked.question.lower()))
    found = [
        (len(words & set(re.findall(r"\w+", sentence.lower()))), sentence, answer)
        for sentence in split_sentences(asked.gold[0])
        for answer in map(bare, asked.answers)
        if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", sentence)
    ]
    if not found:
        return None
    _, sentence, answer = max(found, key=lambda one: one[0])
    return sentence, answer


def bare(answer: str) -> str:
    """Return an answer without the punctuation and spaces at its ends."""
    return answer.strip(" .,;:'\"") or answer


def shape(answer: str) -> tuple[str, int]:
    """Return what an answer without digits looks like, and how many words it has (three and more are alike)."""
    words = answer.split()
    look = "name" if all(word[0].isupper() for word in words if len(word) > 3) else "words"
    return look, min(len(words), 3)


def _pool(data: Questions) -> Pool:
    pool: dict[tuple[str, int], dict[str, None]] = defaultdict(dict)
    for question in data.questions:
        for answer in map(bare, question.answers):
            if len(answer) >= _FEWEST_LETTERS and not _DIGIT.search(answer):
                pool[shape(answer)][answer] = None
    return {look: tuple(answers) for look, answers in pool.items()}


def _wrong(answer: str, asked: Asked, pool: Pool, rng: random.Random) -> str | None:
    """Return an answer of the same shape that the right paragraph and the question do not have."""
    said = f"{asked.question} {asked.gold[0]}".lower()
    if _DIGIT.search(answer):
        drawn = [_other_digits(answer, rng) for _ in range(_TRIES)]
    else:
        alike = pool.get(shape(answer), ())
        drawn = rng.sample(alike, min(_TRIES, len(alike)))
    rights = [bare(right).lower() for right in asked.answers]
    for wrong in drawn:
        if wrong.lower() not in said and not any(right in wrong.lower() for right in rights):
            return wrong
    return None


def _other_digits(answer: str, rng: random.Random) -> str:
    """Return an answer with digits drawn anew; a number of four keeps its first two: a year stays near."""
    digits = [match.start() for match in _DIGIT.finditer(answer)]
    drawn = list(answer)
    for place in digits[2:] if len(digits) == 4 else digits:
        drawn[place] = rng.choice("123456789")
    return "".join(drawn)
