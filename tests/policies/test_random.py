"""Random scores: uniform, independent, and a pair's own for life."""

from collections import Counter

import pytest
import torch

from tests.conftest import made
from tests.policies.test_policies import by_keys, mix, packed
from vestige import PolicyError
from vestige.policies.random import splitmix64, uniform


def test_a_random_score_belongs_to_its_pair_whatever_is_read_beside_it():
    rows = [{p: [0.0, 0.0] for p in range(40)} for _ in range(4)]
    whole = made("random", seed=7).score(packed(rows, seen=[40, 40], layer_idx=2)).view(2, 2, 40)
    assert torch.equal(whole[0], whole[1]), "batch rows draw alike, so that a row alone draws as in a batch"
    part = packed([{}, {p: [1.0, 1.0] for p in range(5, 40, 3)}], seen=[90], layer_idx=2)
    assert torch.equal(made("random", seed=7).score(part), whole[0, 1, 5:40:3])


def test_seeds_layers_and_heads_draw_independently():
    rows = [{p: [0.0, 0.0] for p in range(5000)} for _ in range(2)]
    draws = [
        head
        for seed in (0, 1)
        for layer in (0, 1, 31)
        for head in made("random", seed=seed).score(packed(rows, seen=[5000], layer_idx=layer)).view(2, -1)
    ]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlations.abs().max() < 0.06  # four deviations of chance


def test_random_scores_are_spread_evenly_over_the_unit_interval():
    scores = made("random").score(packed([{p: [0.0, 0.0] for p in range(20_000)}], seen=[20_000]))
    assert 0 <= scores.min() < 0.001
    assert 0.999 < scores.max() < 1
    assert abs(scores.mean() - 0.5) < 0.008  # four deviations of chance
    tenths = Counter((scores * 10).long().tolist())
    assert all(abs(tenths[n] - 2000) < 200 for n in range(10))
    assert abs(torch.corrcoef(torch.stack([scores[1:], scores[:-1]]))[0, 1]) < 0.03


def test_splitmix64_gives_the_published_numbers():
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # seed 0
    assert [x % 2**64 for x in splitmix64(torch.arange(3)).tolist()] == published
    assert [mix(n) for n in range(3)] == published


def test_uniform_numbers_never_reach_1():
    draws = uniform(torch.arange(-50_000, 50_000))
    assert 0 <= draws.min() < draws.max() < 1


@pytest.mark.parametrize("seed", [2**33, 2**40, 2**64 - 1, -(2**40)])
def test_a_large_seed_is_used_or_refused_but_never_overflows(seed):
    try:
        policy = made("random", seed=seed)
    except PolicyError:
        return
    assert policy.score(by_keys()).isfinite().all()
