"""Recognize texts that are reserved for benchmarks: trainers leave them out, or refuse the source.

Left out: of a folder of ten ``*.txt`` files or more every fifth in sorted order, which the haystacks use (see
:mod:`vestige.bench.tasks.sources`); of LongBench's samples the second half of each data set. Refused: whole benchmarks,
namely questions in SQuAD's or HotpotQA's format, RULER's samples, LongBench v2, and the parts of hub data sets that the
benchmark fetches.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from vestige.bench.tasks.longbench.data import HUB, HUB_V2
from vestige.bench.tasks.sources import ESSAYS_SET, FEWEST_FILES, HOTPOT_SET, SQUAD_SET, reserved
from vestige.errors import InputError
from vestige.text.jsonl import Entry

REFUSED_FIELDS = {
    "RULER's": {"index", "input", "outputs", "length"},
    "LongBench v2's": {"context", "question", "choice_A", "choice_D"},
}
"""Fields of the samples of refused formats."""
LONGBENCH_FIELDS = {"context", "answers", "all_classes"}
REFUSED_SETS = {(SQUAD_SET, "validation"), (HOTPOT_SET, "validation"), (HUB, "test"), (HUB_V2, "train")}
RULER_FOLDER = "ruler"

T = TypeVar("T")


def allowed_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files that training may use, by their place in their folder.

    Raises:
        InputError: A file is a whole benchmark.
    """
    for path in paths:
        refuse(path)
    held: set[Path] = set()
    for folder in {path.parent for path in paths}:
        texts = sorted(folder.glob("*.txt"))
        held |= {texts[i] for i in _find_reserved(len(texts))}
    return [path for path in paths if path not in held]


def allowed_entries(entries: Sequence[Entry], name: str) -> list[Entry]:
    """Return the samples of a JSONL file or a hub data set that training may use.

    Args:
        entries: All samples.
        name: Name of the data set, for samples that do not name theirs.

    Raises:
        InputError: A sample has a format that is for benchmarks only.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        for whose, fields in REFUSED_FIELDS.items():
            if fields <= entry.columns.keys():
                raise entry.error(f"a sample in {whose} format, which is for benchmarks only")
        if entry.columns.keys() >= LONGBENCH_FIELDS:
            groups.setdefault(_find_data_set(entry, name), []).append(entry)
    held = {id(entry) for group in groups.values() for entry in group[(len(group) + 1) // 2 :]}
    return [entry for entry in entries if id(entry) not in held]


def allowed_rows(rows: Sequence[T], name: str, split: str) -> list[T]:
    """Return the rows of a hub data set that training may use.

    Args:
        rows: All rows of the split.
        name: Owner and name.
        split: As ``datasets`` takes it: ``train``, or a slice, ``train[:1000]``.

    Raises:
        InputError: The benchmark fetches this split, or the split is a part of the essays.
    """
    base = split.partition("[")[0]
    if (name, base) in REFUSED_SETS:
        raise InputError(f"the {base} split of {name} is for benchmarks only")
    if name != ESSAYS_SET:
        return list(rows)
    if split != "train":
        raise InputError(f"every fifth text of {name} is for benchmarks only: take the split train, not {split!r}")
    held = _find_reserved(len(rows))
    return [row for i, row in enumerate(rows) if i not in held]


def refuse(path: Path) -> None:
    """Raise an InputError if a file or folder is a whole benchmark.

    That is anything in a folder named ``ruler``, and a JSON file in SQuAD's or HotpotQA's format.
    """
    whole = path.absolute()
    if RULER_FOLDER in (whole.name, whole.parent.name):
        raise InputError(f"{path} is RULER's, which is for benchmarks only")
    if path.suffix == ".json" and path.is_file() and (whose := _find_question_format(path)):
        raise InputError(f"{path} is in {whose} format, which is for benchmarks only")


def _find_reserved(count: int) -> set[int]:
    """Return the reserved places among ``count`` essays."""
    return set(reserved(range(count))) if count >= FEWEST_FILES else set()


def _find_data_set(entry: Entry, name: str) -> str:
    """Return the name of a sample's LongBench data set."""
    named = entry.columns.get("dataset") or entry.columns.get("task") or name
    return str(named).removesuffix("_e").removesuffix("-e")


def _find_question_format(path: Path) -> str | None:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):  # reading it raises a better error
        return None
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        return "SQuAD's"
    first = data[0] if isinstance(data, list) and data else None
    questions = isinstance(first, dict) and {"question", "context"} <= first.keys()
    return "HotpotQA's or LongBench v2's" if questions else None
