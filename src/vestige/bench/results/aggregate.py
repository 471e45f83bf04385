"""From records, one a sample and arm, to rows, one a task, length and arm."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

Record = dict[str, Any]
Row = dict[str, Any]
MEANS = ("seen", "held", "full", "kv_bytes", "peak_kv_bytes", "full_kv_bytes", "memory_bytes")
MEDIANS = ("prefill_s", "evict_s", "decode_ms")
RESAMPLES = 2000
"""Of the samples, for the interval of a difference."""
_SPREAD = (0.025, 0.975)
_Z = 1.959963984540054  # 95 % of a normal distribution


def interval(scores: Sequence[float]) -> list[float]:
    """Return the 95 % interval of a mean of scores in 0..1, by Wilson's formula.

    Exact in spirit for scores of 0 and 1; for scores between them it is wider than need be, since no variable in 0..1
    varies more than a coin of the same mean. Unlike the normal interval and the bootstrap it does not shrink to
    nothing when all samples agree.
    """
    n, mean = len(scores), statistics.fmean(scores)
    centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


def resampled(values: Sequence[float]) -> list[float] | None:
    """Return the 95 % interval of a mean, by drawing the values anew with repeats; None if there are none.

    The draws are the same every time.
    """
    if not values:
        return None
    known = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = known[drawn].mean(1).quantile(torch.tensor(_SPREAD, dtype=torch.float64)).tolist()
    return [low, high]


def gain(both: Sequence[tuple[float, float]]) -> Row:
    """Return what something adds to the mean score of samples, which are compared with themselves.

    Args:
        both: The score of each with it and without it.
    """
    differences = sorted(one - other for one, other in both)  # whatever order they come in, draws are the same
    return {
        "n": len(both),
        "score": statistics.fmean(one for one, _ in both),
        "without": statistics.fmean(other for _, other in both),
        "gain": statistics.fmean(differences),
        "gain_ci95": resampled(differences),
    }


def aggregate(records: Iterable[Record], failures: Iterable[Record], facts: Mapping[str, Any]) -> list[Row]:
    """Return a row per (task, length, arm), in the order in which they first appear.

    Args:
        records: Finished samples.
        failures: Arms that could not run: ``task, length, arm, error``, and where. With ``left_out``, a count, it is so
            many samples that could not: the rest make a row, whose note says so.
        facts: What all rows share: model, split, seed, versions, ...
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(_key(record), []).append(record)
    rows = {key: dict(facts) | _row(key, group) for key, group in groups.items()}
    for failure in failures:
        key = _key(failure)
        if "left_out" in failure and key in rows:
            left, made = failure["left_out"], rows[key]["n"]
            said = f"{left} of {left + made} samples left out: {failure['error']}"
            rows[key]["note"] = "; ".join(filter(None, (rows[key]["note"], said)))
            continue
        rows[key] = (
            dict(facts)
            | _head(key)
            | {"score": None, "score_ci95": None, "n": 0}
            | {n: failure[n] for n in ("error", "revision")}
        )
    return list(rows.values())


def _key(record: Record) -> tuple[Any, ...]:
    return record["task"], record["length"], *record["arm"].items()


def _head(key: tuple[Any, ...]) -> Row:
    return {"task": key[0], "length": key[1], **dict(key[2:])}


def _row(key: tuple[Any, ...], group: list[Record]) -> Row:
    means = {name: statistics.fmean(record[name] for record in group) for name in MEANS}
    medians = {name: median(record[name] for record in group) for name in MEDIANS}
    tags = [record["tags"] for record in group]
    same = {name: value for name, value in tags[0].items() if all(t.get(name) == value for t in tags)}
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
    """Return revision, versions and device, joined where a run went on with other ones."""

    def joined(values: Iterable[str | None]) -> str | None:
        return ", ".join(dict.fromkeys(value for value in values if value)) or None

    known = [record["versions"] for record in group if "versions" in record]
    found: Row = {"revision": joined(record["revision"] for record in group)}
    if known:
        found["versions"] = {name: joined(versions[name] for versions in known) for name in known[0]}
        found["device"] = joined(record.get("device") for record in group)
    return found


def _score(scores: Sequence[float]) -> Row:
    return {"score": statistics.fmean(scores), "score_ci95": interval(scores), "n": len(scores)}


def median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _parts(group: list[Record], same: Mapping[str, Any]) -> list[Row]:
    """Return scores by the tags in which the samples differ."""
    parts: dict[tuple[Any, ...], list[float]] = {}
    for record in group:
        varying = tuple(item for item in sorted(record["tags"].items()) if item[0] not in same)
        if varying:
            parts.setdefault(varying, []).append(record["score"])
    return [{"tags": dict(tags), **_score(scores)} for tags, scores in sorted(parts.items(), key=lambda x: str(x[0]))]


def _turns(group: list[Record]) -> list[Row]:
    longest = max(len(record["turns"]) for record in group)
    if longest == 1:
        return []
    by_turn = [[r["turns"][t]["score"] for r in group if t < len(r["turns"])] for t in range(longest)]
    return [{"turn": t, **_score(scores)} for t, scores in enumerate(by_turn)]


def _mean_grid(grids: list[list[list[int]]]) -> list[list[float]]:
    """Return the mean over samples of pairs kept by each KV head of each layer; empty if arms did not say."""
    if not all(grids) or len({tuple(map(len, grid)) for grid in grids}) > 1:
        return []
    layers = zip(*grids, strict=True)
    return [[round(statistics.fmean(head), 1) for head in zip(*layer, strict=True)] for layer in layers]
