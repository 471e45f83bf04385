"""The user's own samples: a JSONL file, one case a line.

A case is ``{task, length?, context, question, answer_prefix?, answer, metric?, max_new_tokens?, choices?}``. A dialogue
has ``turns`` in place of the columns after the length: a list of such objects. From the second turn on the context may
be left out. ``answer`` is a text or a list of them.

A case's length is its own label, or else the specification's length, or else the length of the longest case of its
task. There is no dev and test split: all cases are in both.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, islice

from vestige.bench.metrics.scores import METRICS
from vestige.bench.sample import Sample, Turn
from vestige.bench.tasks import TaskSpec
from vestige.errors import InputError, unknown_name_message
from vestige.text import jsonl
from vestige.text.jsonl import Entry

_TURN = ("context", "question", "answer_prefix", "answer", "metric", "max_new_tokens", "choices")
_EVERY_ANSWER = ("contains", "string_match_all")  # metrics for which one reply must have all answers
_DEFAULTS = Turn(context="", question="", answers=())


def samples(spec: TaskSpec) -> list[Sample]:
    """Return the cases of a file, or those of one task.

    A length in the specification takes the cases that declare this length, and those that declare none and fit it. A
    number of samples takes the first ones of each task and length. An index is a line's number.

    Raises:
        InputError: There is no file, it has no such case, or a line is malformed; it gives the line.
    """
    if spec.file is None:
        raise InputError("cases needs a file: vestige bench cases FILE.jsonl")
    cases = [_case(spec, entry) for entry in jsonl.read(spec.file)]
    if spec.part is not None:
        tasks = sorted({case.task for case in cases})
        if spec.part not in tasks:
            raise InputError(unknown_name_message(f"task of {spec.file}", spec.part, tasks))
        cases = [case for case in cases if case.task == spec.part]
    found = sorted(_set_lengths(spec, cases), key=lambda case: (case.task, case.length, case.index))
    rows = groupby(found, key=lambda case: (case.task, case.length))
    return [case for _, row in rows for case in islice(row, spec.samples)]


def _set_lengths(spec: TaskSpec, cases: Sequence[Sample]) -> list[Sample]:
    """Return the cases of the specification's length, or all cases if it has none, each with the length of its row."""
    tokens = [case.length or spec.measure(case.turns) for case in cases]
    if spec.length is None:
        longest: dict[str, int] = {}
        for case, measured in zip(cases, tokens, strict=True):
            if not case.length:
                longest[case.task] = max(longest.get(case.task, 0), measured)
        return [case if case.length else replace(case, length=longest[case.task]) for case in cases]
    pairs = zip(cases, tokens, strict=True)
    wanted = [case for case, n in pairs if n == spec.length or (n < spec.length and not case.length)]
    if not wanted:
        lengths = ", ".join(map(str, sorted(set(tokens))))
        raise InputError(f"{spec.file} has no case of length {spec.length}; there are {lengths}")
    return [replace(case, length=spec.length) for case in wanted]


def _case(spec: TaskSpec, entry: Entry) -> Sample:
    """Return a case with the length that it declares, or else 0."""
    if "turns" in entry.columns:
        entry.check_keys(("task", "length", "turns"))
        turns = tuple(_turn(spec, turn, first=i == 0) for i, turn in enumerate(_turn_entries(entry)))
    else:
        entry.check_keys(("task", "length", *_TURN))
        turns = (_turn(spec, entry, first=True),)
    task = _require_text(entry, "task")
    return Sample(task=task, index=entry.line, length=entry.number("length", 0), turns=turns)


def _turn_entries(entry: Entry) -> list[Entry]:
    turns = entry.columns["turns"]
    if not isinstance(turns, list) or not turns:
        raise entry.error("'turns' is not a list of at least one turn")
    parsed = [jsonl.entry(turn, f"{entry.where}, turn {i}") for i, turn in enumerate(turns, start=1)]
    for turn in parsed:
        turn.check_keys(_TURN)
    return parsed


def _turn(spec: TaskSpec, entry: Entry, *, first: bool) -> Turn:
    answers = entry.texts("answer")
    if not all(answer.strip() for answer in answers):
        raise entry.error("'answer' has an empty text, which every reply contains")
    metric = entry.text("metric", _DEFAULTS.metric)
    if metric not in METRICS:
        raise entry.error(unknown_name_message("metric", metric, METRICS))
    own = entry.number("max_new_tokens", _DEFAULTS.max_new_tokens)
    return Turn(
        context=_require_text(entry, "context") if first else entry.text("context", ""),
        question=_require_text(entry, "question"),
        answers=answers,
        answer_prefix=entry.text("answer_prefix", ""),
        metric=metric,
        max_new_tokens=spec.reply_limit(answers, own, every=metric in _EVERY_ANSWER),
        choices=_choices(entry, metric),
    )


def _choices(entry: Entry, metric: str) -> tuple[str, ...]:
    if metric.startswith("classification") and not entry.has("choices"):
        raise entry.error(f"the metric {metric} needs 'choices', the names of all classes")
    return entry.texts("choices") if entry.has("choices") else ()


def _require_text(entry: Entry, name: str) -> str:
    text = entry.text(name)
    if not text.strip():
        raise entry.error(f"{name!r} is empty")
    return text
