"""Attention computed from an observation, against the naive one."""

import pytest
import torch

from tests.conftest import made
from tests.policies.test_policies import EXTRAS, naive_attention, packed, random_observation
from vestige import Observation
from vestige.kernels import AttentionScale
from vestige.policies.scoring import compute_observed_attention


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("observed", [1, 3, 100])
def test_observed_attention_equals_the_naive_one(observed, extra):
    obs = random_observation(3, kv_heads=2, queries_per_kv=3, **EXTRAS[extra])
    for row in obs.rows():
        attention, first = compute_observed_attention(obs, row, observed)
        naive = naive_attention(obs, row.batch * obs.kv_heads + row.kv_head, observed)
        held = obs.positions[row.pairs].tolist()
        expected = torch.tensor([[[query.get(p, 0.0) for p in held] for query in head] for head in naive])
        torch.testing.assert_close(attention, expected)
        assert first == obs.seen[row.batch] - min(observed, 4)


def test_observed_attention_sums_to_1_without_sinks_and_to_less_with_them():
    for sinks in (False, True):
        obs = random_observation(4, sinks=sinks)
        total = compute_observed_attention(obs, next(obs.rows()), 4)[0].sum(-1)
        assert bool((total < 0.999).all()) == sinks
        assert bool((total > 0.999).all()) == (not sinks)


def test_a_softcap_evens_the_observed_attention_out():
    sharp, capped = (
        compute_observed_attention(obs, next(obs.rows()), 4)[0].max()
        for obs in (random_observation(5), random_observation(5, softcap=0.01))
    )
    assert capped < 0.2 < sharp


def latest_only(sinks: bool) -> Observation:
    """Return a row that was left with its latest pairs, as may be where rows compete and nothing is protected."""
    scale = AttentionScale(1.0, None, torch.zeros(1) if sinks else None)
    queries = (torch.ones(1, 6, 2),)  # of tokens 2 to 7
    return packed([{5: [1.0, 0.0], 7: [0.0, 1.0]}], seen=[8], queries=queries, attention=scale)


@pytest.mark.parametrize("sinks", [False, True])
def test_a_query_older_than_all_that_a_row_holds_pays_no_attention(sinks):
    obs = latest_only(sinks)
    attention, first = compute_observed_attention(obs, next(obs.rows()), 6)
    assert first == 2
    assert attention[0, :3].tolist() == [[0, 0]] * 3
    assert attention[0, 3:].isfinite().all()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("name", ["snapkv", "tova"])
def test_a_row_left_with_its_latest_pairs_has_scores(name, sinks):
    assert made(name).score(latest_only(sinks)).isfinite().all()
