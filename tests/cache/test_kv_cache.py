"""The cache's promises: budgets and settles, bytes, forks, and the verbs that generate needs."""

import copy
import gc
from itertools import pairwise

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache

from vestige import Budget, BudgetError, CacheError, InputError, KVCache, PolicyError, Span, attach, policies, prefill
from vestige.cache.prefill import finish
from vestige.models.compat import cache_argument
from vestige.policies import POLICIES
from vestige.testing import TINY, left_padded, random_ids, tiny

ROWS = 6  # of tiny("llama"): 3 layers x 2 KV heads
EVICTING = sorted(set(POLICIES) - {"full"})


def policy(name="random", tokens=10, *, budget=None, **options):
    options = {"sink": 2, "window": 3, "every": 4} | options
    return policies.resolve(name)(budget=budget or Budget.tokens(tokens), **options)


def live_bytes(cache) -> int:
    """Count every byte that the evictable layers keep alive."""
    storages = {}
    for layer in cache.evictable:
        for tensor in [*layer.columns.values(), *(ring.data for ring in layer.rings.values())]:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def contents(cache) -> list:
    """Return every row's positions, keys and values."""
    rows = []
    for layer in cache.evictable:
        for row in range(layer.rows):
            pairs = slice(layer.starts[row], layer.starts[row] + layer.lengths[row])
            rows += [layer.columns[name][pairs].clone() for name in ("positions", "keys", "values")]
    return rows


def same(left, right) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("share", ["head", "layer", "model"])
@pytest.mark.parametrize("name", EVICTING)
def test_held_follows_the_settle_rule_at_every_step(name, share):
    model, limit = tiny("llama"), 10 * ROWS
    ids = random_ids(model, 1, 60)
    cache = KVCache(model, policy(name, share=share))
    with torch.no_grad(), attach(model):
        read = 0
        while read < 40:
            prefill(model, ids[:, read : read + 8], cache)
            read += 8
            assert cache.held == min(read * ROWS, limit)
        prefill(model, ids[:, 40:45], cache, settle=False)  # a question stays whole ...
        assert cache.held == limit + 5 * ROWS
        for generated in range(1, 5):
            model(ids[:, 44 + generated : 45 + generated], **cache_argument(cache))
            assert cache.held == limit + (5 + generated) * ROWS
        model(ids[:, 49:50], **cache_argument(cache))  # ... until `every` = 4 tokens were generated
        assert cache.held == limit + ROWS


def test_a_prompt_under_plain_generate_is_settled_before_its_first_one_token_forward():
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    cache = KVCache(model, policy())
    with torch.no_grad(), attach(model):
        out = model.generate(ids, **cache_argument(cache), max_new_tokens=2, do_sample=False)
        assert cache.held == 10 * ROWS + ROWS
        turn = torch.cat([out, random_ids(model, 1, 20, seed=1)], 1)
        model.generate(turn, **cache_argument(cache), max_new_tokens=2, do_sample=False)
    assert cache.seen == (turn.shape[1] + 1,)
    assert cache.held == 10 * ROWS + ROWS, "the second turn is evicted like the first"


def test_a_question_longer_than_a_chunk_is_settled_before_the_answer():
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    cache = KVCache(model, policy())
    with torch.no_grad(), attach(model):
        prefill(model, ids[:, :20], cache, chunk=8)
        prefill(model, ids[:, 20:30], cache, chunk=8, settle=False)
        assert cache.held == (10 + 10) * ROWS
        model(ids[:, 30:31], **cache_argument(cache))
    assert cache.held == (10 + 1) * ROWS


@pytest.mark.parametrize("share", ["head", "layer", "model"])
@pytest.mark.parametrize("name", EVICTING)
def test_a_budget_of_all_that_was_seen_changes_no_bit(name, share):
    model = tiny("llama")
    ids, mask = left_padded(model, [20, 13])
    outputs = []
    with torch.no_grad(), attach(model):
        for chosen in (policies.Full(), policy(name, 20 + 12, share=share)):
            cache = KVCache(model, chosen)
            prefill(model, ids[:, :-1], cache, chunk=6, attention_mask=mask[:, :-1])
            options = {"attention_mask": mask, "max_new_tokens": 12, "output_logits": True}
            out = model.generate(
                ids, **cache_argument(cache), do_sample=False, return_dict_in_generate=True, **options
            )  # fmt: skip
            outputs.append((out.sequences, *out.logits, *contents(cache)))
            assert not cache.ragged
    assert same(*outputs)


@pytest.mark.parametrize("share", ["head", "layer", "model"])
@pytest.mark.parametrize("name", EVICTING)
def test_a_batch_row_alone_equals_that_row_in_a_left_padded_batch(name, share):
    model = tiny("llama")
    ids, mask = left_padded(model, [40, 31, 18])
    chosen = policy(name, share=share)
    together = KVCache(model, chosen)
    with torch.no_grad(), attach(model):
        for start in range(0, 40, 9):  # one by one, so that all settles are final ones, whatever the reading slack
            piece = slice(start, start + 9)
            logits = prefill(model, ids[:, piece], together, attention_mask=mask[:, piece])
        for b, pads in enumerate((0, 9, 22)):
            alone = KVCache(model, chosen)
            # The same tokens must meet the same settles, so chunks are cut where the batch's are.
            edges = [pads, *(edge for edge in (9, 18, 27, 36) if edge > pads), 40]
            for start, end in pairwise(edges):
                expected = prefill(model, ids[b : b + 1, start:end], alone)
            torch.testing.assert_close(logits[b : b + 1], expected, atol=1e-5, rtol=1e-5)
            for one, many in zip(alone.evictable, together.evictable, strict=True):
                for head in range(2):
                    assert torch.equal(one.positions(head), many.positions(2 * b + head))


@pytest.mark.parametrize("name", TINY)
def test_chunked_prefill_equals_one_prefill_when_nothing_is_evicted(name):
    model = tiny(name)
    ids, mask = left_padded(model, [30, 17])
    with torch.no_grad(), attach(model):
        whole, chunked = KVCache(model, policies.Full()), KVCache(model, policies.Full())
        expected = prefill(model, ids, whole, attention_mask=mask)
        got = prefill(model, ids, chunked, chunk=7, attention_mask=mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EVICTING)
def test_a_pair_evicted_never_returns(name):
    model = tiny("llama")
    ids = random_ids(model, 1, 60)
    cache = KVCache(model, policy(name, share="model"))
    before = [set() for _ in range(ROWS)]
    with torch.no_grad(), attach(model):
        for i in range(0, 60, 6):
            prefill(model, ids[:, i : i + 6], cache)
            held = [set(layer.positions(row).tolist()) for layer in cache.evictable for row in range(2)]
            for old, new in zip(before, held, strict=True):
                assert {p for p in new if p < i} <= old
            before = held


@pytest.mark.parametrize("name", ["snapkv", "random"])
@pytest.mark.parametrize("model_name", ["llama", "gemma3"])
def test_reported_bytes_are_those_of_live_storage(name, model_name):
    model = tiny(model_name)
    ids, mask = left_padded(model, [40, 25])
    cache = KVCache(model, policy(name, share="model"))
    with torch.no_grad(), attach(model):
        prefill(model, ids[:, :8], cache, chunk=8, attention_mask=mask[:, :8])
        assert cache.report().kv_bytes == live_bytes(cache)
        prefill(model, ids[:, 8:], cache, chunk=8, attention_mask=mask[:, 8:])
        assert cache.report().kv_bytes == live_bytes(cache)
        for layer in cache.evictable:
            slots = layer.columns["positions"].shape[0]
            assert slots == sum(layer.lengths), "a settled cache has no free slots"
        report = cache.report()
    assert report.full_kv_bytes == sum(2 * 4 * 40 * layer.rows * 16 for layer in cache.evictable)
    others = [x for x in cache.layers if x not in cache.evictable]
    tensors = [t for x in others for t in (x.keys, x.values, x._sliding_window_tensor)]
    assert report.other_kv_bytes == sum(t.nbytes for t in tensors)


def test_the_peak_counts_the_copies_of_a_compaction_and_does_not_grow_with_the_text():
    model = tiny("llama")
    peaks = []
    for length in (64, 128, 256):
        cache = KVCache(model, policy(tokens=32))
        with torch.no_grad(), attach(model):
            prefill(model, random_ids(model, 1, length), cache, chunk=16)
        peaks.append(cache.report().peak_kv_bytes)
        assert peaks[-1] > cache.report().kv_bytes
    assert max(peaks) <= 1.02 * min(peaks)


def test_evicted_memory_is_really_freed():
    model = tiny("llama")
    cache = KVCache(model, policy(tokens=10))
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 400), cache, chunk=400)
    gc.collect()
    sizes = [t.untyped_storage().nbytes() for layer in cache.evictable for t in layer.columns.values()]
    assert sum(sizes) == cache.report().kv_bytes < 0.1 * cache.report().full_kv_bytes


def test_pads_are_not_held_and_go_at_the_first_eviction():
    model = tiny("llama")
    ids, mask = left_padded(model, [20, 5])
    cache = KVCache(model, policy(tokens=15))
    with torch.no_grad(), attach(model):
        prefill(model, ids[:, :12], cache, attention_mask=mask[:, :12])
        assert cache.held == 12 * ROWS
        assert cache.seen == (12, 0)
        logits = prefill(model, ids[:, 12:], cache, attention_mask=mask[:, 12:])
    assert cache.seen == (20, 5) and cache.get_seq_length() == 20
    assert cache.held == (15 + 5) * ROWS, "batch rows never compete: the short one keeps all it has"
    assert all(bool((layer.columns["positions"][layer.live_slots()[0]] >= 0).all()) for layer in cache.evictable)
    assert torch.isfinite(logits).all()


def test_budgets_in_fractions_and_bytes_are_met():
    model = tiny("llama")
    ids = random_ids(model, 2, 100)
    with torch.no_grad(), attach(model):
        announced = KVCache(model, policy(budget=Budget.fraction(0.25)))
        prefill(model, ids[:, :80], announced, chunk=20, length=100)
        assert announced.held == 25 * 2 * ROWS == announced.report().budget_total
        unannounced = KVCache(model, policy(budget=Budget.fraction(0.25)))
        prefill(model, ids[:, :80], unannounced, chunk=20)
        assert unannounced.held == 20 * 2 * ROWS
        tight = KVCache(model, policy(budget=Budget.fraction(0.01), window=8))
        prefill(model, ids[:, :80], tight)
        assert tight.held == (2 + 8) * 2 * ROWS, "never below sink + window where no length was announced"
        for name in ("random", "snapkv"):
            limited = KVCache(model, policy(name, budget=Budget.bytes(100_000)))
            prefill(model, ids, limited, chunk=20)
            assert limited.report().kv_bytes <= 100_000
            prefill(model, ids[:, :1], limited, settle=False)
            assert 95_000 < limited.report().kv_bytes <= 100_000, "with the room that decoding needs"


def test_pins_protect_their_pairs_and_too_many_of_them_are_refused():
    model = tiny("llama")
    cache = KVCache(model, policy(tokens=10))
    cache.pin(Span(7, 11))
    with pytest.raises(BudgetError, match=r"10 pairs a row.*protect 14"):
        cache.pin(Span(20, 25))
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 40), cache, chunk=8)
    for layer in cache.evictable:
        for row in range(layer.rows):
            assert {0, 1, 7, 8, 9, 10, 37, 38, 39} <= set(layer.positions(row).tolist())
    with pytest.raises(BudgetError, match=r"100 pairs a row.*protect 105"):
        KVCache(model, policies.KNorm(budget=Budget.tokens(100), recent_share=0.9)).pin(Span(10, 21))


@pytest.mark.parametrize("break_it", ["nan", "shape"])
def test_a_broken_score_leaves_the_cache_as_it_was(break_it, monkeypatch):
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    cache = KVCache(model, policy())

    def broken(self, seen):
        scores = torch.rand(len(seen.positions))
        if seen.layer_idx == 1:
            scores[3] = torch.nan
        return scores if break_it == "nan" else scores[1:]

    with torch.no_grad(), attach(model):
        prefill(model, ids[:, :20], cache)
        prefill(model, ids[:, 20:], cache, settle=False)
        before = contents(cache)
        with monkeypatch.context() as patch:
            patch.setattr(policies.Random, "score", broken)
            with pytest.raises(
                PolicyError, match=r"NaN, the first in layer 1" if break_it == "nan" else r"\(\d+,\) for"
            ):
                cache.settle()
        assert same(before, contents(cache))
        cache.settle()
    assert cache.held == 10 * ROWS


@pytest.mark.parametrize("model_name", ["llama", "gemma3", "gpt_oss", "gemma4"])
@pytest.mark.parametrize("evicted", [False, True])
def test_a_fork_equals_a_copy_and_two_caches_do_not_touch_each_other(model_name, evicted):
    model = tiny(model_name)
    ids, mask = left_padded(model, [30, 22])
    chosen = policy("snapkv", 10 if evicted else 100, share="model", observed=4)
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    with torch.no_grad(), attach(model):
        cache = KVCache(model, chosen)
        prefill(model, ids[:, :-1], cache, chunk=9, attention_mask=mask[:, :-1])
        before, twin = contents(cache), cache.fork()
        first = model.generate(ids, **cache_argument(twin), **options)
        assert same(before, contents(cache))
        assert cache.get_seq_length() == 29
        second = model.generate(ids, **cache_argument(copy.deepcopy(cache)), **options)
        third = model.generate(ids, **cache_argument(cache), **options)
    assert torch.equal(first, second) and torch.equal(first, third)
    assert same(contents(twin), contents(cache))
    assert twin.report().held == cache.report().held


def test_one_prefill_serves_many_policies():
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    chosen = [policy(name, 12, share="model") for name in EVICTING]
    with torch.no_grad(), attach(model):
        shared = KVCache(model, policies.Full(), observers=chosen)
        prefill(model, ids, shared)
        for one in chosen:
            forked = shared.fork(one)
            observed = [set(layer.rings) for layer in forked.evictable]
            assert observed == [set(one.ring_sizes)] * 3, "a fork's bytes are its own policy's"
            rings = [layer.rings.get("queries") for layer in forked.evictable]
            assert {0 if ring is None else ring.size for ring in rings} == {one.ring_sizes.get("queries", 0)}
            finish(model, forked, ids)
            own = KVCache(model, one)
            prefill(model, ids, own)
            assert same(contents(forked), contents(own))
        bare = KVCache(model, policies.Full())
        prefill(model, ids, bare)
        with pytest.raises(PolicyError, match=r"SnapKV needs queries \(32\), this cache recorded nothing; .*observers"):
            bare.fork(policy("snapkv"))


@pytest.mark.parametrize("evicted", [False, True])
def test_crop_takes_back_tokens_and_cannot_restore(evicted):
    model = tiny("llama")
    ids, mask = left_padded(model, [30, 22])
    cache = KVCache(model, policy("snapkv", 10 if evicted else 100, window=0, sink=0, observed=4))
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, chunk=9, attention_mask=mask)
        before, seen = cache.held, cache.seen
        prefill(model, random_ids(model, 2, 5), cache, settle=False)
        cache.crop(0)
        cache.crop(-5)
        assert (cache.held, cache.seen, cache.get_seq_length()) == (before, seen, 30)
        assert torch.equal(cache.ids, ids)
        cache.crop(-6)
        assert cache.seen == (24, 16)
        for layer in cache.evictable:
            for row in range(layer.rows):
                positions = layer.positions(row)
                assert len(positions) == 0 or int(positions.max()) < cache.seen[row // 2]
        if not evicted:
            fresh = KVCache(model, policy("snapkv", 100, observed=4))
            prefill(model, ids[:, :24], fresh, attention_mask=mask[:, :24])
            nxt = random_ids(model, 2, 3, seed=9)
            expected = prefill(model, nxt, fresh, settle=False)
            torch.testing.assert_close(prefill(model, nxt, cache, settle=False), expected, atol=1e-5, rtol=1e-5)
        for wrong in (3, -100):
            with pytest.raises(InputError, match="crop takes a number from -"):
                cache.crop(wrong)


def test_queries_lost_to_a_crop_are_not_taken_for_others():
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    chosen = policy("snapkv", 100, observed=8)
    with torch.no_grad(), attach(model):
        cropped, fresh = KVCache(model, chosen), KVCache(model, chosen)
        prefill(model, ids, cropped)
        cropped.crop(-3)
        prefill(model, ids[:, :27], fresh)
    for layer, other in zip(cropped.evictable, fresh.evictable, strict=True):
        (got,) = layer.rings["queries"].latest((27,))
        (full,) = other.rings["queries"].latest((27,))
        assert got.shape[1] == 5 and full.shape[1] == 8
        torch.testing.assert_close(got, full[:, -5:])


@pytest.mark.parametrize("back", [12, 20])
def test_records_of_several_lengths_know_what_a_crop_took_from_each(back):
    """A short record has lost all its rows, a long one some."""
    model, longer = tiny("llama"), policy("snapkv", 100, observed=16)
    ids, chosen = random_ids(model, 1, 40), policy("snapkv", 14, observed=4)
    with torch.no_grad(), attach(model):
        cache = KVCache(model, chosen, observers=[longer])
        prefill(model, ids, cache, settle=False)
        cache.crop(-back)
        for name, size in (("long", 16), ("short", 4)):
            one = cache if name == "long" else cache.fork(chosen)
            fresh = KVCache(model, longer if name == "long" else chosen)
            prefill(model, ids[:, : 40 - back], fresh, settle=False)
            (got,) = one.evictable[1].rings["queries"].latest(one.seen)
            (full,) = fresh.evictable[1].rings["queries"].latest(fresh.seen)
            left = min(max(16 - back, 0), size)
            assert got.shape[1] == left
            torch.testing.assert_close(got, full[:, full.shape[1] - left :])


def test_a_settle_with_all_queries_taken_back_waits_for_the_next_ones():
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policy("snapkv", 14, observed=4))
        prefill(model, ids, cache, settle=False)
        cache.crop(-10)
        held = cache.held
        cache.settle()
        assert cache.held == held, "there is nothing to judge by"
        prefill(model, ids[:, 40:42], cache)
        assert cache.held == 14 * cache.state.footprint().rows


@pytest.mark.parametrize("tokens", [None, 14])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_forward_that_died_midway_can_be_taken_back(layer, tokens):
    model = tiny("llama")
    ids, nxt = random_ids(model, 1, 40), random_ids(model, 1, 3, seed=2)
    cache = KVCache(model, policies.Full() if tokens is None else policy("snapkv", tokens, observed=4))

    def die(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), attach(model):
        prefill(model, ids, cache)
        twin = cache.fork()
        hook = model.model.layers[layer].mlp.register_forward_hook(die)
        with pytest.raises(KeyboardInterrupt):
            prefill(model, nxt, cache, settle=False)
        hook.remove()
        if layer == 0:  # others have nothing of it
            with pytest.raises(CacheError, match="died midway"):
                cache.crop(-2)
        cache.crop(-3)
        assert cache.seen == (40,) and cache.held == twin.held
        expected = prefill(model, nxt, twin, settle=False)
        torch.testing.assert_close(prefill(model, nxt, cache, settle=False), expected)


@pytest.mark.parametrize("evicted", [False, True])
def test_beams_and_return_sequences_equal_those_of_a_dynamic_cache_or_of_masking(evicted):
    model = tiny("llama")
    ids = random_ids(model, 1, 20)
    options = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    with torch.no_grad():
        expected = model.generate(ids, **options)
        with attach(model):
            cache = KVCache(model, policy(tokens=8, window=3) if evicted else policies.Full())
            got = model.generate(ids, **cache_argument(cache), **options)
    assert got.shape == expected.shape
    assert cache.ragged is evicted
    assert evicted or torch.equal(got, expected)


def test_beam_search_after_an_eviction_equals_beam_search_over_separate_caches():
    model = tiny("llama")
    ids = random_ids(model, 1, 20)
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policy(share="model"))
        prefill(model, ids, cache)
        cache.batch_repeat_interleave(3)
        step = random_ids(model, 3, 1, seed=3)
        model(step, **cache_argument(cache), position_ids=torch.full((3, 1), 20))
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        got = model(step, **cache_argument(cache), position_ids=torch.full((3, 1), 21)).logits
        for b, source in enumerate((2, 0, 0)):
            alone = KVCache(model, policy(share="model"))
            prefill(model, ids, alone)
            model(step[source : source + 1], **cache_argument(alone))
            expected = model(step[b : b + 1], **cache_argument(alone)).logits
            torch.testing.assert_close(got[b : b + 1], expected, atol=1e-5, rtol=1e-5)
    assert cache.ids.tolist() == torch.cat([ids.expand(3, -1), step[[2, 0, 0]], step], 1).tolist()


def test_selecting_batch_rows_keeps_the_rest_as_it_was():
    model = tiny("llama")
    ids, mask = left_padded(model, [30, 22, 9])
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policy("snapkv", share="model", observed=4))
        prefill(model, ids, cache, chunk=9, attention_mask=mask)
        cache.batch_select_indices(torch.tensor([True, False, True]))
        assert cache.seen == (30, 9)
        nxt = random_ids(model, 2, 1, seed=5)
        twin = KVCache(model, policy("snapkv", share="model", observed=4))
        prefill(model, ids[[0, 2]], twin, chunk=9, attention_mask=mask[[0, 2]])
        positions = torch.tensor(cache.seen)[:, None]
        got = model(nxt, **cache_argument(cache), position_ids=positions).logits
        torch.testing.assert_close(model(nxt, **cache_argument(twin), position_ids=positions).logits, got)


def test_prompt_lookup_equals_greedy_decoding_when_nothing_is_evicted_and_stays_within_the_budget_else():
    model = tiny("llama")
    ids = random_ids(model, 1, 12).repeat(1, 3)
    with torch.no_grad(), attach(model):
        expected = model.generate(ids, max_new_tokens=20, do_sample=False)
        options = {"max_new_tokens": 20, "do_sample": False, "prompt_lookup_num_tokens": 4}
        got = model.generate(ids, **cache_argument(KVCache(model, policies.Full())), **options)
        cache = KVCache(model, policy(tokens=10))
        model.generate(ids, **cache_argument(cache), **options)
    assert torch.equal(got, expected)
    assert cache.ragged
    assert cache.held <= (10 + 4 + 2 * 5) * ROWS


def test_reset_forgets_everything_but_the_policy():
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policy())
        first = prefill(model, ids, cache, chunk=8)
        cache.reset()
        assert (cache.seen, cache.held, cache.get_seq_length()) == ((), 0, 0)
        assert torch.equal(prefill(model, ids, cache, chunk=8), first)


def test_the_cache_has_few_public_names():
    model = tiny("llama")
    inherited = {*dir(Cache), *vars(DynamicCache(config=model.config))}
    added = {name for name in dir(KVCache(model, policy())) if not name.startswith("_")} - inherited
    assert len(added) <= 20, sorted(added)
