"""KVzip: what a replay writes down, against a plain forward of text, request and chunk; and that it leaves no trace."""

import dataclasses

import pytest
import torch
from torch import Tensor

from vestige import Budget, KVCache, PolicyError, attach, policies, prefill
from vestige.cache.prefill import finish
from vestige.models.compat import cache_argument
from vestige.models.forward import forward
from vestige.policies import kvzip
from vestige.policies.kvzip import REQUEST, KVzip
from vestige.policies.scoring import compute_attention
from vestige.testing import attention, full_layers, left_padded, random_ids, tiny
from vestige.text.chat_template import ChatTemplate

ASK = (5, 9, 7)


def zipped(tokens: int = 64, **options) -> KVzip:
    return KVzip(budget=Budget.tokens(tokens), **({"sink": 2, "window": 3, "every": 4, "request": ASK} | options))


def asked(cache: KVCache) -> dict[int, list[Tensor]]:
    """Return what is written down of each row of each layer."""
    return {
        layer.layer_idx: [layer.columns["asked"][s : s + n] for s, n in zip(layer.starts, layer.lengths, strict=True)]
        for layer in cache.evictable
    }


def naive(model, text: list[int], start: int, chunk: int, quoted: int, sink: int = 2) -> dict[int, Tensor]:
    """Return by layer the most attention that the replay of ``text[start:]`` pays to pairs: kv_heads x text.

    Each chunk is fed behind the text in one plain forward; first tokens, chunk and replay share the softmax.
    """
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    found = {i: torch.full((kv_heads, len(text)), -1.0) for i in full_layers(model)}
    for begin in range(start, len(text), chunk):
        end = min(begin + chunk, len(text))
        fed = [*text, *ASK, *text[max(begin - quoted, start) : end]]
        with torch.no_grad(), attention(model, "eager"):
            weights = model(torch.tensor([fed]), output_attentions=True, use_cache=False).attentions
        counted = [i for i in range(len(fed)) if i < sink or begin <= i < end or i >= len(text)]
        for layer in found:
            rows = weights[layer][0, :, len(text) :]  # (heads, replayed, all)
            rows = rows / rows[..., counted].sum(-1, keepdim=True)
            for head in range(heads):
                most = rows[head].amax(0)[begin:end]
                old = found[layer][head // (heads // kv_heads), begin:end]
                old.copy_(torch.maximum(old, most))
    return found


def read(model, policy, ids, **options) -> KVCache:
    cache = KVCache(model, policy)
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, **options)
    return cache


@pytest.mark.parametrize(("chunk", "quoted"), [(2048, 8), (9, 4), (9, 0), (12, 30)])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_what_is_written_down_is_the_most_attention_of_a_plain_forward(name, chunk, quoted):
    model = tiny(name)
    ids = random_ids(model, 1, 30)
    cache = read(model, zipped(replay_chunk=chunk, quoted=quoted), ids, chunk=11)
    expected = naive(model, ids[0].tolist(), 0, chunk, quoted)
    assert asked(cache).keys() == expected.keys()
    for layer, rows in asked(cache).items():
        torch.testing.assert_close(torch.stack(rows), expected[layer], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt_oss", "phi3", "gemma4"])
def test_half_precision_sinks_and_shared_pairs_give_finite_scores_and_room_is_kept(name):
    model = tiny(name, dtype=torch.bfloat16)
    ids, mask = left_padded(model, [40, 27])
    cache = read(model, zipped(10, replay_chunk=16), ids, attention_mask=mask)
    assert cache.held == 10 * cache.state.footprint().rows * 2
    for rows in asked(cache).values():
        for row in rows:
            assert row.dtype == torch.float32 and (row > 0).all() and (row <= 1).all()


def test_blocks_of_queries_give_what_all_at_once_give(monkeypatch):
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    whole = asked(read(model, zipped(), ids))
    held = []

    def spy(queries, at, keys, positions, scale):
        held.append((queries.shape[1], len(keys)))
        return compute_attention(queries, at, keys, positions, scale)

    monkeypatch.setattr(kvzip, "_BLOCK", 5)
    monkeypatch.setattr(kvzip, "compute_attention", spy)
    blocks = asked(read(model, zipped(), ids))
    for layer, rows in whole.items():
        torch.testing.assert_close(blocks[layer], rows)
    assert max(queries for queries, _ in held) == 5
    held.clear()
    read(model, zipped(replay_chunk=6, quoted=2), ids)
    assert max(keys for _, keys in held) == 2 + 6 + (3 + 2 + 6), "sinks, chunk and replay, not the whole text"


def test_a_left_padded_batch_is_asked_as_each_row_alone():
    model = tiny("qwen3")
    ids, mask = left_padded(model, [30, 13, 4])
    together = asked(read(model, zipped(replay_chunk=8, quoted=3), ids, attention_mask=mask))
    for b, length in enumerate((30, 13, 4)):
        alone = asked(read(model, zipped(replay_chunk=8, quoted=3), ids[b : b + 1, -length:]))
        for layer, rows in alone.items():
            for head, row in enumerate(rows):
                got = together[layer][2 * b + head]
                torch.testing.assert_close(got[-length:], row, atol=1e-5, rtol=1e-4)
                assert (got[:-length] == -1).all(), "pads are not asked"


def books(cache: KVCache) -> list:
    """Return everything that a replay could leave changed, but for what it is there to write."""
    found = [cache.ids, cache.real, cache.seen, dataclasses.replace(cache.state.schedule), cache.state.step]
    for layer in cache.layers:
        state = {name: value for name, value in vars(layer).items() if isinstance(value, Tensor | int)}
        found += [(name, state[name]) for name in sorted(state) if name not in ("_free_slots", "_capacity")]
        for row in range(getattr(layer, "rows", 0)):
            pairs = slice(layer.starts[row], layer.starts[row] + layer.lengths[row])
            found += [x[pairs].clone() for name, x in sorted(layer.columns.items()) if name != "asked"]
        found += [ring.data.clone() for ring in getattr(layer, "rings", {}).values()]
    return found


def assert_same(before: list, after: list) -> None:
    for one, other in zip(before, after, strict=True):
        if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], Tensor):
            one, other = one[1], other[1]
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("evicted", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_replay_changes_nothing_but_what_it_writes_down(name, evicted):
    model = tiny(name)
    ids, mask = left_padded(model, [24, 15])
    cache = KVCache(model, zipped(8 if evicted else 64), observers=[policies.SnapKV(budget=None, observed=5)])
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, attention_mask=mask)
        more = random_ids(model, 2, 6, seed=1)
        forward(model, more, cache)
        assert cache.ragged == evicted
        assert any((row < 0).any() for rows in asked(cache).values() for row in rows)
        before = books(cache)
        cache.policy.prepare(model, cache, more)
        assert_same(before, books(cache))
        assert not any((row[-6:] < 0).any() for rows in asked(cache).values() for row in rows), "or nothing was tried"
        twin = KVCache(model, cache.policy, observers=[policies.SnapKV(budget=None, observed=5)])
        prefill(model, ids, twin, attention_mask=mask)
        forward(model, more, twin)
        token = random_ids(model, 2, 1, seed=2)
        assert torch.equal(forward(model, token, cache), forward(model, token, twin))


def test_room_for_the_replay_is_given_back_where_nothing_is_evicted():
    model = tiny("llama")
    cache = read(model, zipped(64), random_ids(model, 1, 30))
    assert not cache.ragged
    assert cache.report().kv_bytes == 30 * 6 * cache.evictable[0].pair_bytes
    assert cache.evictable[0].pair_bytes == 2 * 16 * 4 + 4 + 4, "keys, values, position, and what is written down"


def test_the_pairs_that_the_replay_looked_at_most_stay_whatever_their_layer():
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    kept = read(model, zipped(12), ids)
    assert kept.held == 12 * 6
    expected = naive(model, ids[0].tolist(), 0, 2048, 8)
    worth = torch.stack([expected[layer] for layer in sorted(expected)]).flatten(0, 1)  # (rows, text)
    worth[:, :2] = worth[:, -3:] = 2
    best = torch.zeros(worth.numel(), dtype=torch.bool)
    best[worth.flatten().argsort(descending=True)[: 12 * 6]] = True
    held = [layer.positions(head).tolist() for layer in kept.evictable for head in range(2)]
    assert held == [row.nonzero()[:, 0].tolist() for row in best.view_as(worth)]
    assert len({len(row) for row in held}) > 1, "rows compete model-wide"


def test_the_next_reading_replays_what_came_since_the_last_one():
    model = tiny("llama")
    text, question, after = (random_ids(model, 1, n, seed=n) for n in (20, 5, 9))
    with torch.no_grad(), attach(model):
        cache = KVCache(model, zipped())
        prefill(model, text, cache)
        first = {layer: torch.stack(rows) for layer, rows in asked(cache).items()}
        prefill(model, question, cache, settle=False)
        unasked = {layer: torch.stack(rows) for layer, rows in asked(cache).items()}
        prefill(model, after, cache)
    expected = naive(model, torch.cat([text, question, after], 1)[0].tolist(), 20, 2048, 8)
    for layer, rows in asked(cache).items():
        assert (unasked[layer][:, 20:] == -1).all()
        assert torch.equal(torch.stack(rows)[:, :20], first[layer]), "what was asked before is not asked again"
        torch.testing.assert_close(torch.stack(rows)[:, 20:], expected[layer][:, 20:], atol=1e-5, rtol=1e-4)


def test_a_conversation_goes_on_within_its_budget():
    model = tiny("gemma3")
    cache = KVCache(model, zipped(12))
    ids = random_ids(model, 1, 30)
    with torch.no_grad(), attach(model):
        for seed in range(3):
            prefill(model, random_ids(model, 1, 20, seed=seed), cache, chunk=8)
            assert cache.held == 12 * cache.state.footprint().rows
            ids = torch.cat([cache.ids, random_ids(model, 1, 1, seed=9)], 1)
            out = model.generate(ids, **cache_argument(cache), max_new_tokens=6, do_sample=False)
            assert out.shape[1] == ids.shape[1] + 6
    assert cache.ragged


def test_a_fork_of_a_shared_reading_is_asked_like_its_own():
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    own = read(model, zipped(12), ids)
    with torch.no_grad(), attach(model):
        shared = KVCache(model, policies.Full(), observers=[zipped(12)])
        prefill(model, ids, shared)
        fork = shared.fork(zipped(12))
        finish(model, fork, ids)
    for layer, rows in asked(own).items():
        assert all(torch.equal(a, b) for a, b in zip(rows, asked(fork)[layer], strict=True))
    assert all((row == -1).all() for rows in asked(shared).values() for row in rows)


def test_a_saved_cache_keeps_the_request_and_what_is_written_down(tmp_path):
    model = tiny("llama")
    cache = read(model, zipped(12), random_ids(model, 1, 30))
    cache.save(tmp_path / "kept")
    loaded = KVCache.load(tmp_path / "kept", model)
    assert loaded.policy == cache.policy and loaded.policy.request == ASK
    for layer, rows in asked(cache).items():
        assert all(torch.equal(a, b) for a, b in zip(rows, asked(loaded)[layer], strict=True))


# The request.


def test_the_default_request_is_put_into_the_chat_text_of_the_models_own_tokenizer(chatter):
    model, tokenizer = chatter
    expected = tuple(ChatTemplate(tokenizer).question(REQUEST)[0].tolist())
    assert kvzip._find_request(model) == expected and len(expected) > 5
    ids = random_ids(model, 1, 30)
    default, given = (asked(read(model, zipped(request=request), ids)) for request in (None, expected))
    assert all(torch.equal(torch.stack(default[i]), torch.stack(given[i])) for i in default)


def test_a_model_that_was_never_saved_is_asked_nothing():
    model = tiny("llama")
    assert kvzip._find_request(model) == ()
    ids = random_ids(model, 1, 20)
    default, given = (asked(read(model, zipped(request=request), ids)) for request in (None, ()))
    assert all(torch.equal(torch.stack(default[i]), torch.stack(given[i])) for i in default)


def test_a_model_without_a_tokenizer_beside_it_needs_the_request_as_ids(tmp_path):
    model = tiny("llama")
    model.config._name_or_path = str(tmp_path / "nothing")
    cache = KVCache(model, zipped(request=None))
    missing = pytest.raises(PolicyError, match=r"no tokenizer lies beside '.*nothing' .*request=\(")
    with missing as refusal, torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 20), cache)
    assert "\n" not in str(refusal.value)
    assert read(model, zipped(request=ASK), random_ids(model, 1, 20)).held == 20 * 6


# Limits.


def test_chunks_shrink_to_the_positions_that_are_left():
    model = tiny("llama", max_position_embeddings=200)
    ids = random_ids(model, 1, 120)
    cache = read(model, zipped(128, quoted=4), ids)  # 200 - 120 - 3 - 4 are left
    expected = naive(model, ids[0].tolist(), 0, 73, 4)
    for layer, rows in asked(cache).items():
        torch.testing.assert_close(torch.stack(rows), expected[layer], atol=1e-5, rtol=1e-4)


def test_too_few_positions_for_a_replay_are_refused_with_the_numbers():
    model = tiny("llama", max_position_embeddings=150)
    with pytest.raises(
        PolicyError, match=r"after 120 tokens .* at least 75 of the model's 150 positions, and 30 are left"
    ):
        read(model, zipped(128), random_ids(model, 1, 120))


def test_a_model_that_was_fed_embeddings_has_nothing_to_replay():
    model = tiny("llama")
    cache = KVCache(model, zipped())
    with torch.no_grad(), attach(model):
        model(inputs_embeds=model.get_input_embeddings()(random_ids(model, 1, 9)), **cache_argument(cache))
        with pytest.raises(PolicyError, match="replays token ids, but the model was fed embeddings"):
            prefill(model, random_ids(model, 1, 9), cache)


def test_a_prompt_that_no_prefill_read_is_refused_before_it_is_evicted():
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    with torch.no_grad(), attach(model), pytest.raises(PolicyError, match=r"vestige.prefill"):
        model.generate(ids, **cache_argument(KVCache(model, zipped(12))), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("options", [{"replay_chunk": 0}, {"replay_chunk": -1}, {"quoted": -1}])
def test_chunks_without_tokens_are_refused(options):
    with pytest.raises(PolicyError, match=r"replay_chunk must be at least 1 .*replay_chunk=.*quoted="):
        zipped(**options)
