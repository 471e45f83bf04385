"""Prefill: chunks, announced lengths, progress; and generate's own chunked prefill beside it."""

import pytest
import torch
import transformers
from packaging.version import Version

from vestige import Budget, BudgetError, CacheError, InputError, KVCache, attach, policies, prefill
from vestige.cache.prefill import finish
from vestige.cache.query_records import RingBuffer
from vestige.models.compat import cache_argument
from vestige.models.forward import forward, replay
from vestige.testing import left_padded, random_ids, tiny

NEWEST = Version(transformers.__version__) >= Version("5.23")


def policy(tokens=10, **options):
    return policies.Random(budget=Budget.tokens(tokens), **({"sink": 2, "window": 3, "every": 4} | options))


def test_generating_from_exactly_these_ids_reads_all_but_the_last():
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    with torch.no_grad(), attach(model):
        expected = model.generate(
            ids, **cache_argument(KVCache(model, policies.Full())), max_new_tokens=8, do_sample=False
        )
        cache = KVCache(model, policies.Full())
        prefill(model, ids[:, :-1], cache, chunk=7)
        got = model.generate(ids, **cache_argument(cache), max_new_tokens=8, do_sample=False)
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
        assert cache.seen == (16,) and not cache.state.schedule.reading
        prefill(model, ids[:, 16:], cache, chunk=8)  # whole chunks were read: it can go on
    assert cache.held == 10 * 6


def test_generates_own_chunked_prefill_evicts_between_chunks():
    model = tiny("llama")
    ids = random_ids(model, 1, 64)
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policy())
        cache.state.schedule.chunk = 16
        most = []
        model.lm_head.register_forward_hook(lambda *_: most.append(cache.held))
        model.generate(ids, **cache_argument(cache), max_new_tokens=3, do_sample=False, prefill_chunk_size=16)
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
            got = model.generate(ids, **cache_argument(cache), **options)
            assert torch.equal(got, model.generate(ids, max_new_tokens=3, do_sample=False))
        else:
            with pytest.raises(CacheError, match=r"vestige.prefill"):
                model.generate(ids, **cache_argument(cache), **options)


# Lengths that are announced for each batch row.

LENGTHS = (40, 60, 50)


@pytest.fixture(scope="module")
def announced():
    """Return a model and a function that reads three rows of 30 tokens, of which a quarter of LENGTHS may stay."""
    model = tiny("llama", num_hidden_layers=2)
    ids = random_ids(model, 3, 30)

    def read(length=LENGTHS, **options):
        cache = KVCache(model, policies.Random(budget=Budget.fraction(0.25), sink=2, window=3))
        with torch.no_grad(), attach(model):
            prefill(model, ids, cache, length=length, **options)
        return cache

    return model, read


def held_by_row(cache) -> list[int]:
    """Return the pairs of each batch row of two layers of two KV heads."""
    rows = [layer.live_lengths() for layer in cache.evictable]
    return [sum(sum(lengths[2 * b : 2 * b + 2]) for lengths in rows) for b in range(len(cache.seen))]


@pytest.mark.parametrize("chunk", [1024, 8])
def test_a_fraction_is_one_of_each_rows_own_length(announced, chunk):
    cache = announced[1](chunk=chunk)
    assert cache.state.lengths == LENGTHS
    assert cache.state.pair_limits() == [10, 15, 12] and held_by_row(cache) == [40, 60, 48]
    assert cache.report().budget_total == (10 + 15 + 12) * 4


def test_one_length_is_that_of_all_rows_and_none_leaves_what_was_announced(announced):
    model, read = announced
    cache = read(length=40)
    assert cache.state.lengths == (40, 40, 40) and held_by_row(cache) == [40] * 3
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 3, 4, seed=1), cache)
        assert cache.state.lengths == (40, 40, 40) and held_by_row(cache) == [40] * 3
        prefill(model, random_ids(model, 3, 9, seed=2), cache, length=[80, 48, 60])
    assert cache.state.lengths == (80, 48, 60) and cache.state.pair_limits() == [20, 12, 15]
    assert held_by_row(cache) == [19 * 4, 48, 60]  # 10 and 9 more are within 20


def test_rows_take_their_lengths_along(announced):
    cache = announced[1]()
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert cache.state.lengths == (50, 40, 60) and cache.state.pair_limits() == [12, 10, 15]
    cache.batch_repeat_interleave(2)
    assert cache.state.lengths == (50, 50, 40, 40, 60, 60)
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert cache.state.lengths == (60, 50) and cache.state.pair_limits() == [15, 12]


def test_forks_and_saved_caches_keep_lengths(announced, tmp_path):
    model, read = announced
    cache = read()
    twin = cache.fork()
    cache.save(tmp_path / "kept")
    loaded = KVCache.load(tmp_path / "kept", model)
    assert twin.state.lengths == loaded.state.lengths == LENGTHS
    assert twin.state.pair_limits() == loaded.state.pair_limits() == [10, 15, 12]
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    assert twin.state.lengths == LENGTHS  # and a fork goes its own way
    unread = KVCache(model, policies.Full())
    unread.save(tmp_path / "unread")
    assert KVCache.load(tmp_path / "unread", model).state.lengths is None


@pytest.mark.parametrize("length", [(40, 60), (40, 60, 50, 50), [40]])
def test_another_number_of_lengths_is_refused_and_nothing_is_read(announced, length):
    model, _ = announced
    cache = KVCache(model, policies.Full())
    with torch.no_grad(), attach(model), pytest.raises(InputError, match=f"{len(length)} lengths .* for 3 batch rows"):
        prefill(model, random_ids(model, 3, 30), cache, length=length)
    assert cache.seen == () and cache.state.lengths is None


def test_the_shortest_row_must_have_room_for_what_is_protected(announced):
    model, read = announced
    assert read(length=(20, 60, 50)).state.pair_limits()[0] == 5
    cache = KVCache(model, policies.Random(budget=Budget.fraction(0.25), sink=2, window=3))
    with torch.no_grad(), attach(model), pytest.raises(BudgetError, match="gives 4 pairs a row, but .* protect 5"):
        prefill(model, random_ids(model, 3, 18), cache, length=(60, 19, 50))
    assert cache.seen == () and cache.state.lengths is None


def test_finishing_a_fork_is_the_end_of_a_prefill(announced):
    model, read = announced
    ids, chosen = random_ids(model, 3, 30), policies.Random(budget=Budget.fraction(0.25), sink=2, window=3)
    with torch.no_grad(), attach(model):
        whole = KVCache(model, policies.Full(), observers=[chosen])
        prefill(model, ids, whole)
        fork = whole.fork(chosen)
        fork.state.announce(LENGTHS, 3)
        finish(model, fork, ids)
        direct, question = read(), random_ids(model, 3, 1, seed=9)
        assert held_by_row(fork) == held_by_row(direct) and fork.state.schedule.prefilled
        got, expected = (forward(model, question, cache) for cache in (fork, direct))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert held_by_row(whole) == [30 * 4] * 3 and whole.state.lengths is None


def test_a_forward_of_padded_rows_gives_the_logits_of_each_alone():
    model = tiny("qwen3", num_hidden_layers=2)
    ids, mask = left_padded(model, [12, 9, 10])
    more, more_mask = left_padded(model, [2, 4, 3], seed=1)
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policies.Full())
        forward(model, ids, cache, mask)
        forward(model, more, cache, more_mask)
        got = forward(model, more[:, -1:], cache)
        assert cache.seen == (15, 14, 14)
        for b in range(3):
            alone = torch.cat([ids[b][mask[b] > 0], more[b][more_mask[b] > 0], more[b, -1:]])[None]
            expected = model(alone, use_cache=False).logits[:, -1]
            torch.testing.assert_close(got[b : b + 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma4"])  # gemma4's last layers are fed only what logits are wanted of
def test_a_padded_turn_behind_an_eviction_gives_the_logits_it_gives_when_all_are_wanted(name):
    model = tiny(name)
    ids, turn = random_ids(model, 2, 20), random_ids(model, 2, 6, seed=1)
    mask = torch.tensor([[1] * 6, [0] * 4 + [1] * 2])
    with torch.no_grad(), attach(model):
        cache = KVCache(model, policy())
        prefill(model, ids, cache)
        fork = cache.fork()
        got = forward(model, turn, cache, mask)
        whole = {"attention_mask": torch.cat([torch.ones_like(ids), mask], 1)}
        whole["position_ids"] = (19 + mask.cumsum(1)).clamp_min(0)
        expected = model(turn, **cache_argument(fork), **whole).logits[:, -1]
    assert cache.ragged and cache.seen == (26, 22)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


# Replays: what is fed and taken back.


def traces(cache) -> list:
    """Return everything that a forward leaves in a cache, pairs and rings included, but for the slack of its rows."""
    found = [cache.ids.tolist(), cache.real.tolist(), cache.seen, vars(cache.state.schedule).copy()]
    found += [cache.state.step, cache.state.recording, cache.padded]
    for layer in cache.layers:
        found += [
            (name, value) for name, value in sorted(vars(layer).items()) if isinstance(value, int) and name[0] != "_"
        ]
        tensors = [value for _, value in sorted(vars(layer).items()) if isinstance(value, torch.Tensor)]
        for row in range(getattr(layer, "rows", 0)):
            pairs = slice(layer.starts[row], layer.starts[row] + layer.lengths[row])
            tensors += [column[pairs] for _, column in sorted(layer.columns.items())]
        rings = [ring for _, ring in sorted(getattr(layer, "rings", {}).items())]
        found += [list(ring.floor) for ring in rings if isinstance(ring, RingBuffer)]
        tensors += [ring.data for ring in rings]
        found += [tensor.tolist() for tensor in tensors]
    return found


def filled(model, evicted: bool):
    """Return a cache of two padded batch rows with a turn behind it."""
    ids, mask = left_padded(model, [24, 17])
    chosen = policies.SnapKV(budget=Budget.tokens(10 if evicted else 99), observed=5, sink=2, window=3, every=4)
    cache = KVCache(model, chosen)
    prefill(model, ids, cache, chunk=9, attention_mask=mask)
    forward(model, random_ids(model, 2, 3, seed=1), cache)
    assert cache.ragged == evicted
    return cache


@pytest.mark.parametrize("evicted", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4"])
def test_a_replay_is_shown_and_taken_back_to_the_last_bit(name, evicted):
    model, shown = tiny(name), []
    more, mask = left_padded(model, [7, 4], seed=2)
    with torch.no_grad(), attach(model):
        cache = filled(model, evicted)
        before, untouched = traces(cache), cache.fork()
        for given in (None, mask):
            replay(model, more, cache, shown.append, given)
            assert traces(cache) == before
        token = random_ids(model, 2, 9, seed=3)
        assert torch.equal(forward(model, token, cache), forward(model, token, untouched))
    rows = len(cache.evictable) * 2 * cache.evictable[0].kv_heads
    assert [len(g.query_positions) for g in shown[:rows]] == [7] * rows
    assert {len(g.query_positions) for g in shown[rows:] if g.batch == 1} == {4}
    assert {(g.batch, int(g.query_positions[0])) for g in shown} == {(0, 27), (1, 20)}


def test_a_replay_sees_what_the_same_ids_would_see():
    model = tiny("qwen3", num_hidden_layers=2)
    text, more = random_ids(model, 1, 20), random_ids(model, 1, 6, seed=1)
    queries = []
    with torch.no_grad(), attach(model):
        for way in (
            lambda cache: replay(model, more, cache, lambda _: None),
            lambda cache: forward(model, more, cache),
        ):
            cache, outputs = KVCache(model, policies.Full()), []
            prefill(model, text, cache)
            hook = model.lm_head.register_forward_hook(lambda _, args, out, to=outputs: to.append(out))
            way(cache)
            hook.remove()
            queries.append(outputs)
    assert torch.equal(queries[0][0], queries[1][0])


def test_what_a_replay_writes_into_side_arrays_of_older_pairs_stays():
    class Counts(policies.KNorm):
        annotations = frozenset({"times"})

        def annotate(self, written):
            return {"times": torch.zeros(written.keys.shape[:3])}

    model = tiny("llama")
    cache = KVCache(model, Counts(budget=Budget.tokens(40)))
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 20), cache)
        for _ in range(2):
            replay(model, random_ids(model, 1, 50), cache, lambda glance: glance.annotations["times"].add_(1))
    for layer in cache.evictable:
        assert layer.view("times").tolist() == [[[2.0] * 20] * 2]


def test_a_replay_settles_nothing_and_is_not_watched_by_the_caches_own_policies():
    seen = []

    class Watcher(policies.KNorm):
        def watch(self, glance):
            seen.append(glance)

    model, told = tiny("llama"), []
    cache = KVCache(model, Watcher(budget=Budget.tokens(10), sink=2, window=3, every=4))
    with torch.no_grad(), attach(model):
        forward(model, random_ids(model, 1, 30), cache)
        assert len(seen) == 6 and cache.state.schedule.is_due(1, 4)
        replay(model, random_ids(model, 1, 1), cache, told.append)
    assert len(seen) == 6 and len(told) == 6 and cache.held == 30 * 6 and not cache.ragged


def test_a_replay_that_dies_midway_leaves_the_cache_whole():
    model = tiny("llama")

    def die(glance):
        if glance.layer_idx == 1:
            raise KeyboardInterrupt

    with torch.no_grad(), attach(model):
        for evicted in (False, True):
            cache = filled(model, evicted)
            before, untouched, token = traces(cache), cache.fork(), random_ids(model, 2, 2, seed=3)
            with pytest.raises(KeyboardInterrupt):
                replay(model, random_ids(model, 2, 6), cache, die)
            assert traces(cache) == before
            assert torch.equal(forward(model, token, cache), forward(model, token, untouched))


def test_a_policy_that_prepares_leaves_no_free_slots_behind_where_nothing_is_evicted():
    class Asks(policies.KNorm):
        def prepare(self, model, cache, ids):
            replay(model, random_ids(model, len(ids), 50), cache, lambda _: None)

    model = tiny("llama")
    for tokens in (60, 20):
        cache = KVCache(model, Asks(budget=Budget.tokens(tokens), sink=2, window=3))
        with torch.no_grad(), attach(model):
            prefill(model, random_ids(model, 1, 40), cache)
        assert cache.state.prepared and cache.held == min(tokens, 40) * 6
        assert all(len(layer.columns["keys"]) == sum(layer.lengths) for layer in cache.evictable)
        assert cache.state.peak_kv_bytes >= 90 * 6 * cache.evictable[0].pair_bytes, "the peak was that of the replay"
