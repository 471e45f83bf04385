"""LongBench: real documents of 21 data sets, its variant by length (-E), and v2 with multiple choice.

Source: arXiv 2308.14508 and 2412.15204; metrics and reply limits are theirs. Differs: prompts (see
:mod:`vestige.bench.tasks.longbench.prompts`); few-shot and code tasks get the model's chat text too; and a
conversation that is too long loses characters out of the middle of its document, where the original cuts tokens out of
the middle of the whole prompt: the instructions stay whole, and reply and chat text count.

Splits: the samples of one data set take turns, dev first. Only the second half of local files is used: the first may be
somebody's training text.
"""

import random
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vestige.bench.sample import Sample, Turn
from vestige.bench.tasks import SPLITS, TaskSpec
from vestige.bench.tasks.longbench import prompts
from vestige.bench.tasks.longbench.data import HUB, HUB_V2, load_from_hub, load_from_path, load_v2_from_path
from vestige.errors import InputError
from vestige.text.jsonl import Entry

Tags = dict[str, str | int | float]


@dataclass(frozen=True)
class Dataset:
    """The metric of the replies to one data set, and their longest length."""

    metric: str
    max_new_tokens: int


DATASETS: dict[str, Dataset] = {
    "narrativeqa": Dataset("f1", 128),
    "qasper": Dataset("f1", 128),
    "multifieldqa_en": Dataset("f1", 64),
    "multifieldqa_zh": Dataset("f1_zh", 64),
    "hotpotqa": Dataset("f1", 32),
    "2wikimqa": Dataset("f1", 32),
    "musique": Dataset("f1", 32),
    "dureader": Dataset("rouge_l_zh", 128),
    "gov_report": Dataset("rouge_l", 512),
    "qmsum": Dataset("rouge_l", 512),
    "multi_news": Dataset("rouge_l", 512),
    "vcsum": Dataset("rouge_l_zh", 512),
    "trec": Dataset("classification_first_line", 64),
    "triviaqa": Dataset("f1_first_line", 32),
    "samsum": Dataset("rouge_l_first_line", 128),
    "lsht": Dataset("classification_first_line", 64),
    "passage_count": Dataset("count", 32),
    "passage_retrieval_en": Dataset("retrieval", 32),
    "passage_retrieval_zh": Dataset("retrieval_zh", 32),
    "lcc": Dataset("code_similarity", 64),
    "repobench-p": Dataset("code_similarity", 64),
}
DATASETS_E = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
V2 = Dataset("choice", 128)


def samples(spec: TaskSpec) -> list[Sample]:
    """Return samples of LongBench's data sets, or of one of them.

    Raises:
        InputError: No such data set, or data or prompts are missing or malformed; it says where.
    """
    return _make_samples(spec, "longbench", tuple(DATASETS), "", lambda _: {})


def samples_e(spec: TaskSpec) -> list[Sample]:
    """Return samples of LongBench-E, tagged with the ``bucket`` of their length: 0-4k, 4-8k or 8k+.

    The length is the data's own, in words, or characters of Chinese.

    Raises:
        InputError: As for :func:`samples`.
    """
    return _make_samples(spec, "longbench-e", DATASETS_E, "_e", lambda entry: {"bucket": _bucket(entry)})


def samples_v2(spec: TaskSpec) -> list[Sample]:
    """Return samples of LongBench v2, tagged with ``difficulty``, ``domain`` and ``length_class``.

    Raises:
        InputError: It has no parts; otherwise as for :func:`samples`.
    """
    if spec.part is not None:
        raise InputError(f"longbench-v2 has no parts, got longbench-v2/{spec.part}")
    given = prompts.read(spec.prompts)
    entries = load_v2_from_path(spec.file) if spec.file is not None else load_from_hub(HUB_V2, None, "train")
    return _make_row(spec, "longbench-v2", entries, 0, given, _tags_v2)


def _make_samples(
    spec: TaskSpec, task: str, known: tuple[str, ...], suffix: str, tags: Callable[[Entry], Tags]
) -> list[Sample]:
    wanted = spec.choose_parts(f"data set of {task}", known)
    given = prompts.read(spec.prompts)
    if spec.file is not None:
        found = load_from_path(spec.file, suffix, known, spec.part)
    else:
        found = {name: load_from_hub(HUB, f"{name}{suffix}", "test") for name in wanted}
    made: list[Sample] = []
    for name, entries in sorted(found.items()):
        first = 0 if spec.file is None else (len(entries) + 1) // 2
        made += _make_row(spec, f"{task}/{name}", entries, first, given, tags)
    return made


def _make_row(
    spec: TaskSpec,
    row: str,
    entries: Sequence[Entry],
    first: int,
    given: Mapping[str, prompts.Prompt],
    tags: Callable[[Entry], Tags],
) -> list[Sample]:
    """Return the samples of a row with the specification's length, or else the length of the longest of them."""
    dataset, samples = row.rpartition("/")[2], []
    for place in choose_places(len(entries), spec, first=first, name=row):
        prompt, origin = prompts.choose(dataset, entries[place], given)
        turn = _turn(spec, DATASETS.get(dataset, V2), prompt, entries[place])
        about = {"prompts": origin} | tags(entries[place])
        samples.append(Sample(task=row, index=place, length=0, turns=(turn,), tags=about))
    length = spec.length or max(spec.measure(sample.turns) for sample in samples)
    return [replace(sample, length=length) for sample in samples]


def choose_places(count: int, spec: TaskSpec, *, first: int, name: str) -> list[int]:
    """Return the places of the samples that a specification takes from a data set, ascending.

    Even places are dev, odd ones test; places below ``first`` are not used. If fewer are wanted than there are, the
    seed and the name of the row choose.

    Raises:
        InputError: The split has none.
    """
    places = [place for place in range(first, count) if place % 2 == SPLITS.index(spec.split)]
    if not places:
        raise InputError(f"{name} has no {spec.split} samples: there are {count}, and those from {first} on take turns")
    random.Random(f"{spec.seed}/{name}").shuffle(places)
    return sorted(places[: spec.samples])


def _turn(spec: TaskSpec, dataset: Dataset, prompt: prompts.Prompt, entry: Entry) -> Turn:
    """Return the turn of a sample, its document cut so that it fits the specification's length."""
    answers = _letter(entry) if dataset.metric == "choice" else entry.texts("answers")
    document = entry.text("context")
    turn = Turn(
        context=prompts.fill(prompt.context, entry),
        question=prompts.fill(prompt.question, entry),
        answers=answers,
        answer_prefix=prompts.fill(prompt.answer_prefix, entry),
        metric=dataset.metric,
        max_new_tokens=spec.reply_limit(answers, prompt.max_new_tokens or dataset.max_new_tokens),
        choices=entry.texts("all_classes") if dataset.metric.startswith("classification") else (),
    )
    if spec.length is None or spec.measure((turn,)) <= spec.length:
        return turn

    def shortened(kept: int) -> Turn:
        return replace(turn, context=prompts.fill(prompt.context, entry, context=cut_middle(document, kept)))

    kept = find_largest_fit(len(document), lambda kept: spec.measure((shortened(kept),)) <= (spec.length or 0))
    if kept is None:
        least = spec.measure((shortened(0),))
        raise entry.error(f"prompt, question and reply alone are {least} tokens, but --length is {spec.length}")
    return shortened(kept)


def cut_middle(text: str, kept: int) -> str:
    """Return ``kept`` characters of a text, half of them from each end; an odd one is from the beginning."""
    head = (kept + 1) // 2
    return text[:head] + text[len(text) - (kept - head) :]


def find_largest_fit(whole: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest number below ``whole`` that fits, while the next does not; None if not even 0 fits."""
    kept = bisect_left(range(whole), True, key=lambda kept: not fits(kept)) - 1
    return kept if kept >= 0 else None


def _letter(entry: Entry) -> tuple[str]:
    letter = entry.text("answer")
    if letter not in ("A", "B", "C", "D"):
        raise entry.error(f"'answer' is not A, B, C or D but {letter[:20]!r}")
    return (letter,)


def _bucket(entry: Entry) -> str:
    length = entry.number("length")
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"


def _tags_v2(entry: Entry) -> Tags:
    names = {"difficulty": "difficulty", "domain": "domain", "length_class": "length"}
    return {tag: entry.text(column) for tag, column in names.items() if entry.has(column)}
