"""What is for benchmarks only, recognised wherever it lies: trainers leave it out, or refuse it.

Left out: of a folder of ten ``*.txt`` files or more every fifth in sorted order, which haystacks are made of (see
:mod:`vestige.bench.sources`); of LongBench's samples the second half of each data set. Refused: what is a benchmark
from end to end, namely questions in SQuAD's or HotpotQA's format, RULER's samples, LongBench v2, and the parts of sets
on the hub that the benchmark fetches.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from vestige.bench.sources import ESSAYS_SET, FEWEST_FILES, HOTPOT_SET, SQUAD_SET, reserved
from vestige.bench.tasks.longbench.data import HUB, HUB_V2
from vestige.errors import InputError
from vestige.text.jsonl import Entry

REFUSED_FIELDS = {
    "RULER's": {"index", "input", "outputs", "length"},
    "LongBench v2's": {"context", "question", "choice_A", "choice_D"},
}
"""Whose samples have these fields."""
LONGBENCH_FIELDS = {"context", "answers", "all_classes"}
REFUSED_SETS = {(SQUAD_SET, "validation"), (HOTPOT_SET, "validation"), (HUB, "test"), (HUB_V2, "train")}
RULER_FOLDER = "ruler"

T = TypeVar("T")


def allowed_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files that may be trained on, by their place in the folder that they lie in.

    Raises:
        InputError: One is a benchmark from end to end.
    """
    for path in paths:
        refuse(path)
    held = {folder: _held_names(folder) for folder in {path.parent for path in paths}}
    return [path for path in paths if path.name not in held[path.parent]]


def allowed_entries(entries: Sequence[Entry], name: str) -> list[Entry]:
    """Return the samples of a JSONL file or a set that may be trained on.

    Args:
        entries: All of them.
        name: The data set, for samples that do not say of which they are.

    Raises:
        InputError: One is of a format that is for benchmarks only.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        whose = _format(entry)
        if whose:
            raise entry.error(f"a sample in {whose} format, which is for benchmarks only")
        if entry.columns.keys() >= LONGBENCH_FIELDS:
            groups.setdefault(_data_set(entry, name), []).append(entry)
    held = {id(entry) for group in groups.values() for entry in group[(len(group) + 1) // 2 :]}
    return [entry for entry in entries if id(entry) not in held]


def allowed_rows(rows: Sequence[T], name: str, split: str) -> list[T]:
    """Return the rows of a set on the hub that may be trained on.

    Args:
        rows: All of the split.
        name: Owner and name.
        split: As ``datasets`` takes it: ``train``, or a slice, ``train[:1000]``.

    Raises:
        InputError: The benchmark fetches this split, or the set is the essays and not all of them are here.
    """
    base = split.partition("[")[0]
    if (name, base) in REFUSED_SETS:
        raise InputError(f"the {base} split of {name} is for benchmarks only")
    if name != ESSAYS_SET:
        return list(rows)
    if split != "train":
        raise InputError(f"every fifth text of {name} is for benchmarks only: take the split train, not {split!r}")
    held = _held(len(rows))
    return [row for i, row in enumerate(rows) if i not in held]


def refuse(path: Path) -> None:
    """Raise an InputError if a file or folder is a benchmark from end to end.

    Such is anything in a folder named ``ruler``, and a JSON file in SQuAD's or HotpotQA's format.
    """
    whole = path.absolute()
    if RULER_FOLDER in (whole.name, whole.parent.name):
        raise InputError(f"{path} is RULER's, which is for benchmarks only")
    if path.suffix == ".json" and path.is_file() and (whose := _question_format(path)):
        raise InputError(f"{path} is in {whose} format, which is for benchmarks only")


def _held_names(folder: Path) -> set[str]:
    """Return the names of the texts of a folder that are for benchmarks only."""
    texts = sorted(folder.glob("*.txt"))
    return {texts[i].name for i in _held(len(texts))}


def _held(count: int) -> set[int]:
    """Return the places among so many essays that are for benchmarks only."""
    return set(reserved(range(count))) if count >= FEWEST_FILES else set()


def _format(entry: Entry) -> str | None:
    return next((whose for whose, fields in REFUSED_FIELDS.items() if fields <= entry.columns.keys()), None)


def _data_set(entry: Entry, name: str) -> str:
    """Return which of LongBench's sets a sample is of."""
    named = entry.columns.get("dataset") or entry.columns.get("task") or name
    return str(named).removesuffix("_e").removesuffix("-e")


def _question_format(path: Path) -> str | None:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):  # whoever reads it will say so
        return None
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        return "SQuAD's"
    first = data[0] if isinstance(data, list) and data else None
    questions = isinstance(first, dict) and {"question", "context"} <= first.keys()
    return "HotpotQA's or LongBench v2's" if questions else None
