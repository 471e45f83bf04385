"""Prefill: chunks, announced lengths, progress; and generate's own chunked prefill beside it."""

import pytest
import torch
import transformers
from packaging.version import Version

from vestige import Budget, CacheError, InputError, KVCache, attach, policies, prefill
from vestige.testing import random_ids, tiny

NEWEST = Version(transformers.__version__) >= Version("5.23")


def policy(tokens=10, **options):
    return policies.Random(budget=Budget.tokens(tokens), **({"sink": 2, "window": 3, "every": 4} | options))


def test_generating_from_exactly_these_ids_reads_all_but_the_last():
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    with torch.no_grad(), attach(model):
        expected = model.generate(
            ids, past_key_values=KVCache(model, policies.Full()), max_new_tokens=8, do_sample=False
        )
        cache = KVCache(model, policies.Full())
        prefill(model, ids[:, :-1], cache, chunk=7)
        got = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, expected)


def test_the_logits_are_those_after_the_last_token():
    model = tiny("qwen3")
    ids = random_ids(model, 2, 30)
    with torch.no_grad(), attach(model):
        logits = prefill(model, ids, KVCache(model, policies.Full()), chunk=8)
        expected = model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_progress_counts_the_tokens_read():
    model = tiny("llama")
    told = []
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 20), KVCache(model, policy()), chunk=8, progress=told.append)
    assert told == [8, 16, 20]


def test_held_never_exceeds_the_budget_and_one_chunk():
    model = tiny("llama")
    cache = KVCache(model, policy(share="model"))
    most = []
    with torch.no_grad(), attach(model):
        model.lm_head.register_forward_hook(lambda *_: most.append(cache.held))
        prefill(model, random_ids(model, 1, 100), cache, chunk=16)
    assert max(most) == (10 + 16) * 6
    assert cache.held == 10 * 6


def test_reading_slack_is_generous_until_the_last_chunk(monkeypatch):
    monkeypatch.setattr(policies.Random, "reading_slack", 2.0)
    model = tiny("llama")
    cache = KVCache(model, policy())
    held = []
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 64), cache, chunk=16, progress=lambda _: held.append(cache.held))
    assert held == [16 * 6, 20 * 6, 20 * 6, (20 + 16) * 6]
    assert cache.held == 10 * 6


def test_a_fraction_of_an_unannounced_text_looks_to_its_end():
    model = tiny("llama")
    cache = KVCache(model, policies.Random(budget=Budget.fraction(0.5), sink=2, window=3))
    held = []
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 80), cache, chunk=20, progress=lambda _: held.append(cache.held // 6))
    assert held == [20, 40, 40, 60]
    assert cache.held == 40 * 6


def test_pads_must_be_at_the_left():
    model = tiny("llama")
    ids = random_ids(model, 1, 4)
    with torch.no_grad(), attach(model), pytest.raises(InputError, match="pads at the left"):
        prefill(model, ids, KVCache(model, policies.Full()), attention_mask=torch.tensor([[1, 1, 0, 0]]))


def test_an_interrupted_reading_leaves_a_cache_that_says_so(monkeypatch):
    model = tiny("llama")
    cache = KVCache(model, policy())
    ids = random_ids(model, 1, 40)

    def stop(read):
        if read == 16:
            raise KeyboardInterrupt

    with torch.no_grad(), attach(model):
        with pytest.raises(KeyboardInterrupt):
            prefill(model, ids, cache, chunk=8, progress=stop)
        assert cache.seen == (16,) and not cache.schedule.reading
        prefill(model, ids[:, 16:], cache, chunk=8)  # whole chunks were read: it can go on
    assert cache.held == 10 * 6


def test_generates_own_chunked_prefill_evicts_between_chunks():
    model = tiny("llama")
    ids = random_ids(model, 1, 64)
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policy())
        cache.schedule.chunk = 16
        most = []
        model.lm_head.register_forward_hook(lambda *_: most.append(cache.held))
        model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False, prefill_chunk_size=16)
    assert max(most) == (10 + 16) * 6
    assert cache.held == (10 + 2) * 6


def test_a_second_turn_in_chunks_works_where_transformers_feeds_it_once_and_is_refused_where_twice():
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policies.Full())
        prefill(model, ids[:, :20], cache)
        options = {"max_new_tokens": 3, "do_sample": False, "prefill_chunk_size": 8}
        if NEWEST:
            got = model.generate(ids, past_key_values=cache, **options)
            assert torch.equal(got, model.generate(ids, max_new_tokens=3, do_sample=False))
        else:
            with pytest.raises(CacheError, match=r"vestige.prefill"):
                model.generate(ids, past_key_values=cache, **options)
