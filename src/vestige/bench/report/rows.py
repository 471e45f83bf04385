"""Rows of result folders: reading and grouping them, and means over the tasks of a group."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from vestige.bench.report.methods import MethodKey
from vestige.bench.results.store import BOOKS, ROWS, SPEED
from vestige.errors import InputError

Row: TypeAlias = dict[str, Any]
_HINT = "run `vestige bench ... --out DIR`"
_ABSENT = 1 << 60  # sorts rows without a length last
K = TypeVar("K")


def load_rows(folders: Sequence[Path]) -> list[Row]:
    """Return the rows of all folders, in their order; of a folder of result folders, the rows of all of these.

    Raises:
        InputError: No folder, one is missing or holds no results, or a file is malformed.
    """
    if not folders:
        raise InputError("no folder given; name the folders that `vestige bench ... --out DIR` wrote")
    rows = [row for folder in folders for part in find_folders(folder) for row in read_rows(part)]
    if not rows:
        raise InputError(f"no rows in {', '.join(map(str, folders))}: nothing was measured yet; {_HINT}")
    return rows


def find_folders(folder: Path) -> list[Path]:
    """Return those of a folder and its subfolders that hold results, or else the folder alone."""
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}" if not folder.exists() else f"{folder} is not a folder")
    found = [part for part in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())) if _has_results(part)]
    return found or [folder]


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of one result folder, rows of ``bench speed`` last.

    Raises:
        InputError: Neither ``rows.json`` nor ``speed.json`` is there, or one of them is malformed.
    """
    if not _has_results(folder):
        raise InputError(f"no results in {folder}: expected {ROWS}; {_HINT}")
    return [row for name in (ROWS, SPEED) if (folder / name).is_file() for row in _read_file(folder / name)]


def read_commands(folders: Sequence[Path]) -> list[str]:
    """Return the commands that made the results, each once, as far as the folders' JSON files record them."""
    files = [part / name for folder in folders for part in find_folders(folder) for name in (BOOKS, ROWS, SPEED)]
    parsed = [_parse(file) for file in files if file.is_file()]
    found = [contents.get("command") for contents in parsed if isinstance(contents, dict)]
    texts = [" ".join(map(str, command)) if isinstance(command, list) else str(command) for command in found if command]
    return list(dict.fromkeys(texts))


def _has_results(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ROWS, SPEED))


def _read_file(path: Path) -> list[Row]:
    contents = _parse(path)
    rows = contents.get("rows") if isinstance(contents, dict) else None
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


def is_failed(row: Row) -> bool:
    """Return whether a row has no score, or no time if it is of ``bench speed``."""
    return read_number(row, "decode_ms" if is_speed(row) else "score") is None


def read_number(row: Mapping[str, Any], key: str) -> float | None:
    """Return a number of a row, or None if it is missing or not one."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return a row's 95 % interval, or None."""
    ends = row.get("score_ci95")
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return None
    low, high = (read_number({"end": end}, "end") for end in ends)
    return None if low is None or high is None else (low, high)


def read_length(row: Row) -> int | None:
    """Return the nominal length of a row in tokens; None where the task's own texts set it."""
    value = read_number(row, "length")
    return None if value is None else int(value)


def find_bytes_fraction(row: Mapping[str, Any]) -> float | None:
    """Return measured bytes over those of a cache that keeps everything."""
    held, full = read_number(row, "kv_bytes"), read_number(row, "full_kv_bytes")
    return None if held is None or not full else held / full


def find_group(row: Row) -> str:
    """Return the group that a task belongs to: ``ruler`` for ``ruler/vt``."""
    return str(row["task"]).partition("/")[0]


def length_key(length: int | None) -> int:
    """Return the sort key of a length; rows without one come last."""
    return _ABSENT if length is None else length


def budget_key(text: str) -> tuple[int, float, str]:
    """Return the sort key of a budget: fractions, tokens, bytes, each downwards."""
    try:
        value = float(text)
    except ValueError:
        return 2, 0.0, text
    return (0 if "." in text else 1), -value, text


def describe_length(length: int | None) -> str:
    """Return a length in words."""
    return "at the texts' own lengths" if length is None else f"at {length:,} tokens"


def group_rows(
    rows: Iterable[Row], key: Callable[[Row], K], order: Callable[[K], Any] = lambda key: key
) -> dict[K, list[Row]]:
    """Return rows by key, each group in the order of the rows; keys are sorted by ``order``."""
    groups: dict[K, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return dict(sorted(groups.items(), key=lambda group: order(group[0])))


def group_by_cell(rows: Iterable[Row]) -> dict[tuple[str, int | None], list[Row]]:
    """Return rows by (task, length), sorted: group, length, task."""
    return group_rows(
        rows,
        lambda row: (str(row["task"]), read_length(row)),
        lambda cell: (cell[0].partition("/")[0], length_key(cell[1]), cell[0]),
    )


def make_chapters(scored: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Return rows that may share a picture (one model, split, protocol and seed), each group with its title."""
    chapters = []
    for (model, split, aware, seed), rows in group_rows(scored, _chapter_key).items():
        title = f"{model}, {split} split, question-{'aware' if aware else 'agnostic'}, seed {seed}"
        chapters.append((title, rows))
    return chapters


def _chapter_key(row: Row) -> tuple[str, str, bool, str]:
    values = (row.get(key) for key in ("model", "split", "seed"))
    model, split, seed = ("unknown" if value is None else str(value) for value in values)
    return model, split, bool(row.get("question_aware")), seed


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The tasks of one group at one length, with a row for each method and budget that did all of them."""

    group: str
    length: int | None
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    """Like result rows, by method and budget; ``score_ci95`` takes the tasks as independent."""
    partial: tuple[MethodKey, ...]
    """Methods that lack a task, and so have no mean."""

    @property
    def title(self) -> str:
        """The group, the number of tasks, and the length."""
        count = "1 task" if len(self.tasks) == 1 else f"mean of {len(self.tasks)} tasks"
        return f"{self.group}, {count} {describe_length(self.length)}"


def average_tasks(rows: Iterable[Row]) -> list[Mean]:
    """Return the means over tasks for each (group, length)."""
    groups = group_rows(rows, lambda row: (find_group(row), read_length(row)), lambda key: (key[0], length_key(key[1])))
    return [_make_mean(group, length, found) for (group, length), found in groups.items()]


def _make_mean(group: str, length: int | None, rows: Sequence[Row]) -> Mean:
    tasks = sorted({str(row["task"]) for row in rows})
    arms = group_rows(
        rows,
        lambda row: (MethodKey.of(row), str(row.get("budget"))),
        lambda arm: (arm[0].order, budget_key(arm[1])),
    )
    latest = {arm: {str(row["task"]): row for row in found} for arm, found in arms.items()}
    whole = {arm: list(by_task.values()) for arm, by_task in latest.items() if len(by_task) == len(tasks)}
    partial = {method for method, _ in arms} - {method for method, _ in whole}
    return Mean(
        group=group,
        length=length,
        tasks=tuple(tasks),
        rows=tuple(map(_average, whole.values())),
        partial=tuple(sorted(partial, key=lambda method: method.order)),
    )


def _average(rows: Sequence[Row]) -> Row:
    """Return one row for the same method and budget on several tasks: bytes are summed, the rest is averaged."""
    merged = {
        key: rows[0].get(key) for key in ("task", "policy", "share", "memory", "budget", "peer", "chunk", "length")
    }
    for key in ("score", "kept_fraction", "decode_ms", "prefill_s", "evict_s"):
        total = _sum(rows, key)
        merged[key] = None if total is None else total / len(rows)
    merged |= {key: _sum(rows, key) for key in ("kv_bytes", "full_kv_bytes", "held", "full", "n")}
    return {**merged, "score_ci95": _joint_interval(rows, merged["score"])}


def _sum(rows: Sequence[Row], key: str) -> float | None:
    """Return the sum of a number over rows, or None if one of them lacks it."""
    values = [value for row in rows if (value := read_number(row, key)) is not None]
    return sum(values) if len(values) == len(rows) else None


def _joint_interval(rows: Sequence[Row], score: float | None) -> list[float] | None:
    """Return the interval of a mean of independent scores: half-widths add in squares, each side on its own."""
    ends = [(read_number(row, "score"), read_interval(row)) for row in rows]
    sides = [(y - ci[0], ci[1] - y) for y, ci in ends if y is not None and ci is not None]
    if score is None or len(sides) != len(rows):
        return None
    down, up = (math.sqrt(sum(side[i] ** 2 for side in sides)) / len(rows) for i in (0, 1))
    return [max(0.0, score - down), min(1.0, score + up)]
