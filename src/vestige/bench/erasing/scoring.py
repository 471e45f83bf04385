"""The scores of one reply against the clean reply, the right answers and the forbidden ones; the filter of samples."""

from collections.abc import Sequence
from typing import Any

from vestige.bench.erasing.sample import Question
from vestige.bench.metrics import text_overlap
from vestige.bench.results.aggregate import Record


def score_reply(question: Question, reply: str, clean: str) -> dict[str, Any]:
    """Return a question, a reply and the clean reply with their scores.

    ``exact`` and ``f1`` compare with the clean reply as SQuAD compares; ``correct`` and ``clean_correct`` tell whether
    a right answer occurs, ``leak`` and ``clean_leak`` whether a forbidden one does. Each is None if there is nothing to
    compare with.
    """
    exact = text_overlap.normalize(reply) == text_overlap.normalize(clean)
    return {
        "kind": question.kind,
        "question": question.text,
        "answer_prefix": question.answer_prefix,
        "answers": list(question.answers),
        "forbidden": list(question.forbidden),
        "prediction": reply,
        "clean": clean,
        "exact": exact,
        "f1": 1.0 if exact else text_overlap.token_f1(reply, clean),
        "correct": question.correct(reply),
        "clean_correct": question.correct(clean),
        "leak": question.leaks(reply),
        "clean_leak": question.leaks(clean),
    }


def clean_is_correct(replies: Sequence[Record]) -> bool:
    """Return whether the clean replies let a sample pass the filter of :func:`keep_sample`."""
    deciding = "target" if any(reply["kind"] == "target" for reply in replies) else "retained"
    return all(reply["clean_correct"] for reply in replies if reply["kind"] == deciding)


def keep_sample(replies: Sequence[Record]) -> bool:
    """Return whether a sample passes the filter, given the replies of the untouched cache.

    It passes if the clean replies to the target questions are right and one reply of the untouched cache is wrong. A
    sample without target questions passes if the clean replies to its retained questions are right.
    """
    unchanged = all(reply["correct"] for reply in replies if reply["kind"] == "target")
    harmless = all(reply["kind"] != "target" for reply in replies)
    return clean_is_correct(replies) and (harmless or not unchanged)
