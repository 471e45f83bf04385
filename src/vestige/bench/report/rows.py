"""Rows of result folders: reading them, sorting them into chapters, and means over the tasks of a group."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vestige.bench.report.methods import Method
from vestige.bench.results.store import BOOKS, ROWS, SPEED
from vestige.errors import InputError

Row: TypeAlias = dict[str, Any]
_HINT = "run `vestige bench ... --out DIR`"
_ABSENT = 1 << 60  # sorts what has no length behind everything


def load_rows(folders: Sequence[Path]) -> list[Row]:
    """Return the rows of all folders, in the order given; a folder of result folders stands for those.

    Raises:
        InputError: No folder, one is missing or holds no results, or a file is malformed.
    """
    if not folders:
        raise InputError("no folder given; name the folders that `vestige bench ... --out DIR` wrote")
    rows = [row for folder in folders for part in result_folders(folder) for row in read_rows(part)]
    if not rows:
        raise InputError(f"no rows in {', '.join(map(str, folders))}: nothing was measured yet; {_HINT}")
    return rows


def result_folders(folder: Path) -> list[Path]:
    """Return the folder if it holds results, and those of its subfolders that do."""
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}" if not folder.exists() else f"{folder} is not a folder")
    found = [part for part in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())) if _has_results(part)]
    return found or [folder]


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of one result folder, those of ``bench speed`` last.

    Raises:
        InputError: Neither ``rows.json`` nor ``speed.json`` is there, or one of them is malformed.
    """
    if not _has_results(folder):
        raise InputError(f"no results in {folder}: expected {ROWS}; {_HINT}")
    return [row for name in (ROWS, SPEED) if (folder / name).is_file() for row in _read(folder / name)]


def commands(folders: Sequence[Path]) -> list[str]:
    """Return the commands that made the results, each once, where a folder's ``bench.json`` or ``rows.json`` says."""
    found: dict[str, None] = {}
    for part in (part for folder in folders for part in result_folders(folder)):
        for name in (BOOKS, ROWS, SPEED):
            books = _parse(part / name) if (part / name).is_file() else None
            command = books.get("command") if isinstance(books, dict) else None
            if command:
                found[" ".join(map(str, command)) if isinstance(command, list) else str(command)] = None
    return list(found)


def _has_results(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ROWS, SPEED))


def _read(path: Path) -> list[Row]:
    books = _parse(path)
    rows = books.get("rows") if isinstance(books, dict) else None
    if not isinstance(rows, list):
        raise InputError(f'{path} is not a result file: expected an object {{"rows": [...]}}')
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("policy"), str):
            raise InputError(f"{path} is not a result file: row {i} has no policy")
        if path.name == ROWS and not isinstance(row.get("task"), str):
            raise InputError(f"{path} is not a result file: row {i} has no task")
    return rows


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8"), parse_constant=lambda _: None)  # NaN is no number
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def is_speed(row: Row) -> bool:
    """Return whether a row is of ``bench speed``, which has no task."""
    return "task" not in row


def failed(row: Row) -> bool:
    """Return whether a row has nothing to show: no score, or no time if it is of ``bench speed``."""
    return number(row, "decode_ms" if is_speed(row) else "score") is None


def reason(row: Row) -> str:
    """Return why a row has nothing to show."""
    return str(row.get("error") or "nothing was measured")


def number(row: Mapping[str, Any], key: str) -> float | None:
    """Return a number of a row, or None if it is missing or not one."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return a row's 95 % interval, or None."""
    given = row.get("score_ci95")
    if not isinstance(given, list | tuple) or len(given) != 2:
        return None
    low, high = (number({"x": end}, "x") for end in given)
    return None if low is None or high is None else (low, high)


def bytes_fraction(row: Mapping[str, Any]) -> float | None:
    """Return measured bytes over those of a cache that keeps everything."""
    held, full = number(row, "kv_bytes"), number(row, "full_kv_bytes")
    return None if held is None or not full else held / full


def group_of(row: Row) -> str:
    """Return the group that a task belongs to: ``ruler`` for ``ruler/vt``."""
    return str(row["task"]).partition("/")[0]


def length_of(row: Row) -> int | None:
    """Return the nominal length of a row in tokens; None where the task's own texts set it."""
    value = number(row, "length")
    return None if value is None else int(value)


def by_length(length: int | None) -> int:
    """Return what lengths are sorted by."""
    return _ABSENT if length is None else length


def at_length(length: int | None) -> str:
    """Return a length in words."""
    return "at the texts' own lengths" if length is None else f"at {length:,} tokens"


def budget_key(text: str) -> tuple[int, float, str]:
    """Return what budgets are sorted by: fractions, tokens, bytes, each downwards."""
    try:
        value = float(text)
    except ValueError:
        return 2, 0.0, text
    return (0 if "." in text else 1), -value, text


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """Rows that may share a picture: one model, split, seed and protocol."""

    model: str
    split: str
    question_aware: bool
    seed: str
    rows: tuple[Row, ...]
    """Rows that have a score."""

    @property
    def title(self) -> str:
        """What its rows have in common, in words."""
        asked = "question-aware" if self.question_aware else "question-agnostic"
        return f"{self.model}, {self.split} split, {asked}, seed {self.seed}"


def chapters(rows: Iterable[Row]) -> list[Chapter]:
    """Sort rows with a score into chapters, in a fixed order."""
    found: dict[tuple[str, str, bool, str], list[Row]] = {}
    for row in rows:
        if not is_speed(row) and not failed(row):
            asked = bool(row.get("question_aware"))
            key = (_word(row, "model"), _word(row, "split"), asked, _word(row, "seed"))
            found.setdefault(key, []).append(row)
    return [
        Chapter(model=m, split=s, question_aware=q, seed=n, rows=tuple(found[m, s, q, n]))
        for m, s, q, n in sorted(found)
    ]


def _word(row: Row, key: str) -> str:
    value = row.get(key)
    return "unknown" if value is None else str(value)


def cells(rows: Iterable[Row]) -> dict[tuple[str, int | None], list[Row]]:
    """Return rows by (task, length), sorted: group, length, task."""
    found: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        found.setdefault((str(row["task"]), length_of(row)), []).append(row)
    return dict(sorted(found.items(), key=lambda x: (x[0][0].partition("/")[0], by_length(x[0][1]), x[0][0])))


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The tasks of one group at one length, with a row for each method and budget that did all of them."""

    group: str
    length: int | None
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    """Like result rows; ``score_ci95`` takes the tasks as independent."""
    partial: tuple[Method, ...]
    """Methods that lack a task, and so have no mean."""

    @property
    def title(self) -> str:
        """The group, how many tasks, at which length."""
        count = "1 task" if len(self.tasks) == 1 else f"mean of {len(self.tasks)} tasks"
        return f"{self.group}, {count} {at_length(self.length)}"


def means(rows: Iterable[Row]) -> list[Mean]:
    """Return the means over tasks for each (group, length)."""
    found: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        found.setdefault((group_of(row), length_of(row)), []).append(row)
    ordered = sorted(found, key=lambda x: (x[0], by_length(x[1])))
    return [_mean(group, length, found[group, length]) for group, length in ordered]


def _mean(group: str, length: int | None, rows: Sequence[Row]) -> Mean:
    tasks = sorted({str(row["task"]) for row in rows})
    arms: dict[tuple[Method, str], dict[str, Row]] = {}
    for row in rows:
        arms.setdefault((Method.of(row), str(row.get("budget"))), {})[str(row["task"])] = row
    whole = {arm: list(done.values()) for arm, done in arms.items() if len(done) == len(tasks)}
    partial = {method for method, _ in arms} - {method for method, _ in whole}
    merged = sorted(whole.items(), key=lambda x: (x[0][0].order, budget_key(x[0][1])))
    return Mean(
        group=group,
        length=length,
        tasks=tuple(tasks),
        rows=tuple(_average(done) for _, done in merged),
        partial=tuple(sorted(partial, key=lambda method: method.order)),
    )


def _average(rows: Sequence[Row]) -> Row:
    """Return one row for the same method and budget on several tasks: bytes are summed, the rest is averaged."""
    merged = {
        key: rows[0].get(key) for key in ("task", "policy", "share", "memory", "budget", "peer", "chunk", "length")
    }
    for key in ("score", "kept_fraction", "decode_ms", "prefill_s", "evict_s"):
        values = [value for row in rows if (value := number(row, key)) is not None]
        merged[key] = sum(values) / len(values) if len(values) == len(rows) else None
    for key in ("kv_bytes", "full_kv_bytes", "held", "full", "n"):
        values = [value for row in rows if (value := number(row, key)) is not None]
        merged[key] = sum(values) if len(values) == len(rows) else None
    return {**merged, "score_ci95": _joint_interval(rows, merged["score"])}


def _joint_interval(rows: Sequence[Row], score: float | None) -> list[float] | None:
    """Return the interval of a mean of independent scores: half-widths add in squares, each side on its own."""
    ends = [(number(row, "score"), interval(row)) for row in rows]
    sides = [(y - ci[0], ci[1] - y) for y, ci in ends if y is not None and ci is not None]
    if score is None or len(sides) != len(rows):
        return None
    down, up = (math.sqrt(sum(side[i] ** 2 for side in sides)) / len(rows) for i in (0, 1))
    return [max(0.0, score - down), min(1.0, score + up)]
