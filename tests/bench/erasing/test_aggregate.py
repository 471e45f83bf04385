"""How replies are judged and what records come to, by hand."""

import math
from typing import Any

import pytest
import torch

from vestige.bench.erasing.aggregate import aggregate
from vestige.bench.erasing.divergence import compare
from vestige.bench.erasing.sample import Question
from vestige.bench.erasing.scoring import keep_sample, score_reply
from vestige.bench.results.aggregate import bootstrap_interval

TARGET = Question(kind="target", text="Who?", answers=("Ann",), forbidden=("Bo",))


def reply(kind: str = "target", exact: bool = True, **changes: Any) -> dict[str, Any]:
    made = {
        "kind": kind, "exact": exact, "f1": float(exact), "correct": exact, "clean_correct": True, "leak": not exact,
        "kl": 0.5, "top1": 1.0, "tokens": 4,
    }  # fmt: skip
    return made | changes


def record(index: int, method: str, *replies: dict[str, Any], **changes: Any) -> dict[str, Any]:
    made = {
        "task": "needles_early", "length": 1024, "index": index, "method": method, "kept": True, "kept_only": False,
        "arm": {"policy": "full", "share": "head", "memory": "none", "budget": "1.0", "peer": method},
        "questions": list(replies), "edit_s": 1.0 + index, "slots_dropped": 10, "slots_replaced": 0, "slots_left": 0,
        "suffix_left": 5, "tokens_recomputed": 0, "held": 90, "context_tokens": 100, "span_tokens": [4, 6],
    }  # fmt: skip
    return made | changes


def test_a_reply_is_compared_with_the_clean_one_the_answers_and_what_is_forbidden():
    found = score_reply(TARGET, "It was Bo.", "It was Ann")
    assert not found["exact"] and found["f1"] == pytest.approx(2 * 2 / 6)
    assert (found["correct"], found["clean_correct"], found["leak"], found["clean_leak"]) == (False, True, True, False)
    same = score_reply(TARGET, "the ANN.", "Ann")
    assert same["exact"] and same["f1"] == 1.0 and same["correct"]
    nothing = score_reply(Question(kind="leak", text="?"), "", "")
    assert nothing["exact"] and nothing["f1"] == 1.0 and nothing["correct"] is nothing["leak"] is None


@pytest.mark.parametrize(
    ("replies", "kept"),
    [
        ([reply(correct=False), reply("retained", False)], True),
        ([reply(correct=True)], False),
        ([reply(correct=False, clean_correct=False)], False),
        ([reply(correct=False), reply(correct=True)], True),
        ([reply("retained"), reply("leak", answers=[])], True),
        ([reply("retained"), reply("retained", clean_correct=False)], False),
    ],
)
def test_the_filter_wants_a_right_clean_reply_and_a_wrong_untouched_one(replies, kept):
    assert keep_sample(replies) is kept


def test_divergence_and_agreement_are_means_over_the_reply():
    clean = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    other = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    found = compare(clean, other)
    first = 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)
    assert found.kl == pytest.approx(first / 2) and found.top1 == 0.5
    assert compare(clean, clean).kl == 0.0 and compare(clean, clean).top1 == 1.0


def test_a_row_has_means_intervals_medians_and_the_filtered_samples_apart():
    records = [
        record(0, "drop", reply(), reply("retained"), reply("leak", leak=True), reply("leak", leak=False)),
        record(1, "drop", reply(exact=False, f1=0.5), reply("retained", False), reply("leak", leak=False), kept=False),
        record(2, "drop", reply(), reply("retained", kl=1.1), kept=True),
    ]
    (row,) = aggregate(records, {"model": "m"})
    assert (row["model"], row["task"], row["length"], row["method"]) == ("m", "needles_early", 1024, "drop")
    assert (row["policy"], row["budget"], row["n"], row["n_kept"], row["error"]) == ("full", "1.0", 3, 2, None)
    assert row["exact"] == pytest.approx(2 / 3) and row["exact_kept"] == 1.0 and row["f1"] == pytest.approx(2.5 / 3)
    assert row["exact_ci95"][0] < row["exact"] < row["exact_ci95"][1] and row["exact_kept_ci95"][1] == pytest.approx(1)
    assert row["stale"] == pytest.approx(1 / 3) and row["leak_rate"] == 0.5 and row["leak_rate_kept"] == 1.0
    assert row["retained_exact"] == pytest.approx(2 / 3) and row["retained_kl"] == pytest.approx((0.5 + 0.5 + 1.1) / 3)
    assert row["edit_s"] == 2.0
    assert row["span_tokens"] == 10 and row["slots_dropped"] == 10 and row["held"] == 90
    assert row["exact_over_recompute"] is None and row["exact_over_recompute_ci95"] is None


def test_differences_to_recompute_are_paired_by_sample():
    bound = [record(i, "recompute", reply(exact=exact)) for i, exact in enumerate([True, True, False])]
    other = [record(i, "drop", reply(exact=exact)) for i, exact in enumerate([True, False])]
    rows = {row["method"]: row for row in aggregate([*bound, *other], {})}
    assert rows["drop"]["exact_over_recompute"] == -0.5
    low, high = rows["drop"]["exact_over_recompute_ci95"]
    assert -1 <= low < -0.5 < high <= 0
    assert rows["recompute"]["exact_over_recompute"] == 0 == rows["recompute"]["exact_over_recompute_ci95"][1]
    evicted = record(0, "drop", reply(), arm=other[0]["arm"] | {"policy": "kvzip", "budget": "0.25"})
    (row,) = [one for one in aggregate([*bound, evicted], {}) if one["policy"] == "kvzip"]
    assert row["exact_over_recompute"] is None and row["budget"] == "0.25"


def test_lengths_can_be_pooled():
    pairs = [(length, method) for length in (1024, 2048) for method in ("recompute", "drop")]
    records = [record(0, method, reply(exact=method == "recompute"), length=length) for length, method in pairs]
    rows = aggregate(records, {}, by=("task",))
    assert [(row["method"], row["length"], row["n"], row["exact"]) for row in rows] == [
        ("recompute", None, 2, 1.0), ("drop", None, 2, 0.0),
    ]  # fmt: skip
    assert rows[1]["exact_over_recompute"] == -1.0


def test_tasks_without_targets_have_none_and_failures_are_rows_with_their_reason():
    failed = {"task": "harmless", "length": 1024, "method": "shift", "error": "no", "index": 0}
    rows = aggregate([record(0, "drop", reply("retained"), task="harmless"), record(0, "x") | failed], {})
    assert rows[0]["exact"] is None is rows[0]["exact_ci95"] and rows[0]["retained_exact"] == 1.0
    assert rows[1]["error"] == "no" and rows[1]["n"] == 0 and rows[1]["edit_s"] is None


def test_an_interval_by_resampling_is_the_same_every_time_and_holds_the_mean():
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    low, high = bootstrap_interval(values)
    assert bootstrap_interval(values) == [low, high] and low < 4 / 6 < high
    assert bootstrap_interval([0.5, 0.5]) == [0.5, 0.5] and bootstrap_interval([]) is None
