"""IndexMem's comparison: at equal bytes, every memory beside none."""

import pytest
import torch

from vestige import KVCache, attach, memory, policies, prefill
from vestige.budget import Budget
from vestige.recipes import equal, indexmem, standing
from vestige.testing import random_ids, tiny

MODEL = tiny("llama", vocab_size=128, max_position_embeddings=8192)
PLAIN = equal.weight(MODEL, "full")


@pytest.mark.parametrize("name", [*indexmem.MEMORIES])
@pytest.mark.parametrize("policy", indexmem.FIELD)
def test_methods_weigh_what_was_measured(policy, name):
    own = equal.weight(MODEL, policy, name)
    made = policies.make(policy, Budget.fraction(equal.share(own, PLAIN, 400, 0.5)))
    cache = KVCache(MODEL, made, memory=memory.make(name))
    with attach(MODEL), torch.no_grad():
        prefill(MODEL, random_ids(MODEL, 1, 400), cache, chunk=400)
    rows = sum(layer.rows for layer in cache.evictable)
    aimed = 0.5 * 400 * PLAIN.pair * rows
    assert aimed - (own.pair + 1) * rows <= cache.report().kv_bytes <= aimed


def test_a_cache_that_keeps_everything_weighs_its_pairs():
    assert equal.Weight(pair=2.0 * 16 * 4 + 4, fixed=0.0) == PLAIN
    indexed = equal.weight(MODEL, "indexmem")
    assert indexed.pair == PLAIN.pair + 4 * 4 + 4 and indexed.fixed == 0
    assert equal.weight(MODEL, "snapkv").fixed == 32 * 2 * 16 * 4  # the latest queries of two heads each


def test_the_runs_are_what_was_asked_for():
    made = indexmem.parts(MODEL)
    assert set(made) == {"agnostic", "aware", "memories-agnostic", "memories-aware"}
    for name, part in made.items():
        config = part.config
        assert config.split == "test" and config.question_aware == name.endswith("aware")
        memories = name.startswith("memories")
        assert config.lengths == ((4096,) if memories else (2048,)) and config.samples == (10 if memories else 20)
        policies_of = {arm.policy for arm in config.arms} - {"full"}
        assert policies_of == set(indexmem.REMEMBERING if memories else indexmem.FIELD)
        fractions = {(arm.policy, arm.memory): set() for arm in config.arms if arm.policy != "full"}
        for arm in config.arms:
            if arm.policy != "full":
                fractions[arm.policy, arm.memory].add(part.fractions[arm.policy, arm.memory, arm.budget])
        assert all(found == {"0.25", "0.1", "0.05"} for found in fractions.values())
    assert {arm.memory for arm in made["memories-aware"].config.arms} == set(indexmem.MEMORIES)


def records(part, policy: str, name: str, fraction: str, *scores: float) -> list[dict]:
    whole = {"policy": "full", "memory": "none", "budget": "1.0"}
    key = next((key for key, value in part.fractions.items() if key[:2] == (policy, name) and value == fraction), None)
    arm = (whole if key is None else {"policy": policy, "memory": name, "budget": key[2]}) | {"share": None}
    return [
        {"task": "t", "index": i, "length": 4096, "score": score, "kv_bytes": 1e6, "arm": arm | {"peer": None}}
        for i, score in enumerate(scores)
    ]


def test_a_memory_is_beside_the_same_policy_without_one_at_equal_bytes():
    part = indexmem.parts(MODEL)["memories-aware"]
    policy = indexmem.REMEMBERING[1]
    given = records(part, policy, "none", "0.1", 1, 0, 0) + records(part, policy, "moments", "0.1", 1, 1)
    given += records(part, policy, "moments", "0.05", 1) + records(part, "full", "none", "1.0", 1, 1, 1)
    (row,) = indexmem.gains(given, part.budget_of)
    assert row["memory"] == "moments" and row["fraction"] == "0.1" and row["n"] == 2 and row["gain"] == 0.5
    assert "| retention | 0.1 | moments | 2 | 0.50 | 1.00 | +0.50" in indexmem.gains_table([row])


def test_the_verdict_compares_what_weighs_the_same():
    part = indexmem.parts(MODEL)["memories-aware"]
    given = records(part, indexmem.OURS, "none", "0.1", 1, 1) + records(part, "retention", "none", "0.1", 0, 1)
    given += records(part, "full", "none", "1.0", 1, 1)
    rows = {row["policy"]: row for row in standing.verdict(given, indexmem.OURS, part.budget_of)}
    assert rows["retention"]["budget"] == rows[indexmem.OURS]["budget"] == "0.1"
    assert rows["retention"]["ours_above"] == 0.5 and rows[indexmem.OURS]["of_full"] == 1.0
