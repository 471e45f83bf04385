"""How one reply is judged: against the clean reply, the right answers, and what must not be said."""

from collections.abc import Sequence
from typing import Any

from vestige.bench.erasing.sample import Question
from vestige.bench.metrics import text_overlap
from vestige.bench.results.aggregate import Record


def judged(question: Question, said: str, clean: str) -> dict[str, Any]:
    """Return what was asked and said, and how it is judged.

    ``exact`` and ``f1`` compare with the clean reply as SQuAD compares; ``correct`` and ``clean_correct`` say whether
    a right answer occurs, ``leak`` and ``clean_leak`` whether something forbidden does; each is None where there is
    nothing to compare with.
    """
    exact = text_overlap.normalized(said) == text_overlap.normalized(clean)
    return {
        "kind": question.kind,
        "question": question.text,
        "answer_prefix": question.answer_prefix,
        "answers": list(question.answers),
        "forbidden": list(question.forbidden),
        "prediction": said,
        "clean": clean,
        "exact": exact,
        "f1": 1.0 if exact else text_overlap.token_f1(said, clean),
        "correct": question.correct(said),
        "clean_correct": question.correct(clean),
        "leak": question.leaks(said),
        "clean_leak": question.leaks(clean),
    }


def promises(replies: Sequence[Record]) -> bool:
    """Return whether the clean replies let a sample pass the filter: see :func:`passes`."""
    return all(reply["clean_correct"] for reply in _deciding(replies))


def passes(replies: Sequence[Record]) -> bool:
    """Return whether a sample passes the filter, from what the untouched cache says.

    It does if the clean replies to the target questions are right and one of the untouched cache's is wrong; where
    nothing is asked that should change, if the clean replies to the retained questions are right.
    """
    unchanged = all(reply["correct"] for reply in replies if reply["kind"] == "target")
    harmless = all(reply["kind"] != "target" for reply in replies)
    return promises(replies) and (harmless or not unchanged)


def _deciding(replies: Sequence[Record]) -> list[Record]:
    kinds = {reply["kind"] for reply in replies}
    return [reply for reply in replies if reply["kind"] == ("target" if "target" in kinds else "retained")]
