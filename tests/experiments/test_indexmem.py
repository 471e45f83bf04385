"""IndexMem's comparison: at equal bytes, every memory beside none."""

import json
from itertools import product

import pytest
import torch

from experiments import comparison, equal_bytes, indexmem, memory_restoration
from vestige import KVCache, attach, memory, policies, prefill
from vestige.bench.config import BenchConfig
from vestige.bench.methods.method import cross
from vestige.bench.results.aggregate import MEANS, MEDIANS, aggregate
from vestige.budget import Budget
from vestige.testing import random_ids, tiny

MODEL = tiny("llama", vocab_size=128, max_position_embeddings=8192)
WHOLE = ("full", "none", "1.0")
PLAIN = equal_bytes.measure_plain_pair(MODEL)


@pytest.mark.parametrize("name", [*indexmem.MEMORIES])
@pytest.mark.parametrize("policy", indexmem.FIELD)
def test_methods_weigh_what_was_measured(policy, name):
    own = equal_bytes.weigh(MODEL, policy, name)
    made = policies.make(policy, Budget.fraction(equal_bytes.find_kept_fraction(own, PLAIN, 400, 0.5)))
    cache = KVCache(MODEL, made, memory=memory.make(name))
    with attach(MODEL), torch.no_grad():
        prefill(MODEL, random_ids(MODEL, 1, 400), cache, chunk=400)
    rows = sum(layer.rows for layer in cache.evictable)
    aimed = 0.5 * 400 * PLAIN * rows
    assert aimed - (own.pair + 1) * rows <= cache.report().kv_bytes <= aimed


def test_a_cache_that_keeps_everything_weighs_its_pairs():
    assert PLAIN == 2 * 16 * 4
    assert equal_bytes.weigh(MODEL, "full") == equal_bytes.Weight(pair=PLAIN + 4, fixed=0.0)
    indexed = equal_bytes.weigh(MODEL, "indexmem")
    assert indexed.pair == PLAIN + 4 + 4 * 4 + 4 and indexed.fixed == 0
    assert equal_bytes.weigh(MODEL, "snapkv").fixed == 32 * 2 * 16 * 4  # the latest queries of two heads each


def test_what_weighs_more_than_the_budget_beside_its_pairs_is_left_out_and_named():
    part = equal_bytes.make_part(MODEL, ("expected_attention", "keydiff"), ("0.5", "0.05"), 200, tasks=("niah",))
    assert {(policy, fraction) for (policy, _, _), fraction in part.fractions.items()} == {
        ("expected_attention", "0.5"), ("keydiff", "0.5"), ("keydiff", "0.05"),
    }  # fmt: skip
    assert part.impossible == ("expected_attention, memory none, at 0.05",)


def test_the_runs_are_what_was_asked_for():
    made = indexmem.make_parts(MODEL)
    assert set(made) == {"agnostic", "aware", "memories-agnostic", "memories-aware", "map-1024", "map-4096"}
    for name, part in made.items():
        config, memories, mapped = part.config, name.startswith("memories"), name.startswith("map")
        assert config.split == "test" and config.question_aware == name.endswith("aware")
        length = int(name[4:]) if mapped else 4096 if memories else 2048
        assert config.lengths == (length,) and config.samples == (10 if memories else 20)
        assert "niah" in config.tasks or memories
        methods = product(*((indexmem.REMEMBERING, indexmem.MEMORIES) if memories else (indexmem.FIELD, ("none",))))
        fractions = {"0.1"} if mapped else {"0.25", "0.1", "0.05"}
        wanted = {(*method, fraction) for method in methods for fraction in fractions}
        assert {(policy, name, fraction) for (policy, name, _), fraction in part.fractions.items()} == wanted
        assert {(arm.policy, arm.memory, arm.budget) for arm in config.methods} == {*part.fractions, WHOLE}


def test_a_map_has_the_needles_of_each_length_and_depth():
    part = indexmem.make_parts(MODEL)["agnostic"]
    given = records(part, indexmem.OURS, "none", "0.1", 1, 0) + records(part, "full", "none", "1.0", 1)
    given += records(part, indexmem.OURS, "none", "0.05", 1)
    failed = {"task": "niah", "length": 4096, "n": 0, "error": "no room", **given[0]["arm"]}
    shown = indexmem.draw_needles([(row, part.budget_of({"arm": row})) for row in [*rows_of(given), failed]])
    assert all(said in shown for said in ("25%", "4,096", ">indexmem", ">full", "1.00", "0.00"))


def records(part, policy: str, name: str, fraction: str, *scores: float) -> list[dict]:
    whole = {"policy": "full", "memory": "none", "budget": "1.0"}
    key = next((key for key, value in part.fractions.items() if key[:2] == (policy, name) and value == fraction), None)
    arm = (whole if key is None else {"policy": policy, "memory": name, "budget": key[2]}) | {"share": None}
    return [
        {
            "task": "niah",
            "index": i,
            "length": 4096,
            "score": float(score),
            "kv_bytes": 1e6,
            "arm": arm | {"peer": None},
        }
        | {"tags": {"depth": i / 4}}
        for i, score in enumerate(scores)
    ]


def rows_of(given: list[dict]) -> list[dict]:
    """Return the rows of records that say no more than a verdict needs."""
    unsaid = dict.fromkeys((*MEANS, *MEDIANS), 0.0) | {
        "batch": 1,
        "turns": [0],
        "kept": [],
        "note": None,
        "revision": "",
    }
    return aggregate([unsaid | record for record in given], [], {})


def test_a_memory_is_beside_the_same_policy_without_one_at_equal_bytes():
    part = indexmem.make_parts(MODEL)["memories-aware"]
    policy = indexmem.REMEMBERING[1]
    given = records(part, policy, "none", "0.1", 1, 0, 0) + records(part, policy, "moments", "0.1", 1, 1)
    given += records(part, policy, "moments", "0.05", 1) + records(part, "full", "none", "1.0", 1, 1, 1)
    given += records(part, indexmem.OURS, "none", "0.1", 1) + records(part, indexmem.OURS, "moments", "0.1", 0)
    _, row, every = indexmem.measure_gains(given, part.budget_of)
    assert every["policy"] == "all" and every["n"] == 3 and every["gain"] == 0.0
    assert row["memory"] == "moments" and row["fraction"] == "0.1" and row["n"] == 2 and row["gain"] == 0.5
    assert "| retention | 0.1 | moments | 2 | 0.50 | 1.00 | +0.50" in indexmem.format_gains([row])


def test_the_verdict_compares_what_weighs_the_same():
    part = indexmem.make_parts(MODEL)["memories-aware"]
    given = records(part, indexmem.OURS, "none", "0.1", 1, 1) + records(part, "retention", "none", "0.1", 0, 1)
    given += records(part, "full", "none", "1.0", 1, 1)
    rows = {row["policy"]: row for row in comparison.verdict(given, indexmem.OURS, part.budget_of)}
    assert rows["retention"]["budget"] == rows[indexmem.OURS]["budget"] == "0.1"
    assert rows["retention"]["ours_above"] == 0.5 and rows[indexmem.OURS]["of_full"] == 1.0


def test_the_summary_is_of_what_is_there(tmp_path):
    made = indexmem.make_parts(MODEL)
    for name in ("agnostic", "map-1024", "memories-aware"):
        part, rest = made[name], ("indexmem(share=model)", "retention")
        given = records(part, "full", "none", "1.0", 1, 1) + records(part, rest[1], "none", "0.1", 0, 1)
        given += records(part, rest[0], "none", "0.1", 1, 1)
        given += records(part, rest[0], "moments", "0.1", 1, 0) if name.startswith("memories") else []
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.jsonl").write_text("\n".join(map(json.dumps, given)))
        (tmp_path / name / "rows.json").write_text(json.dumps({"rows": rows_of(given)}))
    indexmem.summarize(tmp_path, made)
    said = (tmp_path / "verdict.md").read_text()
    (tmp_path / "agnostic" / "samples.jsonl").unlink()  # samples are not committed; what they came to is
    indexmem.summarize(tmp_path, made)
    assert (tmp_path / "verdict.md").read_text() == said
    for shown in ("## agnostic", "## map-1024", "| moments | 2 | 1.00 | 0.50 | -0.50", "+0.50", "needles.svg"):
        assert shown in said
    assert "## map-4096" not in said and (tmp_path / "scores-map-1024.svg").exists()
    assert [row["policy"] for row in json.loads((tmp_path / "memories-aware.json").read_text())] == [rest[0], "all"]


# What memories give back.


def test_a_memory_that_keeps_each_pair_gives_back_what_an_eviction_took(chatter):
    model, tokenizer = chatter
    names = ("none", EXACT, "moments")
    arms = cross(("random", "retention"), ("0.4", "0.1"), memories=names)
    config = BenchConfig(tasks=("ruler/niah_single_1",), methods=arms, lengths=(480,), samples=1, answer_room=16)
    found = {arm_of(one): one for one in memory_restoration.measure(config, model, tokenizer)}
    assert len(found) == 12
    for policy in ("random", "retention"):
        plain = {budget: found[policy, "none", budget] for budget in ("0.4", "0.1")}
        assert 0 < plain["0.4"]["lost"] < plain["0.1"]["lost"] < 1 and plain["0.4"]["error"] < plain["0.1"]["error"]
        for budget, one in plain.items():
            exact = found[policy, EXACT, budget]  # more centroids than pairs
            assert exact["lost"] == one["lost"] and exact["error"] < 1e-6 < 1e-4 < one["error"]
    known = [one["arm"] for one in found.values()]
    assert not list(
        memory_restoration.measure(config, model, tokenizer, known=lambda task, length, index, arm, *of: arm in known)
    )
    rows = {
        (row["policy"], row["budget"], row["memory"]): row
        for row in memory_restoration.aggregate_records(found.values())
    }
    assert rows["random", "0.4", "none"]["left"] == 1.0 and rows["random", "0.4", EXACT]["left"] < 1e-2
    said = memory_restoration.format_table(rows.values()).splitlines()
    moments = rows["random", "0.4", "moments"]["left"]
    assert len(said) == 6 and f"| {moments:.0%} ({moments:.0%} to {moments:.0%}) |" in said[2]


EXACT = "centroids(centroids=300, dtype=float32)"


def arm_of(record: dict) -> tuple[str, str, str]:
    return record["arm"]["policy"], record["arm"]["memory"], record["arm"]["budget"]


def test_the_better_and_the_worse_evictors_are_measured_beside_chance():
    config = memory_restoration.make_comparison()
    assert config.split == "test" and config.lengths == (4096,) and config.tasks == indexmem.TASKS[1:3]
    assert {arm.policy for arm in config.methods} == {*indexmem.REMEMBERING, "random"}
    assert {arm.memory for arm in config.methods} == set(indexmem.MEMORIES)
