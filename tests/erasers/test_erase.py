"""Spans out of a live cache: every eraser against what it promises, and invariant 11, every slot accounted for."""

import pytest
import torch

from vestige import Budget, CacheError, InputError, KVCache, Span, attach, erase, erasers, memory, policies, prefill
from vestige.cache.overlay import rerun, write
from vestige.erasers import ERASERS
from vestige.memory.base import ForgetResult
from vestige.models.compat import cache_argument
from vestige.nn.lora import Adapter
from vestige.spans import within
from vestige.testing import TINY, full_layers, left_padded, random_ids, tiny

SPAN = Span(10, 16)
CORRECTION = {"erratum": {"ids": (3, 4, 5)}}
CLOSING = ("recompute", "shift", "repair", "blend")
WHOLE = [name for name in TINY if len(full_layers(tiny(name))) == tiny(name).config.num_hidden_layers]
"""Models with full attention in all layers."""
SMALL = {"sink": 2, "window": 3, "every": 4}


def trained(model, seed: int = 0) -> Adapter:
    """Return an adapter that does something."""
    adapter, draw = Adapter.initialize(model, rank=4), torch.Generator().manual_seed(seed)
    for weight in (*adapter.down, *adapter.up):
        weight.data = 0.1 * torch.randn(weight.shape, generator=draw)
    return adapter


def made(name: str, **options):
    options = ({"adapter": trained(tiny("llama"))} if name == "learned" else {}) | options
    return erasers.resolve(name)(**CORRECTION.get(name, {}) | options)


def read(model, ids, policy=None, *, kept=None, mask=None, chunk=1024):
    """Return a cache that read ids."""
    cache = KVCache(model, policy or policies.Full(), memory=kept)
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, chunk=chunk, attention_mask=mask)
    return cache


def logits_of(model, cache, question):
    """Return what a cache answers to a question; the cache is left as it is."""
    fork = cache.fork()
    with torch.no_grad(), attach(model):
        return prefill(model, question, fork, settle=False)


def evicting(tokens: int = 20, name: str = "keydiff"):
    return policies.resolve(name)(budget=Budget.tokens(tokens), **SMALL)


def columns_of(cache) -> list[dict]:
    return [
        {name: column[layer.live_slots()[0]].clone() for name, column in layer.columns.items()}
        for layer in cache.evictable
    ]


def same_columns(one, other, **tolerance) -> None:
    for a, b in zip(columns_of(one), columns_of(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], **tolerance)


# Recompute is what a fresh reading would give.


@pytest.mark.parametrize("policy", [None, "keydiff", "snapkv", "h2o", "laprox", "expected_attention"])
def test_recompute_equals_a_fresh_reading(policy):
    model, question = tiny("llama"), random_ids(500, 1, 5, seed=9) % 90
    ids = random_ids(model, 1, 50)
    kind = None if policy is None else evicting(20, policy)
    cache = read(model, ids, kind)
    done = erase(cache, SPAN, made("recompute"), model=model, input_ids=ids)
    remaining = torch.cat([ids[:, :10], ids[:, 16:]], 1)
    fresh = read(model, remaining, kind)
    assert done.report.exact and torch.equal(done.input_ids, remaining)
    assert cache.seen == fresh.seen == (44,) and cache.held == fresh.held
    same_columns(cache, fresh, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(model, cache, question), logits_of(model, fresh, question))


@pytest.mark.parametrize("policy", [None, "snapkv", "keydiff"])
def test_recompute_leaves_the_clock_of_settles_as_a_fresh_reading_does(policy):
    model = tiny("llama")
    ids, kind = random_ids(model, 1, 50), None if policy is None else evicting(60, policy)
    cache, fresh = read(model, ids, kind), read(model, torch.cat([ids[:, :10], ids[:, 16:]], 1), kind)
    assert erase(cache, SPAN, made("recompute"), model=model, input_ids=ids).report.tokens_recomputed == 34
    assert cache.state.schedule == fresh.state.schedule


@pytest.mark.parametrize("gap", [Span(4, 8), Span(30, 34), Span(44, 50)], ids=str)
@pytest.mark.parametrize("name", ["snapkv", "laprox"])
def test_recompute_goes_round_what_was_dropped_before_under_a_policy_that_looks_at_queries(gap, name):
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    cache = read(model, ids, evicting(20, name))
    erase(cache, gap, made("drop"), model=model, input_ids=ids)
    erase(cache, SPAN, made("recompute", chunk=6), model=model, input_ids=ids)
    assert cache.seen == (44,) and cache.held <= 20 * cache.state.footprint().rows
    left = gap.start - (6 if gap.start > 10 else 0)
    for layer in cache.evictable:
        assert not any(within(layer.positions(row), [Span(left, left + len(gap))]).any() for row in range(layer.rows))


def test_a_fraction_of_no_announced_length_is_recomputed_as_it_was_read():
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    kind = policies.SnapKV(budget=Budget.fraction(0.1), observed=4, sink=4, window=8)
    cache, fresh = read(model, ids, kind, chunk=8), read(model, torch.cat([ids[:, :10], ids[:, 16:]], 1), kind, chunk=8)
    erase(cache, SPAN, made("recompute", chunk=8), model=model, input_ids=ids)
    assert cache.state.lengths is None and cache.held == fresh.held == 12 * cache.state.footprint().rows
    same_columns(cache, fresh, atol=1e-5, rtol=1e-5)


def test_recompute_goes_on_from_the_span_where_nothing_was_evicted():
    model, ids = tiny("llama"), random_ids(tiny("llama"), 1, 50)
    report = erase(read(model, ids), SPAN, made("recompute"), model=model, input_ids=ids).report
    assert report.tokens_recomputed == 34 and report.suffix_left == 0
    evicted = read(model, ids, evicting())
    assert erase(evicted, SPAN, made("recompute"), model=model, input_ids=ids).report.tokens_recomputed == 44


@pytest.mark.parametrize("policy", [None, "keydiff"])
def test_recompute_in_a_padded_batch_equals_each_row_alone(policy):
    model = tiny("llama")
    ids, mask = left_padded(model, [40, 25], seed=3)
    kind = None if policy is None else evicting(14, policy)
    cache = read(model, ids, kind, mask=mask)
    done = erase(cache, SPAN, made("recompute"), model=model, input_ids=ids)
    assert done.report.exact and cache.seen == (34, 19) and torch.equal(done.input_ids, cache.ids)
    question = random_ids(model, 2, 4, seed=5)
    both = logits_of(model, cache, question)
    for b, length in enumerate((40, 25)):
        row = ids[b : b + 1, 40 - length :]
        fresh = read(model, torch.cat([row[:, :10], row[:, 16:]], 1), kind)
        torch.testing.assert_close(both[b : b + 1], logits_of(model, fresh, question[b : b + 1]), atol=1e-5, rtol=1e-5)


def test_recompute_reads_a_hybrid_model_anew():
    model = tiny("gemma3")
    ids = random_ids(model, 1, 40)
    cache = read(model, ids)
    assert erase(cache, SPAN, made("recompute"), model=model, input_ids=ids).report.exact
    fresh = read(model, torch.cat([ids[:, :10], ids[:, 16:]], 1))
    question = random_ids(model, 1, 3, seed=1)
    torch.testing.assert_close(logits_of(model, cache, question), logits_of(model, fresh, question))


def test_recompute_rebuilds_a_memory():
    model, ids = tiny("llama"), random_ids(tiny("llama"), 1, 60)
    cache = read(model, ids, evicting(16), kept=memory.make("moments"))
    assert cache.forget(SPAN) is ForgetResult.IMPOSSIBLE
    report = erase(cache, SPAN, made("recompute"), model=model, input_ids=ids).report
    assert report.memory is ForgetResult.REBUILT
    fresh = read(model, torch.cat([ids[:, :10], ids[:, 16:]], 1), evicting(16), kept=memory.make("moments"))
    question = random_ids(model, 1, 3, seed=1)
    torch.testing.assert_close(logits_of(model, cache, question), logits_of(model, fresh, question))


# Shift and drop.


def test_shift_is_exact_in_the_first_layer_and_contaminated_above():
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    cache = read(model, ids)
    done = erase(cache, SPAN, made("shift"), model=model, input_ids=ids)
    fresh = read(model, torch.cat([ids[:, :10], ids[:, 16:]], 1))
    assert not cache.ragged and cache.seen == (44,) and done.report.suffix_left == 34 and not done.report.exact
    first, *others = zip(columns_of(cache), columns_of(fresh), strict=True)
    torch.testing.assert_close(*(x["keys"] for x in first), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(*(x["values"] for x in first))
    assert all((one["values"] - other["values"]).abs().max() > 1e-3 for one, other in others)


def test_dropping_equals_masking_the_span():
    model = tiny("llama")
    ids, question = random_ids(model, 1, 50), random_ids(model, 1, 5, seed=7)
    cache = read(model, ids)
    erase(cache, SPAN, made("drop"), model=model, input_ids=ids)
    mask = torch.ones(1, 55, dtype=torch.long)
    whole = torch.cat([ids, question], 1)
    blind = torch.zeros(55, 55).masked_fill(~torch.ones(55, 55, dtype=torch.bool).tril(), -torch.inf)
    blind[50:, SPAN.start : SPAN.end] = -torch.inf  # only what comes after the erase is blind to the span
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(whole, attention_mask=blind[None, None], position_ids=(mask.cumsum(1) - 1)).logits[:, -1]
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits_of(model, cache, question), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["shift", "repair", "blend"])
def test_what_closes_moves_pins_marks_and_announced_lengths(name):
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    cache = KVCache(model, evicting(30))
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, length=60)
    cache.pin(Span(20, 22))
    erase(cache, Span(30, 33), made("drop"), model=model, input_ids=ids)
    done = erase(cache, SPAN, made(name), model=model, input_ids=ids)
    assert (
        cache.state.pins == (Span(14, 16),) and cache.state.erased == (Span(24, 27),) and cache.state.lengths == (54,)
    )
    assert done.remap(Span(20, 22)) == Span(14, 16) and done.remap(SPAN) is None
    assert done.remap(Span(8, 20)) == Span(8, 14)


def test_queries_that_policies_look_back_at_move_with_their_tokens():
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    snap = policies.SnapKV(budget=Budget.tokens(25), observed=8, **SMALL)
    cache, fresh = read(model, ids, snap), read(model, torch.cat([ids[:, :24], ids[:, 27:]], 1), snap)
    erase(cache, Span(24, 27), made("shift"), model=model, input_ids=ids)
    ring, expected = (one.evictable[0].rings["queries"].latest(one.seen)[0] for one in (cache, fresh))
    assert ring.shape[1] == 5, "three of the eight were queries of the span"
    torch.testing.assert_close(ring, expected[:, -5:], atol=1e-5, rtol=1e-5)


# Running tokens again.


@pytest.mark.parametrize(
    "name",
    [name for name in TINY if len(full_layers(tiny(name))) == tiny(name).config.get_text_config().num_hidden_layers],
)
def test_running_tokens_again_gives_the_pairs_they_had(name):
    model = tiny(name)
    ids, at = random_ids(model, 2, 40), torch.tensor([9, 10, 11, 20, 21, 39])
    cache = read(model, ids)
    before = columns_of(cache)
    with torch.no_grad(), attach(model):
        new = rerun(cache, at)
    for was, now in zip(before, columns_of(cache), strict=True):
        assert all(torch.equal(was[column], now[column]) for column in was), "running reads only"
    write(cache, at, new)
    for was, now in zip(before, columns_of(cache), strict=True):
        torch.testing.assert_close(now["keys"], was["keys"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(now["values"], was["values"], atol=1e-5, rtol=1e-4)


def test_running_in_a_padded_batch_and_after_an_eviction_writes_only_what_is_held():
    model = tiny("llama")
    ids, mask = left_padded(model, [40, 30], seed=2)
    cache = read(model, ids, evicting(14), mask=mask)
    before = columns_of(cache)
    at = torch.arange(8, 20)
    with torch.no_grad(), attach(model):
        write(cache, at, rerun(cache, at))
    for was, now in zip(before, columns_of(cache), strict=True):
        assert torch.equal(was["positions"], now["positions"])
        inside = (was["positions"] >= 8) & (was["positions"] < 20)
        assert torch.equal(was["keys"][~inside], now["keys"][~inside])
        changed = (was["values"][inside] != now["values"][inside]).any(-1)
    assert changed.all(), "in the last layer every pair read less than before"


def test_norms_kept_beside_pairs_are_those_of_the_new_values():
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    cache = read(model, ids, evicting(30, "laprox"))
    erase(cache, SPAN, made("repair", share=1.0), model=model, input_ids=ids)
    for layer in cache.evictable:
        values = layer.columns["values"][layer.live_slots()[0]]
        output = cache.layout.output(layer.layer_idx)
        at = 0
        for head, length in enumerate(layer.live_lengths()):
            norms = output.norms(values[at : at + length][None, None].expand(1, layer.kv_heads, -1, -1))[0, head]
            kept = layer.columns["output_norms"][layer.live_slots()[0]][at : at + length]
            torch.testing.assert_close(kept.float(), norms, atol=1e-3, rtol=2e-3)
            at += length


# Repair and blend lie between shift and recompute.


@pytest.mark.parametrize("name", ["repair", "blend"])
def test_recomputing_all_that_follows_equals_recompute(name):
    model = tiny("llama")
    ids, question = random_ids(model, 1, 50), random_ids(model, 1, 4, seed=3)
    one, other = read(model, ids), read(model, ids)
    report = erase(one, SPAN, made(name, share=1.0), model=model, input_ids=ids).report
    erase(other, SPAN, made("recompute"), model=model, input_ids=ids)
    assert report.suffix_left == 0
    same_columns(one, other, atol=1e-5, rtol=1e-4)
    expected = logits_of(model, other, question)
    torch.testing.assert_close(logits_of(model, one, question), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("where", "fresh"), [("cut", range(10, 16)), ("end", range(38, 44))])
def test_repair_runs_its_share_at_the_cut_or_at_the_end(where, fresh):
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    one, other = read(model, ids), read(model, ids)
    report = erase(one, SPAN, made("repair", where=where, share=0.15), model=model, input_ids=ids).report
    erase(other, SPAN, made("shift"), model=model, input_ids=ids)
    assert report.tokens_recomputed == 6 and report.suffix_left == 28
    for a, b in zip(columns_of(one)[1:], columns_of(other)[1:], strict=True):
        differs = (a["values"] != b["values"]).any(-1)
        assert set(a["positions"][differs].tolist()) == set(fresh)


def test_blend_runs_the_tokens_whose_keys_changed_most():
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    one, other, right = (read(model, ids) for _ in range(3))
    erase(one, SPAN, made("blend", share=0.2), model=model, input_ids=ids)
    erase(other, SPAN, made("shift"), model=model, input_ids=ids)
    erase(right, SPAN, made("recompute"), model=model, input_ids=ids)
    shifted, wanted = (columns_of(x)[1]["keys"].unflatten(0, (-1, 44)) for x in (other, right))
    far = (shifted - wanted).square().sum((0, 2))
    chosen = set(far.topk(7).indices.tolist())
    differs = (columns_of(one)[1]["values"] != columns_of(other)[1]["values"]).any(-1).view(-1, 44).any(0)
    assert set(differs.nonzero()[:, 0].tolist()) == chosen


# Every eraser.


@pytest.mark.parametrize("policy", [None, "keydiff", "random"])
@pytest.mark.parametrize("name", sorted(ERASERS))
def test_every_slot_of_a_span_is_dropped_replaced_or_listed_as_left(name, policy):
    model = tiny("llama")
    ids, spans = random_ids(model, 2, 50), (Span(30, 34), SPAN)
    cache = read(model, ids, None if policy is None else evicting(20, policy))
    before, held = columns_of(cache), {span: pairs_in(cache, [span]) for span in spans}
    report = erase(cache, spans, made(name), model=model, input_ids=ids).report
    assert [one.span for one in report.spans] == sorted(spans)
    assert all(one.dropped + one.replaced + one.left == held[one.span] > 0 for one in report.spans)
    values = [values_outside(columns, spans) for columns in before]
    if name in ("shift", "drop"):
        after = [columns["values"] for columns in columns_of(cache)]
        assert all(map(torch.equal, values, after)), "what was not dropped is bit for bit as it was"
    if name in ("repair", "blend"):
        after = [columns["values"] for columns in columns_of(cache)]
        changed = sum(int((a != b).any(-1).sum()) for a, b in zip(values, after, strict=True))
        assert 0 < changed <= report.tokens_recomputed * 2 * 6
    if report.slots_left:
        again = [
            columns["values"][: len(was["values"])] for columns, was in zip(columns_of(cache), before, strict=True)
        ]
        assert name in ("noop", "erratum") and pairs_in(cache, spans) == report.slots_left
        assert name == "erratum" or all(torch.equal(was["values"], now) for was, now in zip(before, again, strict=True))
    elif name == "learned":
        after = [values_outside(columns, spans) for columns in columns_of(cache)]
        assert all(map(torch.equal, values, after)) and pairs_in(cache, spans) == report.slots_replaced
        assert not any(map(torch.equal, (c["values"] for c in before), (c["values"] for c in columns_of(cache))))
    elif name == "drop":
        assert pairs_in(cache, spans) == 0 and cache.state.erased == tuple(sorted(spans))


@pytest.mark.parametrize("kept", ["linear", "slots", "moments", "centroids"])
@pytest.mark.parametrize("name", ["drop", "erratum", "learned", "noop", "recompute"])
def test_every_slot_is_accounted_for_beside_a_memory_which_says_how_free_it_is(name, kept):
    model = tiny("llama")
    ids, spans = random_ids(model, 2, 50), (SPAN, Span(30, 34))
    cache = read(model, ids, evicting(20), kept=memory.make(kept))
    held = {span: pairs_in(cache, [span]) for span in spans}
    before = [layer.remains for layer in cache.evictable]
    report = erase(cache, spans, made(name), model=model, input_ids=ids).report
    assert all(one.dropped + one.replaced + one.left == held[one.span] > 0 for one in report.spans)
    assert report.memory is (ForgetResult.REBUILT if name == "recompute" else ForgetResult.IMPOSSIBLE)
    if name == "recompute":
        left = torch.cat([ids[:, : SPAN.start], ids[:, SPAN.end : 30], ids[:, 34:]], 1)
        fresh = read(model, left, evicting(20), kept=memory.make(kept))
        for one, other in zip(cache.evictable, fresh.evictable, strict=True):
            for state in one.remains.state:
                torch.testing.assert_close(one.remains.state[state], other.remains.state[state], atol=1e-4, rtol=1e-3)
    elif name != "erratum":  # which adds tokens that older ones make room for
        assert all(layer.remains is one for layer, one in zip(cache.evictable, before, strict=True))


def pairs_in(cache, spans) -> int:
    return sum(int(within(columns["positions"], spans).sum()) for columns in columns_of(cache))


def values_outside(columns, spans):
    return columns["values"][~within(columns["positions"], spans)]


@pytest.mark.parametrize("name", sorted(ERASERS))
def test_an_erase_that_fails_midway_leaves_the_cache_as_it_was(name, monkeypatch):
    model = tiny("llama")
    ids, question = random_ids(model, 1, 50), random_ids(model, 1, 3, seed=4)
    cache = read(model, ids, evicting(20))
    before, expected = columns_of(cache), logits_of(model, cache, question)
    calls = []

    def breaks(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", breaks)
    if name in ("drop", "shift", "noop"):
        return  # they do not run the model
    with pytest.raises(RuntimeError, match="out of memory"):
        erase(cache, SPAN, made(name), model=model, input_ids=ids)
    monkeypatch.undo()
    assert calls and cache.seen == (50,) and torch.equal(cache.ids, ids)
    for was, now in zip(before, columns_of(cache), strict=True):
        assert all(torch.equal(was[column], now[column]) for column in was)
    torch.testing.assert_close(logits_of(model, cache, question), expected)


@pytest.mark.parametrize("name", sorted(set(ERASERS) - {"noop"}))
def test_a_cache_goes_on_after_an_erase(name):
    model = tiny("llama")
    ids, mask = left_padded(model, [50, 41], seed=8)
    cache = read(model, ids, evicting(20), mask=mask)
    done = erase(cache, SPAN, made(name), model=model, input_ids=ids)
    more = random_ids(model, 2, 30, seed=6)
    with torch.no_grad(), attach(model):
        prefill(model, more, cache, chunk=16)
    assert torch.equal(cache.ids, torch.cat([done.input_ids, more], 1))
    assert cache.held == cache.report().budget_total


def test_a_later_recompute_brings_nothing_back_that_was_marked():
    model, question = tiny("llama"), random_ids(500, 1, 4, seed=2) % 90
    ids = random_ids(model, 1, 50)
    cache = read(model, ids)
    one = erase(cache, SPAN, made("drop"), model=model, input_ids=ids)
    done = erase(cache, Span(30, 34), made("recompute"), model=model, input_ids=one.input_ids)
    assert not done.report.exact and cache.state.erased == (SPAN,) and cache.seen == (46,)
    assert torch.equal(done.input_ids, torch.cat([ids[:, :30], ids[:, 34:]], 1))
    fresh = KVCache(model, policies.Full())
    others = ids.clone()
    others[:, SPAN.start : SPAN.end] = 1  # whatever stood there
    again = read(model, others)
    erase(again, SPAN, made("drop"), model=model, input_ids=others)
    erase(again, Span(30, 34), made("recompute"), model=model, input_ids=others)
    torch.testing.assert_close(logits_of(model, cache, question), logits_of(model, again, question))
    assert fresh.held == 0
    final = erase(cache, SPAN, made("recompute"), model=model, input_ids=done.input_ids)
    assert final.report.exact and cache.state.erased == ()
    expected = read(model, torch.cat([ids[:, :10], ids[:, 16:30], ids[:, 34:]], 1))
    torch.testing.assert_close(logits_of(model, cache, question), logits_of(model, expected, question))


def test_an_erase_is_saved_and_forked_with_the_cache(tmp_path):
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    cache = read(model, ids)
    one = erase(cache, SPAN, made("drop"), model=model, input_ids=ids)
    erase(cache, Span(30, 33), made("shift"), model=model, input_ids=one.input_ids)
    cache.save(tmp_path / "kept")
    for twin in (KVCache.load(tmp_path / "kept", model), cache.fork()):
        assert twin.state.erased == (SPAN,) and twin.seen == (47,)
        with attach(model), pytest.raises(CacheError, match="erased"):
            prefill(model, ids[:, 47:], twin)


# What is refused.


def test_the_prompt_from_before_the_erase_is_recognised():
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    cache = read(model, ids)
    done = erase(cache, SPAN, made("shift"), model=model, input_ids=ids)
    with attach(model), pytest.raises(CacheError, match=r"Erased\.input_ids"):
        model.generate(torch.cat([ids, ids[:, :1]], 1), **cache_argument(cache), max_new_tokens=1, pad_token_id=0)
    with attach(model):
        whole = torch.cat([done.input_ids, ids[:, :1]], 1)
        out = model.generate(whole, **cache_argument(cache), max_new_tokens=2, min_new_tokens=2, pad_token_id=0)
    assert out.shape[1] == 47


REFUSED = {
    "none": ((), "no span"),
    "overlapping": ((Span(3, 6), Span(5, 8)), r"\[3, 6\) and \[5, 8\) overlap"),
    "beyond": (Span(48, 51), "not in the cache, which has seen 50 tokens"),
    "the first token": (Span(0, 3), "first token.*use recompute"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_spans_that_cannot_be_erased_are_named(case):
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    spans, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        erase(read(model, ids), spans, made("shift"), model=model, input_ids=ids)


def test_a_row_that_has_not_seen_the_span_is_told():
    model = tiny("llama")
    ids, mask = left_padded(model, [40, 12], seed=3)
    with pytest.raises(InputError, match="seen 12 tokens of its shortest batch row"):
        erase(read(model, ids, mask=mask), SPAN, made("drop"), model=model, input_ids=ids)


def test_other_ids_are_refused():
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    other = ids.clone()
    other[0, 20] += 1
    for wrong in (other, ids[:, :40], torch.cat([ids, ids])):
        with pytest.raises(InputError, match="50 ids that the cache was fed"):
            erase(read(model, ids), SPAN, made("drop"), model=model, input_ids=wrong)


def test_ids_that_are_still_to_be_fed_stay_behind():
    model = tiny("llama")
    ids = random_ids(model, 1, 50)
    done = erase(read(model, ids[:, :49]), SPAN, made("shift"), model=model, input_ids=ids)
    assert torch.equal(done.input_ids, torch.cat([ids[:, :10], ids[:, 16:]], 1))


@pytest.mark.parametrize("name", sorted(set(ERASERS) - {"recompute", "noop", "erratum"}))
def test_sliding_layers_can_only_be_read_anew(name):
    model = tiny("gemma3")
    ids = random_ids(model, 1, 40)
    with pytest.raises(CacheError, match="use recompute"):
        erase(read(model, ids), SPAN, made(name), model=model, input_ids=ids)


@pytest.mark.parametrize("name", ["shift", "repair", "blend"])
def test_a_memory_of_what_follows_cannot_be_moved(name):
    model = tiny("llama")
    ids = random_ids(model, 1, 60)
    cache = read(model, ids, evicting(16), kept=memory.make("moments"))
    with pytest.raises(CacheError, match="drop, learned"):
        erase(cache, SPAN, made(name), model=model, input_ids=ids)
    report = erase(cache, SPAN, made("drop"), model=model, input_ids=ids).report
    assert report.memory is ForgetResult.IMPOSSIBLE


@pytest.mark.parametrize(
    ("name", "options"), [("repair", {"share": 0.0}), ("repair", {"where": "middle"}), ("blend", {"share": 1.5})]
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises((InputError, TypeError), match="share|where"):
        made(name, **options)
