"""Metrics of replies: functions from a reply and its turn to a number in 0..1.

RULER's are those of arXiv 2404.06654, LongBench's those of arXiv 2308.14508 and 2412.15204: the definitions in its
evaluation code, oddities included, so that numbers compare with published ones.
"""

import re
from collections.abc import Callable
from functools import partial, wraps

from vestige.bench.metrics import text_overlap
from vestige.bench.sample import Turn
from vestige.errors import InputError

Metric = Callable[[str, Turn], float]


def contains(reply: str, turn: Turn) -> float:
    """Return 1 if every answer occurs in the reply, case ignored."""
    return float(all(_occurrences(reply, turn)))


def exact(reply: str, turn: Turn) -> float:
    """Return 1 if the reply is one of the answers, as SQuAD compares them."""
    return float(any(text_overlap.normalize(reply) == text_overlap.normalize(answer) for answer in turn.answers))


def string_match_all(reply: str, turn: Turn) -> float:
    """Return the share of the answers that occur in the reply, case ignored (RULER)."""
    found = _occurrences(reply, turn)
    return sum(found) / len(found) if found else 0.0


def string_match_part(reply: str, turn: Turn) -> float:
    """Return 1 if any answer occurs in the reply, case ignored (RULER's question answering)."""
    return float(any(_occurrences(reply, turn)))


def _occurrences(reply: str, turn: Turn) -> list[bool]:
    return [answer.lower() in reply.lower() for answer in turn.answers]


def best(score: Callable[[str, str], float]) -> Metric:
    """Return the metric that is the highest score of the reply against any answer."""

    @wraps(score)
    def metric(reply: str, turn: Turn) -> float:
        return max((score(reply, answer) for answer in turn.answers), default=0.0)

    return metric


def first_line(metric: Metric) -> Metric:
    """Return the metric for the reply's first line alone, empty lines before it skipped.

    LongBench scores trec, triviaqa, samsum and lsht so, since models continue with further examples.
    """

    @wraps(metric)
    def of_line(reply: str, turn: Turn) -> float:
        return metric(reply.lstrip("\n").partition("\n")[0], turn)

    return of_line


def classification(reply: str, turn: Turn) -> float:
    """Return 1 / the number of classes that the reply names if the right one is among them (LongBench).

    Classes that are part of the right one's name do not count. As in the published code, the class after one that was
    left out for this reason is never checked.
    """
    return best(lambda _, answer: _class_share(reply, answer, turn.choices))(reply, turn)


def _class_share(reply: str, answer: str, choices: tuple[str, ...]) -> float:
    named = [choice for choice in choices if choice in reply]
    at = 0
    while at < len(named):
        if named[at] in answer and named[at] != answer:
            del named[at]  # the next one moves here and is skipped
        at += 1
    return 1 / len(named) if answer in named else 0.0


def count(reply: str, answer: str) -> float:
    """Return the share of the reply's numbers that are the answer, digit by digit (LongBench)."""
    numbers = re.findall(r"\d+", reply)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(reply: str, answer: str, pattern: str = r"Paragraph (\d+)") -> float:
    """Return the share of the reply's numbers that are the number of the paragraph in the answer (LongBench).

    Raises:
        InputError: The answer does not name a paragraph.
    """
    number = re.search(pattern, answer)
    if number is None:
        raise InputError(f"an answer of the metric retrieval names a paragraph, such as 'Paragraph 7'; got {answer!r}")
    return count(reply, number[1])


def code_similarity(reply: str, answer: str) -> float:
    """Return the similarity of the answer and the reply's first line of code (LongBench).

    Lines with a backquote, ``#`` or ``//`` count as comments or fences.
    """
    lines = reply.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
    return text_overlap.similarity(next(code, ""), answer)


def choice(reply: str, turn: Turn) -> float:
    """Return 1 if the reply says that the correct answer is the right letter of A to D (LongBench v2).

    The answer prefix is read with the reply, so a prefix may have the words and leave the letter to the model.
    """
    text = (turn.answer_prefix + reply).replace("*", "")
    letter = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return float(letter is not None and letter[1] in turn.answers)


METRICS: dict[str, Metric] = {
    "choice": choice,
    "classification": classification,
    "classification_first_line": first_line(classification),
    "code_similarity": best(code_similarity),
    "contains": contains,
    "count": best(count),
    "exact": exact,
    "f1": best(text_overlap.token_f1),
    "f1_first_line": first_line(best(text_overlap.token_f1)),
    "f1_zh": best(text_overlap.token_f1_zh),
    "retrieval": best(retrieval),
    "retrieval_zh": best(partial(retrieval, pattern=r"段落(\d+)")),
    "rouge_l": best(text_overlap.rouge_l),
    "rouge_l_first_line": first_line(best(text_overlap.rouge_l)),
    "rouge_l_zh": best(text_overlap.rouge_l_zh),
    "rouge_score": best(text_overlap.rouge_score),
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
}
"""LongBench's ``qa_f1`` is ``f1``, its ``qa_f1_zh`` is ``f1_zh``."""
