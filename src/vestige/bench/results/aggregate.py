"""Rows of results, one a task, length and method, from records, one a sample and method; means and intervals."""

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Record = dict[str, Any]
Row = dict[str, Any]
MEANS = ("seen", "held", "full", "kv_bytes", "peak_kv_bytes", "full_kv_bytes", "memory_bytes")
MEDIANS = ("prefill_s", "evict_s", "decode_ms")
RESAMPLES = 2000
"""Draws for the interval of a difference."""
_SPREAD = (0.025, 0.975)
_Z = 1.959963984540054  # 95 % of a normal distribution

K = TypeVar("K", bound=Hashable)


def wilson_interval(scores: Sequence[float]) -> list[float]:
    """Return the 95 % interval of a mean of scores in 0..1, by Wilson's formula.

    The formula is for scores of 0 and 1; for scores between them the interval is too wide, since no variable in 0..1
    varies more than a coin of the same mean. Unlike the normal interval and the bootstrap it does not shrink to
    nothing when all samples agree.
    """
    n, mean = len(scores), statistics.fmean(scores)
    centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def bootstrap_interval(values: Sequence[float]) -> list[float] | None:
    """Return the 95 % interval of a mean, by drawing the values with repeats; None if there are none.

    The draws are the same every time.
    """
    if not values:
        return None
    known = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = known[drawn].mean(1).quantile(torch.tensor(_SPREAD, dtype=torch.float64)).tolist()
    return [low, high]


def gain(both: Sequence[tuple[float, float]]) -> Row:
    """Return the gain in mean score that a part of a method brings, on the same samples.

    Args:
        both: The score of each sample with the part and without it.
    """
    differences = sorted(score - without for score, without in both)  # the draws do not depend on the order
    return {
        "n": len(both),
        "score": statistics.fmean(score for score, _ in both),
        "without": statistics.fmean(without for _, without in both),
        "gain": statistics.fmean(differences),
        "gain_ci95": bootstrap_interval(differences),
    }


def aggregate(records: Iterable[Record], failures: Iterable[Record], facts: Mapping[str, Any]) -> list[Row]:
    """Return a row per (task, length, method), in the order in which they first appear.

    Args:
        records: Finished samples.
        failures: Methods that failed: ``task, length, arm, error, revision``. One with ``left_out``, a count, failed on
            as many samples: the other samples make a row, whose note has the count.
        facts: Columns that all rows share: model, split, seed, versions, ...
    """
    rows = {key: dict(facts) | _make_row(key, group) for key, group in group_by(records, _key).items()}
    for failure in failures:
        key = _key(failure)
        if "left_out" in failure and key in rows:
            count, row = failure["left_out"], rows[key]
            note = f"{count} of {count + row['n']} samples left out: {failure['error']}"
            row["note"] = "; ".join(filter(None, (row["note"], note)))
            continue
        rows[key] = {**facts, **_head(key), "score": None, "score_ci95": None, "n": 0}
        rows[key] |= {name: failure[name] for name in ("error", "revision")}
    return list(rows.values())


def group_by(records: Iterable[Record], key: Callable[[Record], K]) -> dict[K, list[Record]]:
    """Group records by a key; the keys are in the order in which they first appear."""
    groups: dict[K, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _key(record: Record) -> tuple[Any, ...]:
    return record["task"], record["length"], *record["arm"].items()


def _head(key: tuple[Any, ...]) -> Row:
    return {"task": key[0], "length": key[1], **dict(key[2:])}


def _make_row(key: tuple[Any, ...], group: list[Record]) -> Row:
    means = {name: statistics.fmean(record[name] for record in group) for name in MEANS}
    medians = {name: find_median(record[name] for record in group) for name in MEDIANS}
    tags = [record["tags"] for record in group]
    same = {name: value for name, value in tags[0].items() if all(other.get(name) == value for other in tags)}
    return {
        **_head(key),
        **_score([record["score"] for record in group]),
        "kept_fraction": means["held"] / means["full"] if means["full"] else 1.0,
        **means,
        **medians,
        "batch": max(record["batch"] for record in group),
        "tags": same,
        "parts": _parts(group, same),
        "turns": _turns(group),
        "kept": _mean_grid([record["kept"] for record in group]),
        "note": next((record["note"] for record in group if record["note"]), None),
        **_origin(group),
    }


def _origin(group: list[Record]) -> Row:
    """Return revision, versions and device, joined where a resumed run had other ones."""

    def join(values: Iterable[str | None]) -> str | None:
        return ", ".join(dict.fromkeys(value for value in values if value)) or None

    known = [record["versions"] for record in group if "versions" in record]
    found: Row = {"revision": join(record["revision"] for record in group)}
    if known:
        found["versions"] = {name: join(versions[name] for versions in known) for name in known[0]}
        found["device"] = join(record.get("device") for record in group)
    return found


def _score(scores: Sequence[float]) -> Row:
    return {"score": statistics.fmean(scores), "score_ci95": wilson_interval(scores), "n": len(scores)}


def find_mean(values: Sequence[float]) -> float | None:
    """Return the mean of values; None if there are none."""
    return statistics.fmean(values) if values else None


def find_median(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are known; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _parts(group: list[Record], same: Mapping[str, Any]) -> list[Row]:
    """Return scores by the tags in which the samples differ."""
    parts = group_by(group, lambda record: tuple(tag for tag in sorted(record["tags"].items()) if tag[0] not in same))
    return [
        {"tags": dict(tags), **_score([record["score"] for record in records])}
        for tags, records in sorted(parts.items(), key=lambda part: str(part[0]))
        if tags
    ]


def _turns(group: list[Record]) -> list[Row]:
    """Return scores by turn; none if every sample has one turn."""
    longest = max(len(record["turns"]) for record in group)
    if longest == 1:
        return []
    by_turn = [[record["turns"][t]["score"] for record in group if t < len(record["turns"])] for t in range(longest)]
    return [{"turn": t, **_score(scores)} for t, scores in enumerate(by_turn)]


def _mean_grid(grids: list[list[list[int]]]) -> list[list[float]]:
    """Return the mean over samples of pairs kept by each KV head of each layer; empty if records have none."""
    if not all(grids) or len({tuple(map(len, grid)) for grid in grids}) > 1:
        return []
    layers = zip(*grids, strict=True)
    return [[round(statistics.fmean(head), 1) for head in zip(*layer, strict=True)] for layer in layers]
