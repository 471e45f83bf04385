"""Rows: intervals, means, medians and breakdowns, computed by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

import vestige
from vestige.bench.results import provenance
from vestige.bench.results.aggregate import aggregate, wilson_interval

ARM = {"policy": "snapkv", "share": "head", "memory": "none", "budget": "0.25", "peer": None}
FACTS = {"model": "tiny", "split": "dev", "seed": 0, "batch": 1}


def record(**changes: Any) -> dict[str, Any]:
    made = {
        "task": "lamps", "length": 100, "index": 0, "tags": {}, "arm": ARM, "turns": [{"score": 1.0}],
        "score": 1.0, "seen": 90, "held": 60, "full": 240, "kv_bytes": 1000, "peak_kv_bytes": 3000,
        "full_kv_bytes": 4000, "memory_bytes": 0, "prefill_s": 1.0, "evict_s": 0.5, "decode_ms": 10.0,
        "kept": [[10, 20], [15, 15]], "batch": 1, "note": None, "revision": "abc",
    }  # fmt: skip
    return made | changes


def row(*records: dict[str, Any]) -> dict[str, Any]:
    (made,) = aggregate(records, [], FACTS)
    assert json.loads(json.dumps(made)) == made
    return made


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [
        ([1.0] * 20, 0.8389, 1.0),  # 20 / (20 + 1.96^2)
        ([0.0] * 20, 0.0, 0.1611),
        ([1.0], 0.2065, 1.0),
        ([1.0] * 5 + [0.0] * 5, 0.2366, 0.7634),
        ([0.5] * 10, 0.2366, 0.7634),  # as wide as a coin's
        ([1.0] * 8 + [0.0] * 2, 0.4902, 0.9433),
    ],
)
def test_the_interval_is_wilsons(scores, low, high):
    assert wilson_interval(scores) == pytest.approx([low, high], abs=5e-5)


def test_an_interval_lies_in_0_to_1_and_around_its_mean():
    for n in (1, 2, 7, 20, 500):
        for right in {0, 1, n // 2, n}:
            low, high = wilson_interval([1.0] * right + [0.0] * (n - right))
            assert 0 <= low <= right / n + 1e-12 and right / n - 1e-12 <= high <= 1


def test_sizes_are_means_and_clocks_are_medians():
    made = row(
        record(held=60, full=240, kv_bytes=1000, prefill_s=1.0, evict_s=0.2, decode_ms=10.0),
        record(index=1, held=30, full=60, kv_bytes=4000, prefill_s=3.0, evict_s=0.4, decode_ms=None),
        record(index=2, held=0, full=60, kv_bytes=1000, prefill_s=8.0, evict_s=0.3, decode_ms=40.0),
    )
    assert (made["held"], made["full"], made["kv_bytes"]) == (30, 120, 2000)
    assert made["kept_fraction"] == 0.25  # of all pairs, not the mean of fractions
    assert (made["prefill_s"], made["evict_s"], made["decode_ms"]) == (3.0, 0.3, 25.0)
    assert row(record(decode_ms=None))["decode_ms"] is None
    assert row(record(held=0, full=0))["kept_fraction"] == 1.0


def test_score_n_and_interval():
    made = row(*(record(index=i, score=score) for i, score in enumerate((1.0, 0.0, 0.5, 0.5))))
    assert (made["score"], made["n"]) == (0.5, 4)
    assert made["score_ci95"] == wilson_interval([0.5] * 4)


def test_a_row_for_each_task_length_and_arm_in_order_of_appearance():
    other = ARM | {"share": "model"}
    records = [
        record(task="b"), record(task="a", length=200), record(task="a"), record(task="b", arm=other),
        record(task="b", index=1), record(task="b", arm=ARM | {"peer": "x"}),
    ]  # fmt: skip
    rows = aggregate(records, [], FACTS)
    assert [(r["task"], r["length"], r["share"], r["peer"], r["n"]) for r in rows] == [
        ("b", 100, "head", None, 2), ("a", 200, "head", None, 1), ("a", 100, "head", None, 1),
        ("b", 100, "model", None, 1), ("b", 100, "head", "x", 1),
    ]  # fmt: skip
    assert all(FACTS.items() <= r.items() and ARM.keys() <= r.keys() for r in rows)
    assert aggregate([], [], FACTS) == []


def test_parts_are_by_the_tags_in_which_samples_differ():
    tags = [{"depth": 0.0, "key": "x"}, {"depth": 0.5, "key": "x"}, {"depth": 0.5, "key": "x"}]
    made = row(*(record(index=i, tags=t, score=s) for i, (t, s) in enumerate(zip(tags, (1.0, 0.0, 1.0), strict=True))))
    assert made["tags"] == {"key": "x"}
    assert made["parts"] == [
        {"tags": {"depth": 0.0}, "score": 1.0, "score_ci95": wilson_interval([1.0]), "n": 1},
        {"tags": {"depth": 0.5}, "score": 0.5, "score_ci95": wilson_interval([1.0, 0.0]), "n": 2},
    ]


def test_tags_that_all_share_and_no_tags_make_no_parts():
    assert row(record(tags={"prompts": "own"}), record(index=1, tags={"prompts": "own"}))["parts"] == []
    assert row(record())["parts"] == [] and row(record())["tags"] == {}


def test_a_tag_that_some_samples_lack_divides_them():
    parts = row(record(tags={"hop": 1}), record(index=1), record(index=2, tags={"hop": 2}))["parts"]
    assert sorted(part["tags"].get("hop", 0) for part in parts) == [1, 2]  # what has no tag is in no part
    assert sum(part["n"] for part in parts) == 2


def test_turns_are_scored_apart_and_over_those_that_have_them():
    scored = [[1.0, 0.0, 0.5], [0.0, 0.0]]
    made = row(*(record(index=i, turns=[{"score": s} for s in turns]) for i, turns in enumerate(scored)))
    assert [(t["turn"], t["score"], t["n"]) for t in made["turns"]] == [(0, 0.5, 2), (1, 0.0, 2), (2, 0.5, 1)]
    assert made["turns"][1]["score_ci95"] == wilson_interval([0.0, 0.0])
    assert row(record())["turns"] == []


def test_the_kept_grid_is_the_mean_of_each_head():
    made = row(record(kept=[[10, 20], [15, 15]]), record(index=1, kept=[[20, 20], [0, 16]]))
    assert made["kept"] == [[15.0, 20.0], [7.5, 15.5]]
    assert row(record(kept=[[1], [2, 3]]))["kept"] == [[1.0], [2.0, 3.0]]  # layers may differ in heads


@pytest.mark.parametrize("grids", [([], []), ([[1, 2]], []), ([[1, 2]], [[1], [2]])])
def test_without_a_grid_of_every_sample_there_is_none(grids):
    assert row(*(record(index=i, kept=grid) for i, grid in enumerate(grids)))["kept"] == []


def test_a_note_of_any_sample_is_the_rows():
    assert row(record(), record(index=1, note="keys were masked"))["note"] == "keys were masked"
    assert row(record())["note"] is None


@pytest.mark.parametrize(("changed", "found"), [("", "abc"), (" M src/vestige/cache.py", "abc-dirty")])
def test_a_revision_is_dirty_where_the_code_was_changed(monkeypatch, changed, found):
    def git(*words):
        if words[0] == "status":
            assert words[-1] == str(Path(vestige.__file__).parent)  # results that are being made do not count
        return {"ls-files": "facts.py", "status": changed, "rev-parse": "abc"}[words[0]]

    monkeypatch.setattr(provenance, "_git", git)
    assert provenance.find_revision() == found


def test_code_outside_of_a_checkout_has_no_revision(monkeypatch):
    monkeypatch.setattr(provenance, "__file__", "/")
    assert provenance.find_revision() is None


def test_the_revision_names_every_one_that_took_part():
    assert row(record())["revision"] == "abc"
    assert row(record(), record(index=1, revision="def"), record(index=2))["revision"] == "abc, def"
    assert row(record(revision=None), record(index=1, revision=None))["revision"] is None


def test_the_batch_is_the_largest():
    assert row(record(batch=4), record(index=1, batch=3))["batch"] == 4


def test_a_failed_arm_is_a_row_with_its_reason():
    failure = {"task": "lamps", "length": 100, "arm": ARM, "error": "no room", "revision": "abc"}
    (made,) = aggregate([], [failure], FACTS)
    assert FACTS.items() <= made.items() and ARM.items() <= made.items()
    assert (made["score"], made["score_ci95"], made["n"], made["error"]) == (None, None, 0, "no room")
    assert made["revision"] == "abc"


def test_a_failure_after_some_samples_is_a_failed_row_still():
    failure = {"task": "lamps", "length": 100, "arm": ARM, "error": "no room", "revision": "abc"}
    (made,) = aggregate([record()], [failure], FACTS)
    assert made["score"] is None and made["error"] == "no room"


def test_samples_that_were_left_out_are_a_note_beside_the_score_of_the_rest():
    left = {"task": "lamps", "length": 100, "arm": ARM, "error": "too short", "revision": "abc", "left_out": 3}
    (made,) = aggregate([record(note="seen")], [left], FACTS)
    assert made["n"] == 1 and made["score"] is not None and "error" not in made
    assert made["note"] == "seen; 3 of 4 samples left out: too short"
    (none,) = aggregate([], [left], FACTS)
    assert none["score"] is None and none["error"] == "too short"
