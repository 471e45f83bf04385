"""LagKV and R-KV, which look for what repeats itself, against naive oracles."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOMY, made
from tests.policies.test_field import generate, positions_of, read
from tests.policies.test_policies import EXTRAS, random_observation, rows_of
from vestige import Budget, Observation, PolicyError, policies
from vestige.policies import r_kv
from vestige.testing import random_ids, tiny

# LagKV.


def naive_lagkv(obs: Observation, sink: int, lag: int) -> list[float]:
    scores = []
    for start, end in pairwise(obs.cu_seqlens):
        row = [1.0] * (end - start)
        begin = sum(p < sink for p in obs.positions[start:end].tolist())
        for k in range((end - start - begin) // lag - 1):
            slots = range(begin + k * lag, begin + (k + 1) * lag)
            worth = [0.0] * lag
            for states in (obs.keys[start:end].double().tolist(), obs.values[start:end].double().tolist()):
                deviations = []
                for slot in slots:
                    scaled = []
                    for channel, x in enumerate(states[slot]):
                        reference = [states[other + lag][channel] for other in slots]
                        scaled.append((x - min(reference)) / (max(reference) - min(reference)))
                    mean = sum(scaled) / len(scaled)
                    deviations.append(math.sqrt(sum((x - mean) ** 2 for x in scaled) / (len(scaled) - 1)))
                most = max(deviations)
                total = sum(math.exp(d - most) for d in deviations)
                worth = [w + math.exp(d - most) / total for w, d in zip(worth, deviations, strict=True)]
            for slot, w in zip(slots, worth, strict=True):
                row[slot] = sum(other < w for other in worth) / lag
        scores += row
    return scores


@pytest.mark.parametrize("lag", [2, 3, 5, 100])
@pytest.mark.parametrize("sink", [0, 1, 4])
def test_lagkv_equals_the_naive_one(sink, lag):
    obs = random_observation(13, seen=(24, 17))
    scores = made("lagkv", sink=sink, lag=lag).score(obs)
    torch.testing.assert_close(scores, torch.tensor(naive_lagkv(obs, sink, lag)))
    assert (scores < 1).any() == (lag < 100)


def test_lagkv_takes_as_many_of_each_partition_and_leaves_the_last_and_the_remainder():
    model = tiny("llama")
    ids = random_ids(model, 1, 47, seed=14)
    cache = read(model, policies.LagKV(budget=Budget.tokens(27), sink=2, window=3, lag=10), ids, chunk=47)
    for positions in positions_of(cache):  # 2 sinks, 15 of the tail, 10 more of 3 partitions
        assert positions[:2] == [0, 1] and positions[-15:] == list(range(32, 47))
        taken = [sum(begin <= p < begin + 10 for p in positions) for begin in (2, 12, 22)]
        assert sorted(taken) == [3, 3, 4]


def test_a_budget_below_the_lag_keeps_sinks_and_the_most_recent():
    model = tiny("llama")
    ids = random_ids(model, 1, 40, seed=15)
    cache = read(model, policies.LagKV(budget=Budget.tokens(9), sink=2, window=3, lag=16), ids, chunk=40)
    assert positions_of(cache) == [[0, 1, *range(33, 40)]] * 6


@pytest.mark.parametrize("lag", [1, 0, -4])
def test_lagkv_refuses_partitions_without_an_order(lag):
    with pytest.raises(PolicyError, match=f"lag must be at least 2, got {lag}"):
        made("lagkv", lag=lag)


# R-KV.


def naive_rkv(obs: Observation, policy) -> list[float]:
    scores = []
    for row, held_ in enumerate(rows_of(obs)):
        b, kv_head = divmod(row, obs.kv_heads)
        latest = min(policy.observed, obs.queries[b].shape[1])
        older = [slot for slot, p in enumerate(held_) if p < obs.seen[b] - latest]
        worth = dict.fromkeys(range(len(held_)), 0.0)
        keys = obs.keys[obs.cu_seqlens[row] : obs.cu_seqlens[row + 1]].double()
        importance = naive_importance(obs, b, kv_head, [keys[slot] for slot in older], policy)
        redundancy = naive_redundancy([keys[slot].tolist() for slot in older], policy.similar)
        for n, slot in enumerate(older):
            worth[slot] = policy.weight * importance[n] - (1 - policy.weight) * redundancy[n]
        scores += worth.values()
    return scores


def naive_importance(obs: Observation, b: int, kv_head: int, keys: list[Tensor], policy) -> list[float]:
    group = obs.queries[b].shape[0] // obs.kv_heads
    queries = obs.queries[b][kv_head * group : (kv_head + 1) * group, -policy.observed :].double()
    importance = [0.0] * len(keys)
    for number in range(queries.shape[1]):
        logits = []
        for key in keys:
            products = [float(head[number] @ key) * obs.attention.scaling for head in queries]
            cap = obs.attention.softcap
            logits.append(max(x if cap is None else cap * math.tanh(x / cap) for x in products))
        weights = [math.exp(x) / sum(map(math.exp, logits)) for x in logits]
        for i in range(len(keys)):
            near = weights[max(i - policy.kernel // 2, 0) : i + policy.kernel // 2 + 1]
            importance[i] += max(near) / queries.shape[1]
    return importance


def naive_redundancy(keys: list[list[float]], similar: float) -> list[float]:
    links = [
        [sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) for b in keys] for a in keys
    ]
    for i, row in enumerate(links):
        row[i] = 0.0
        likenesses = [j for j, x in enumerate(row) if x > similar]
        if likenesses:
            row[likenesses[-1]] = 0.0
    means = [sum(column) / len(keys) for column in zip(*links, strict=True)]
    total = sum(map(math.exp, means))
    return [math.exp(mean) / total for mean in means]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(
    "options",
    [
        {"observed": 3, "kernel": 3},
        {"observed": 1, "kernel": 1, "weight": 0.0, "similar": 0.0},
        {"observed": 8, "kernel": 7, "weight": 1.0},
        {"observed": 2, "kernel": 5, "weight": 0.5, "similar": 0.3},
    ],
)
def test_r_kv_equals_the_naive_one(options, extra, monkeypatch):
    monkeypatch.setattr(r_kv, "KEY_BLOCK", 4)
    obs = random_observation(16, seen=(30, 14), queries_per_kv=3, observed=8, head_dim=4, **EXTRAS[extra])
    policy = made("r_kv", **options)
    torch.testing.assert_close(policy.score(obs), torch.tensor(naive_rkv(obs, policy)), atol=1e-6, rtol=1e-4)


def test_redundancy_is_the_same_in_blocks_of_any_size(monkeypatch):
    keys = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    whole = r_kv._compute_redundancy(keys, 0.5)
    for block in (1, 7, 49, 50):
        monkeypatch.setattr(r_kv, "KEY_BLOCK", block)
        torch.testing.assert_close(r_kv._compute_redundancy(keys, 0.5), whole)


def test_of_keys_that_repeat_each_other_the_latest_is_least_redundant():
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    redundancy = r_kv._compute_redundancy(keys, 0.5)
    assert redundancy[0] == redundancy[2] > redundancy[3] > redundancy[4]
    assert redundancy[4] == redundancy[1], "as if it stood alone"


def test_r_kv_settles_while_decoding_in_buffers():
    model = tiny("llama")
    policy = policies.RKV(budget=Budget.tokens(16), every=6)
    cache = read(model, policy, random_ids(model, 2, 10, seed=17))
    assert cache.held == 2 * 6 * 10
    generate(model, cache, 20)
    assert cache.ragged
    for positions in positions_of(cache):
        assert len(positions) <= 16 + 6 and positions[-8:] == list(range(22, 30))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"observed": 0}, "observed=0"),
        ({"kernel": 2}, "kernel=2"),
        ({"weight": 1.1}, "weight=1.1"),
        ({"weight": math.nan}, "weight=nan"),
        ({"similar": -0.5}, "similar=-0.5"),
    ],
)
def test_r_kv_refuses_what_it_cannot_work_with(options, told):
    with pytest.raises(PolicyError, match=told):
        made("r_kv", **options)


def test_the_field_has_the_defaults_of_its_papers():
    assert made("h2o").recent_share == 0.5 and made("pyramidkv").beta == 20
    assert (made("adakv").share, made("adakv").floor) == ("layer", 0.2)
    assert (made("criticalkv").first_stage, made("criticalkv").epsilon) == (0.5, 1e-4)
    assert (made("lagkv").sink, made("lagkv").lag) == (16, 128)
    kept = made("r_kv")
    assert (kept.observed, kept.window, kept.every, kept.weight, kept.budget) == (8, 8, 128, 0.1, ROOMY)
