"""Questions about paragraphs, with an erased distractor: a paragraph that asserts a wrong answer.

The distractor is the question with a wrong answer, and the answering sentence with the wrong answer in place of the
right one. The wrong answer has the same shape and comes from another paragraph, or has other digits. The distractor
stands somewhere after the right paragraph. On 16 dev questions that smollm2-135m answers (640 tokens, of 40 tried) the
sentence alone spoilt 5 answers; with the question before it 13.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from vestige.bench.erasing.sample import EraseSample, Kind, Question, erased
from vestige.bench.erasing.story_templates import StoryTemplate, fit, make_measure
from vestige.bench.tasks import TaskSpec, sources
from vestige.bench.tasks.fitting import key, named_length
from vestige.bench.tasks.questions import Question as SourceQuestion
from vestige.bench.tasks.questions import Questions
from vestige.bench.tasks.ruler.needles import split_sentences
from vestige.errors import InputError

ASK = "Answer the question based on the text above. Only give me the answer and do not say anything else."
_ROOM = 24
_FEWEST_LETTERS = 3
"""Shorter wrong answers occur within too many other words."""
_TRIES = 40
_DIGIT = re.compile(r"\d")

Pool = Mapping[tuple[str, int], Sequence[str]]
"""Answers of a split, by their shape."""


def make_samples(order: TaskSpec, task: str) -> Iterator[EraseSample]:
    """Yield a sample for every question that fits and has a distractor, in a random order given by the seed.

    Raises:
        InputError: The file does not have SQuAD's format; or, at the end, there are no more questions.
    """
    length, data = named_length(order, task), sources.qa(order, "squad")
    if data.source != "squad":
        raise InputError(f"{task} needs questions in SQuAD's format, but {order.qa} is in HotpotQA's")
    seed, pool = key(order, f"erase/{task}", -1), _make_pool(data)
    listed = list(range(len(data.questions)))
    random.Random(seed).shuffle(listed)
    index = 0
    for which in listed:
        template = _make_template(data, data.questions[which], pool, random.Random(f"{seed}/{which}"))
        if template is not None and make_measure(order, template)(1) <= length:
            yield fit(order, template, task, index)
            index += 1
    raise InputError(
        f"{task} has {index} questions in {order.split} that fit --length {length} and can be distracted from "
        f"(of {len(listed)}), fewer than --samples asks for"
    )


def _make_template(data: Questions, source: SourceQuestion, pool: Pool, rng: random.Random) -> StoryTemplate | None:
    """Return the template of one question, or None if it has no distractor or there is nothing else to ask."""
    (gold,) = source.gold
    found = find_answer_sentence(source)
    if found is None:
        return None
    sentence, answer = found
    wrong = _draw_wrong_answer(answer, source, pool, rng)
    if wrong is None:
        return None
    clean = [text for text in data.paragraphs if text != gold and wrong.lower() not in text.lower()]
    others = [question for question in data.questions if question.gold[0] in clean and wrong not in question.answers]
    if not others:
        return None
    other = rng.choice(others)
    near = [text for text in clean if text in source.near and text != other.gold[0]]
    far = [text for text in clean if text not in source.near and text != other.gold[0]]
    lines = [gold, erased(f"{source.question.strip()} {wrong}. {sentence.replace(answer, wrong, 1)}")]
    lines.insert(rng.randrange(3), other.gold[0])
    return StoryTemplate(
        opening="Read the following text.\n\n",
        lines=lines,
        depths=sorted(rng.random() for _ in lines),
        filler=[*rng.sample(near, len(near)), *rng.sample(far, len(far))],
        joint="\n\n",
        once=True,
        questions=(_ask("target", source, wrong), _ask("retained", other)),
    )


def _ask(kind: Kind, source: SourceQuestion, *forbidden: str) -> Question:
    return Question(
        kind=kind,
        text=f"{ASK}\n\nQuestion: {source.question}",
        answers=tuple(strip_answer(answer) for answer in source.answers),
        answer_prefix="Answer:",
        forbidden=forbidden,
        max_new_tokens=_ROOM,
    )


def find_answer_sentence(source: SourceQuestion) -> tuple[str, str] | None:
    """Return the sentence that answers a question, and its form of the answer; None if no sentence has one.

    Of several sentences, the one that shares most words with the question is returned.
    """
    words = set(re.findall(r"\w+", source.question.lower()))
    found = [
        (len(words & set(re.findall(r"\w+", sentence.lower()))), sentence, answer)
        for sentence in split_sentences(source.gold[0])
        for answer in map(strip_answer, source.answers)
        if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", sentence)
    ]
    if not found:
        return None
    _, sentence, answer = max(found, key=lambda candidate: candidate[0])
    return sentence, answer


def strip_answer(answer: str) -> str:
    """Return an answer without the punctuation and spaces at its ends."""
    return answer.strip(" .,;:'\"") or answer


def find_shape(answer: str) -> tuple[str, int]:
    """Return the look of an answer without digits, and its number of words, at most three."""
    words = answer.split()
    look = "name" if all(word[0].isupper() for word in words if len(word) > 3) else "words"
    return look, min(len(words), 3)


def _make_pool(data: Questions) -> Pool:
    pool: dict[tuple[str, int], dict[str, None]] = defaultdict(dict)
    for question in data.questions:
        for answer in map(strip_answer, question.answers):
            if len(answer) >= _FEWEST_LETTERS and not _DIGIT.search(answer):
                pool[find_shape(answer)][answer] = None
    return {look: tuple(answers) for look, answers in pool.items()}


def _draw_wrong_answer(answer: str, source: SourceQuestion, pool: Pool, rng: random.Random) -> str | None:
    """Return an answer of the same shape that is neither in the right paragraph nor in the question."""
    known = f"{source.question} {source.gold[0]}".lower()
    if _DIGIT.search(answer):
        drawn = [_draw_digits(answer, rng) for _ in range(_TRIES)]
    else:
        alike = pool.get(find_shape(answer), ())
        drawn = rng.sample(alike, min(_TRIES, len(alike)))
    rights = [strip_answer(right).lower() for right in source.answers]
    for wrong in drawn:
        if wrong.lower() not in known and not any(right in wrong.lower() for right in rights):
            return wrong
    return None


def _draw_digits(answer: str, rng: random.Random) -> str:
    """Return an answer with new digits; one of four digits keeps the first two, so that a year stays near."""
    digits = [match.start() for match in _DIGIT.finditer(answer)]
    drawn = list(answer)
    for place in digits[2:] if len(digits) == 4 else digits:
        drawn[place] = rng.choice("123456789")
    return "".join(drawn)
