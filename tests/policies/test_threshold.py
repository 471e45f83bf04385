"""What stays whatever the room: pairs above a threshold only; and shares of the room for first and recent tokens."""

import math
from dataclasses import dataclass

import pytest
import torch

from tests.conftest import ROOMY, made
from tests.policies.test_selection import Pair, Scene, comparable, oracle, random_scene
from vestige import Budget, KVCache, PolicyError, Span, attach, policies, prefill
from vestige.models.compat import cache_argument
from vestige.policies.selection import SCALES, SHARES
from vestige.testing import covering, left_padded, masked_logits, random_ids, tiny, watch

SMALL = {"sink": 2, "window": 3, "every": 4}
ROWS = 6  # of tiny("llama"): 3 layers x 2 KV heads


@dataclass(frozen=True, kw_only=True)
class Late(policies.StreamingLLM):
    """Scores every pair by its position: a threshold is one of time."""

    def score(self, obs):
        return obs.positions.float()


def read(model, policy, ids, **options) -> KVCache:
    cache = KVCache(model, policy)
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, **options)
    return cache


# The selection.


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("share", SHARES)
def test_of_what_there_is_room_for_only_pairs_above_the_threshold_stay(share, scale):
    scene = random_scene(3)
    if scale == "mass":
        scene = Scene([(i, b, [(p, abs(x), s) for p, x, s in pairs]) for i, b, pairs in scene.rows], scene.room)
    threshold = {"calibrated": 1.0, "mass": 0.08, "signed": 1.0}[scale]

    def worthy(pair: Pair) -> bool:
        worth = pair.score if scale == "calibrated" else comparable(scene, pair, scale)
        return pair.protected or worth >= threshold

    kept = scene.select(share, scale, threshold=threshold)
    expected = {at for at in oracle(scene, share, scale) if worthy(scene.pairs[at])}
    assert {at for at, stays in enumerate(kept) if stays} == expected
    assert 0 < len(expected) < sum(scene.select(share, scale)), "or the threshold took nothing away"


def test_a_threshold_takes_away_from_fixed_counts_too():
    scene = Scene([(0, 0, [(0, 1.0, True), (1, 5.0, False), (2, 2.0, False), (3, 4.0, False)])], [4])
    assert scene.select(counts=torch.tensor([3]), threshold=4.5) == [True, True, False, False]
    assert scene.select(counts=torch.tensor([2]), threshold=0.0) == [True, True, False, False]


# The cache.


@pytest.mark.parametrize("budget", [None, Budget.tokens(64), Budget.fraction(1.0)], ids=str)
def test_pairs_below_the_threshold_go_even_where_nothing_is_over_its_budget(budget):
    model = tiny("llama")
    cache = read(model, Late(budget=budget, threshold=20.0, **SMALL), random_ids(model, 1, 40))
    assert all(layer.positions(row).tolist() == [0, 1, *range(20, 40)] for layer in cache.evictable for row in (0, 1))
    assert cache.report().budget_total == (
        None if budget is None else budget.amount * ROWS * (40 if budget.amount == 1 else 1)
    )


def test_a_budget_holds_beside_a_threshold():
    model = tiny("llama")
    cache = read(model, Late(budget=Budget.tokens(10), threshold=35.0, **SMALL), random_ids(model, 1, 40))
    assert cache.evictable[0].positions(0).tolist() == [0, 1, 35, 36, 37, 38, 39]
    cache = read(model, Late(budget=Budget.tokens(10), threshold=20.0, **SMALL), random_ids(model, 1, 40))
    assert cache.evictable[0].positions(0).tolist() == [0, 1, *range(32, 40)]


def test_each_batch_row_is_judged_by_its_own_pairs_and_pins_stay():
    model = tiny("llama")
    ids, mask = left_padded(model, [40, 25])
    cache = KVCache(model, Late(budget=None, threshold=22.0, **SMALL))
    cache.pin(Span(10, 12))
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, attention_mask=mask)
    layer = cache.evictable[1]
    assert layer.positions(0).tolist() == [0, 1, 10, 11, *range(22, 40)]
    assert layer.positions(2).tolist() == [0, 1, 10, 11, 22, 23, 24]


def test_a_threshold_evicts_while_reading_in_chunks_and_while_decoding_and_equals_masking():
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    cache = KVCache(model, policies.KeyDiff(budget=None, threshold=0.2, **SMALL))  # z-scores: most of them go
    deaths, held = watch(cache), []
    with torch.no_grad(), attach(model):
        prefill(model, ids[:, :32], cache, chunk=8, progress=lambda read: held.append((read, cache.held)))
        assert all(pairs < read * ROWS for read, pairs in held[1:])
        logits, evicted = [], cache.held
        for i in range(32, 40):
            logits.append(model(ids[:, i : i + 1], **cache_argument(cache)).logits)
        assert cache.held < evicted + 8 * ROWS
        expected = masked_logits(model, ids, covering(deaths, 40))[:, 32:]
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5, rtol=1e-5)


def test_a_threshold_below_every_score_changes_no_bit():
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    cache = read(model, Late(budget=None, threshold=-1.0, **SMALL), ids)
    assert not cache.ragged and cache.held == 30 * ROWS


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
def test_a_threshold_that_is_no_number_is_refused(threshold):
    with pytest.raises(PolicyError, match=f"threshold must be a number, got {threshold!r}"):
        made("knorm", threshold=threshold)


def test_a_threshold_or_a_budget_makes_a_policy_evict():
    assert made("knorm").evicts and policies.KNorm(budget=None, threshold=0.0).evicts
    assert not policies.KNorm(budget=None).evicts and not made("full").evicts


# Shares of the room for first and recent tokens.


def early(**options) -> Late:
    """Return a policy that prefers neither first nor last: it keeps the middle of 40 tokens."""

    @dataclass(frozen=True, kw_only=True)
    class Middle(Late):
        def score(self, obs):
            return -(obs.positions.float() - 20.25).abs()

    return Middle(budget=Budget.tokens(10), **(SMALL | options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 18, 19, 20, 21, 22, 37, 38, 39]),
        ({"first_share": 0.4}, [0, 1, 2, 3, 19, 20, 21, 37, 38, 39]),
        ({"recent_share": 0.59}, [0, 1, 19, 20, 21, 35, 36, 37, 38, 39]),  # 5.9 are 5
        ({"first_share": 0.1, "recent_share": 0.1}, [0, 1, 18, 19, 20, 21, 22, 37, 38, 39]),
        ({"first_share": 0.5, "recent_share": 0.5}, [0, 1, 2, 3, 4, 35, 36, 37, 38, 39]),
        ({"recent_share": 0.6, "sink": 0}, [19, 20, 21, 22, 34, 35, 36, 37, 38, 39]),
    ],
)
def test_first_and_recent_tokens_have_a_share_of_the_room_where_that_is_more_than_sink_and_window(options, expected):
    model = tiny("llama")
    cache = read(model, early(**options), random_ids(model, 1, 40))
    assert all(layer.positions(row).tolist() == expected for layer in cache.evictable for row in (0, 1))


def test_shares_are_of_each_batch_rows_own_room():
    model = tiny("llama")
    ids, mask = left_padded(model, [40, 20])
    policy = Late(budget=Budget.fraction(0.5), first_share=0.5, **SMALL)
    cache = read(model, policy, ids, attention_mask=mask, length=[40, 20])
    assert cache.evictable[0].positions(0).tolist() == [*range(10), *range(30, 40)]
    assert cache.evictable[0].positions(2).tolist() == [*range(5), *range(15, 20)]


@pytest.mark.parametrize("name", ["first_share", "recent_share"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_share_outside_0_and_1_is_refused(name, value):
    with pytest.raises(PolicyError, match=rf"{name} must lie in \[0, 1\], got {value!r}"):
        policies.KNorm(budget=ROOMY, **{name: value})


def test_shares_of_more_than_the_whole_room_are_refused():
    assert policies.KNorm(budget=ROOMY, first_share=0.4, recent_share=0.6).first_share == 0.4
    with pytest.raises(PolicyError, match="first_share and recent_share together must not exceed 1"):
        policies.KNorm(budget=ROOMY, first_share=0.5, recent_share=0.51)
