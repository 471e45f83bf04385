"""The user's own samples: a JSONL file, one case a line.

A case is ``{task, length?, context, question, answer_prefix?, answer, metric?, max_new_tokens?, choices?}``. A dialogue
has ``turns`` in place of the columns after the length: a list of such objects. From the second turn on the context may
be left out. ``answer`` is a text or a list of them.

A case's length is its own label, or else the specification's length, or else the length of the longest case of its
task. There is no dev and test split: all cases are in both.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vestige.bench.metrics.scores import METRICS
from vestige.bench.sample import Sample, Turn
from vestige.bench.tasks import TaskSpec
from vestige.errors import InputError, unknown_name_message
from vestige.text import jsonl
from vestige.text.jsonl import Entry

_TURN = ("context", "question", "answer_prefix", "answer", "metric", "max_new_tokens", "choices")
_EVERY_ANSWER = ("contains", "string_match_all")  # metrics for which one reply must have all answers
_DEFAULTS = Turn(context="", question="", answers=())


@dataclass(frozen=True)
class _Case:
    line: int
    task: str
    declared: int | None
    measured: int
    """Tokens; 0, and not counted, if a length is declared."""
    turns: tuple[Turn, ...]


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
    return _take_first(spec, _with_lengths(cases) if spec.length is None else _of_length(cases, spec.length, spec.file))


def _with_lengths(cases: Sequence[_Case]) -> list[Sample]:
    longest: dict[str, int] = {}
    for case in cases:
        longest[case.task] = max(longest.get(case.task, 0), case.measured)
    return [_sample(case, case.declared or longest[case.task]) for case in cases]


def _of_length(cases: Sequence[_Case], length: int, path: Path) -> list[Sample]:
    wanted = [case for case in cases if (case.declared == length if case.declared else case.measured <= length)]
    if not wanted:
        lengths = ", ".join(str(n) for n in sorted({case.declared or case.measured for case in cases}))
        raise InputError(f"{path} has no case of length {length}; there are {lengths}")
    return [_sample(case, length) for case in wanted]


def _take_first(spec: TaskSpec, cases: Sequence[Sample]) -> list[Sample]:
    """Return the first samples of each row, ordered by row and line."""
    counts: Counter[tuple[str, int]] = Counter()
    kept = []
    for case in cases:
        counts[case.task, case.length] += 1
        if spec.samples is None or counts[case.task, case.length] <= spec.samples:
            kept.append(case)
    return sorted(kept, key=lambda sample: (sample.task, sample.length, sample.index))


def _sample(case: _Case, length: int) -> Sample:
    return Sample(task=case.task, index=case.line, length=length, turns=case.turns)


def _case(spec: TaskSpec, entry: Entry) -> _Case:
    if "turns" in entry.columns:
        _check_keys(entry, ("task", "length", "turns"))
        turns = tuple(_turn(spec, turn, first=i == 0) for i, turn in enumerate(_turn_entries(entry)))
    else:
        _check_keys(entry, ("task", "length", *_TURN))
        turns = (_turn(spec, entry, first=True),)
    task = _require_text(entry, "task")
    declared = entry.number("length") if entry.has("length") else None
    measured = 0 if declared else spec.measure(turns)
    return _Case(entry.line, task, declared, measured, turns)


def _turn_entries(entry: Entry) -> list[Entry]:
    turns = entry.columns["turns"]
    if not isinstance(turns, list) or not turns:
        raise entry.error("'turns' is not a list of at least one turn")
    parsed = [jsonl.entry(turn, f"{entry.where}, turn {i}") for i, turn in enumerate(turns, start=1)]
    for turn in parsed:
        _check_keys(turn, _TURN)
    return parsed


def _turn(spec: TaskSpec, entry: Entry, *, first: bool) -> Turn:
    answers = entry.texts("answer")
    if not all(answer.strip() for answer in answers):
        raise entry.error("'answer' has an empty text, which every reply contains")
    metric = entry.text("metric") if entry.has("metric") else _DEFAULTS.metric
    if metric not in METRICS:
        raise entry.error(unknown_name_message("metric", metric, METRICS))
    own = entry.number("max_new_tokens") if entry.has("max_new_tokens") else _DEFAULTS.max_new_tokens
    return Turn(
        context=_require_text(entry, "context") if first else entry.text("context") if entry.has("context") else "",
        question=_require_text(entry, "question"),
        answers=answers,
        answer_prefix=entry.text("answer_prefix") if entry.has("answer_prefix") else "",
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


def _check_keys(entry: Entry, valid: Sequence[str]) -> None:
    for key in entry.columns:
        if key not in valid:
            raise entry.error(unknown_name_message("key", key, valid))
