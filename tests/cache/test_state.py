"""The bookkeeping that a cache shares with its layers."""

import pytest
import torch

from vestige import Budget, BudgetError, CacheError, InputError, KVCache, Span, attach, policies, prefill
from vestige.cache.state import expected_footprint
from vestige.models.compat import cache_argument
from vestige.spans import PositionMap
from vestige.testing import left_padded, random_ids, tiny

MODEL = tiny("llama")


def snapkv(budget: Budget) -> policies.SnapKV:
    return policies.SnapKV(budget=budget, sink=2, window=3, observed=3)


def read(budget: Budget | None = None, tokens: int = 20, batch: int = 1) -> KVCache:
    policy = policies.Full() if budget is None else snapkv(budget)
    cache = KVCache(MODEL, policy)
    with torch.no_grad(), attach(MODEL):
        prefill(MODEL, random_ids(MODEL, batch, tokens), cache)
    return cache


def test_announced_lengths_are_per_batch_row_and_checked():
    state = read(Budget.fraction(0.5), batch=2).state
    state.announce((40, 60), 2)
    assert state.lengths == (40, 60) and state.pair_limits() == [20, 30]
    state.announce(None, 2)
    assert state.lengths == (40, 60), "None keeps what was announced"
    with pytest.raises(InputError, match="3 lengths were announced for 2 batch rows"):
        state.announce((1, 2, 3), 2)
    with pytest.raises(BudgetError):
        state.announce(4, 2)
    assert state.lengths == (40, 60)


def test_a_reading_looks_ahead_and_an_outer_one_wins():
    state = read(Budget.fraction(0.5)).state
    assert state.pair_limits() == [10]
    with state.reading_until((40,)):
        assert state.pair_limits() == [20]
        with state.reading_until((100,)):
            assert state.pair_limits() == [20]
    assert state.reading_to is None and state.pair_limits() == [10]


def test_a_fork_shares_nothing_that_changes():
    state = read().state
    fork = state.fork(state.policy, None)
    fork.schedule.count(1)
    fork.history.add(torch.tensor([[5]]), torch.tensor([[True]]))
    fork.mark_erased([Span(3, 5)])
    assert state.history.ids.shape == (1, 20) and fork.history.ids.shape == (1, 21)
    assert state.schedule.generated == 0 and state.erased == () and fork.erased == (Span(3, 5),)


def test_erased_spans_that_touch_become_one_and_are_cropped():
    cache = read()
    cache.state.mark_erased([Span(10, 12)])
    cache.state.mark_erased([Span(12, 18), Span(2, 3)])
    assert cache.state.erased == (Span(2, 3), Span(10, 18))
    cache.crop(-5)
    assert cache.state.erased == (Span(2, 3), Span(10, 15))


def test_removing_spans_moves_what_comes_later():
    state = read().state
    state.pin(Span(8, 10))
    state.announce(50, 1)
    ids = state.history.ids
    state.remove(PositionMap((Span(2, 5),)))
    assert state.seen == (17,) and state.lengths == (47,) and state.pins == (Span(5, 7),)
    assert torch.equal(state.history.ids, torch.cat([ids[:, :2], ids[:, 5:]], 1))


def test_an_input_that_does_not_continue_is_refused():
    state = read(batch=2).state
    with pytest.raises(CacheError, match="holds 2 batch rows, but 1 were fed"):
        state.check_input(None, 1, None, None)
    with pytest.raises(CacheError, match="begins at position 0"):
        state.check_input(None, 2, torch.zeros(2, 1, dtype=torch.long), None)


def test_the_expected_footprint_is_that_of_a_cache():
    found = read(Budget.tokens(8)).state.footprint()
    expected = expected_footprint(read().layout)
    assert (expected.rows, expected.pair_bytes) == (found.rows, found.pair_bytes)


def test_bytes_and_pads_are_those_of_the_layers():
    ids, mask = left_padded(MODEL, [9, 6])
    cache = KVCache(MODEL, policies.Full())
    with torch.no_grad(), attach(MODEL):
        prefill(MODEL, ids, cache, attention_mask=mask)
    assert cache.state.padded and not read().state.padded
    assert cache.state.nbytes == sum(layer.nbytes for layer in cache.evictable)


def test_a_detached_model_is_named():
    cache = read()
    with torch.no_grad(), pytest.raises(CacheError, match="not attached"):
        MODEL(random_ids(MODEL, 1, 1), **cache_argument(cache))
