"""Caches side by side: each row goes on as its own cache would."""

import pytest
import torch

from vestige import CacheError, KVCache, Span, attach, erasers, policies, prefill
from vestige.budget import Budget
from vestige.cache.batching import can_join, join
from vestige.erasers.erase import erase
from vestige.models.forward import forward
from vestige.testing import random_ids, tiny


def read(model, ids, policy=None):
    cache = KVCache(model, policy or policies.Full())
    prefill(model, ids, cache)
    return cache


def different(model):
    """Return caches that are whole, evicted, shortened, and of another length."""
    ids, keydiff = random_ids(model, 1, 24), policies.KeyDiff(budget=Budget.tokens(9), sink=1, window=2)
    shifted = read(model, ids)
    erase(shifted, Span(6, 11), erasers.make("shift"), model=model, input_ids=ids)
    dropped = read(model, ids)
    erase(dropped, Span(6, 11), erasers.make("drop"), model=model, input_ids=ids)
    return [
        read(model, ids),
        read(model, ids, keydiff),
        shifted,
        dropped,
        read(model, random_ids(model, 1, 31, seed=3)),
    ]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@torch.no_grad()
def test_each_row_goes_on_as_its_own_cache(name):
    model = tiny(name)
    question, tokens = random_ids(model, 1, 5, seed=1), random_ids(model, 1, 3, seed=2)
    with attach(model):
        caches = different(model)
        expected = []
        for cache in caches:
            own = cache.fork(policies.Full())
            expected.append([prefill(model, question, own, settle=False)])
            expected[-1] += [forward(model, tokens[:, i : i + 1], own) for i in range(3)]
        joined = join(caches)
        found = [prefill(model, question.expand(len(caches), -1), joined, settle=False)]
        found += [forward(model, tokens[:, i : i + 1].expand(len(caches), -1), joined) for i in range(3)]
    for row, logits in enumerate(expected):
        for wanted, got in zip(logits, found, strict=True):
            torch.testing.assert_close(got[row], wanted[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_joined_cache_holds_what_the_others_hold_and_these_stay_as_they_are():
    model = tiny("llama")
    with attach(model):
        caches = different(model)
        before = [(cache.held, cache.seen, cache.state.nbytes) for cache in caches]
        joined = join(caches)
        twice = join([joined, caches[0]])
        forward(model, torch.full((len(caches), 1), 5), joined)
    assert [(cache.held, cache.seen, cache.state.nbytes) for cache in caches] == before
    assert joined.seen == (25, 25, 20, 25, 32) and twice.seen == (24, 24, 19, 24, 31, 24)
    assert joined.held == sum(held for held, _, _ in before) + len(caches) * sum(x.kv_heads for x in joined.evictable)
    assert joined.padded and joined.ids.shape == (5, 32)


@torch.no_grad()
def test_what_cannot_lie_side_by_side_is_refused():
    model, other, sliding = tiny("llama"), tiny("llama"), tiny("gemma3")
    with attach(model), attach(other), attach(sliding):
        one, two, third = (read(x, random_ids(x, 1, 12)) for x in (model, other, sliding))
    assert can_join([one, one]) and not can_join([one, two])
    with pytest.raises(CacheError, match="different models"):
        join([one, two])
    with pytest.raises(CacheError, match="layers of other kinds"):
        join([third, third])
    with pytest.raises(CacheError, match="nothing to join"):
        join([one, KVCache(model, policies.Full())])
    with pytest.raises(CacheError, match="nothing to join"):
        join([])
