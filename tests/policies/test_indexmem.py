"""The indexer and what keeps by it: importance against dense ones, whose scores are whose, intervals, files."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import rms_norm

from tests.conftest import random_indexer
from vestige import Budget, InputError, KVCache, ModelError, Phase, PolicyError, Span, attach, erase, prefill
from vestige.erasers import Learned
from vestige.models.compat import cache_argument
from vestige.nn import indexer as indexing
from vestige.nn.indexer import Indexer, IndexerConfig
from vestige.policies import IndexMem, KNorm
from vestige.testing import left_padded, random_ids, tiny

MODEL = tiny("llama")
APART, SHARED = random_indexer(MODEL), random_indexer(MODEL, apart=False, heads=2)
EITHER = pytest.mark.parametrize("indexer", [APART, SHARED], ids=["apart", "shared"])
ROOMY = Budget.tokens(64)
SINK = 1


def policy(indexer: Indexer = APART, budget: Budget = ROOMY, **options) -> IndexMem:
    return IndexMem(budget=budget, indexer=indexer, **{"sink": SINK, "window": 2} | options)


@torch.no_grad()
def dense(model, ids, indexer: Indexer, layer_idx: int) -> torch.Tensor:
    """Return how much every query asks for every key, ``kv_heads queries keys``, by loops, from the projections."""
    entered, attention = [], model.model.layers[layer_idx].self_attn
    hook = attention.register_forward_pre_hook(lambda m, a, k: entered.append(k["hidden_states"][0]), with_kwargs=True)
    model(ids, use_cache=False)
    hook.remove()
    layer, config = indexer.at(layer_idx), indexer.config
    place = config.layers.index(layer_idx)
    kv_heads = config.kv_heads[place]
    groups = kv_heads if config.apart else 1
    heads = config.heads * kv_heads // groups
    size = config.dim * kv_heads // groups
    keys = (entered[0] @ layer.keys.weight.T).view(-1, groups, size)
    queries = (entered[0] @ layer.queries.weight.T).view(-1, groups, heads, size)
    gates = (entered[0] @ layer.gates.weight.T).view(-1, groups, heads) * (heads * groups * size) ** -0.5
    keys = rms_norm(keys, (size,), layer.key_norm.weight)
    queries = rms_norm(queries, (size,), layer.query_norm.weight)
    asks = torch.zeros(groups, len(keys), len(keys))
    for g in range(groups):
        for s in range(len(keys)):
            for t in range(len(keys)):
                for h in range(heads):
                    asks[g, s, t] += gates[s, g, h] * max(float(queries[s, g, h] @ keys[t, g]), 0.0)
    return asks.expand(kv_heads, -1, -1)


def seen_by(asks: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Return the most that queries from one position to another ask for each key before the end; -inf if none may."""
    causal = torch.ones(end, end, dtype=torch.bool).tril()
    return asks[:, :end, :end].masked_fill(~causal, -torch.inf)[:, first:end].amax(1)


def read(model, ids, chosen, chunk: int = 64, mask=None) -> KVCache:
    cache = KVCache(model, chosen)
    with attach(model), torch.no_grad():
        prefill(model, ids, cache, chunk=chunk, attention_mask=mask)
    return cache


ASKED = indexing.index_scores


# Importance.


@EITHER
@pytest.mark.parametrize("chunk", [64, 7, 1])
@pytest.mark.parametrize("block", [4, 256])
def test_streamed_importance_is_the_dense_one(indexer, chunk, block, monkeypatch):
    compared = []

    def asked(asking, keys):
        compared.append(asking.queries.shape[2])
        return ASKED(asking, keys)

    monkeypatch.setattr(indexing, "QUERY_BLOCK", block)
    monkeypatch.setattr(indexing, "index_scores", asked)
    ids = random_ids(MODEL, 1, 23)
    cache = read(MODEL, ids, policy(indexer), chunk)
    assert max(compared, default=1) <= min(block, chunk), "nothing of all queries times all keys ever exists"
    assert compared or chunk == 1
    for layer in cache.evictable:
        expected = seen_by(dense(MODEL, ids, indexer, layer.layer_idx), 0, 23)
        notes = layer.view("asked_for")[0].float()
        torch.testing.assert_close(notes[..., 0], expected, atol=2e-2, rtol=2e-3)  # float16
        assert (notes[..., 1] == -torch.inf).all()


@EITHER
def test_the_streamed_mean_is_the_dense_one_over_all_that_saw_a_pair(indexer, monkeypatch):
    monkeypatch.setattr(indexing, "QUERY_BLOCK", 5)
    ids = random_ids(MODEL, 1, 23)
    cache = read(MODEL, ids, policy(indexer, reduction="mean"), 9)
    for layer in cache.evictable:
        asks = dense(MODEL, ids, indexer, layer.layer_idx).tril()
        torch.testing.assert_close(layer.view("asked_for")[0, ..., 0], asks.sum(1), atol=1e-3, rtol=1e-3)
        scores = scored(cache, layer)
        mean = asks.sum(1) / torch.arange(23, 0, -1)
        expected = log_shares(mean) + indexer.log_scale(layer.layer_idx)[:, None]
        torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)


def log_shares(asked_for: torch.Tensor) -> torch.Tensor:
    """Return log shares of what is asked for of all tokens but the sinks, as an indexer is trained."""
    return asked_for - asked_for[:, SINK:].logsumexp(-1, keepdim=True)


def scored(cache, layer) -> torch.Tensor:
    """Return the scores of a layer whose rows are equally long."""
    obs = layer.observe(Phase.PREFILL, cache.seen, [64], *layer.live_slots())
    return cache.policy.score(obs).view(layer.kv_heads, -1)


@EITHER
def test_scores_are_log_shares_of_what_is_asked_for_plus_the_log_of_the_heads_scale(indexer):
    ids = random_ids(MODEL, 1, 23)
    cache = read(MODEL, ids, policy(indexer))
    for layer in cache.evictable:
        expected = log_shares(seen_by(dense(MODEL, ids, indexer, layer.layer_idx), 0, 23))
        expected = expected + indexer.log_scale(layer.layer_idx)[:, None]
        torch.testing.assert_close(scored(cache, layer), expected, atol=3e-2, rtol=2e-3)


@EITHER
def test_pads_ask_for_nothing(indexer):
    ids, mask = left_padded(MODEL, [20, 13])
    together = read(MODEL, ids, policy(indexer), 8, mask)
    for b, pads in enumerate((0, 7)):
        alone = read(MODEL, ids[b : b + 1, pads:], policy(indexer), 20)
        for one, many in zip(alone.evictable, together.evictable, strict=True):
            notes = many.view("asked_for")[b].float()
            torch.testing.assert_close(notes[:, pads:], one.view("asked_for")[0].float(), atol=2e-2, rtol=2e-3)


@EITHER
def test_pads_of_a_later_turn_ask_for_nothing_and_hide_nothing(indexer):
    """They lie in the midst of a cache that evicted nothing yet."""
    ids = random_ids(MODEL, 2, 36)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :10] = 0
    together = read(MODEL, ids[:, :20], policy(indexer), 20)
    alone = read(MODEL, ids[1:, :20], policy(indexer), 20)
    with attach(MODEL), torch.no_grad():
        prefill(MODEL, ids[:, 20:], together, attention_mask=mask)
        prefill(MODEL, ids[1:, 30:], alone)
    for one, many in zip(alone.evictable, together.evictable, strict=True):
        notes = many.view("asked_for")[1].float()
        real = torch.cat([notes[:, :20], notes[:, 30:]], 1)
        torch.testing.assert_close(real, one.view("asked_for")[0].float(), atol=2e-2, rtol=2e-3)


def test_how_much_sinks_are_asked_for_takes_no_room_from_the_rest():
    """They take no part in training, so nothing tells how much a query asks for them."""
    cache = read(MODEL, random_ids(MODEL, 1, 23), policy())
    layer = cache.evictable[0]
    before = scored(cache, layer)
    layer.view("asked_for")[0, 0, :SINK, 0] += 4
    after = scored(cache, layer)
    assert torch.equal(after[:, SINK:], before[:, SINK:]) and not torch.equal(after, before)


@pytest.mark.parametrize("tokens", [1, 5])
def test_one_score_for_a_layer_needs_rows_that_hold_the_same_tokens(tokens):
    ids = random_ids(MODEL, 1, 40)
    own = policy(SHARED, Budget.tokens(9), share="head")
    evicted = KVCache(MODEL, KNorm(budget=Budget.tokens(12), sink=2, window=4), observers=[own])
    with attach(MODEL), torch.no_grad():
        prefill(MODEL, ids, evicted)
    cache = evicted.fork(own)
    with attach(MODEL), torch.no_grad(), pytest.raises(PolicyError, match="must hold the same tokens"):
        for start in range(0, 10, tokens):
            prefill(MODEL, ids[:, start : start + tokens], cache)


@EITHER
@pytest.mark.parametrize("batch", [1, 2])
def test_a_token_asks_of_rows_that_were_evicted_what_it_asks_of_each_alone(indexer, batch):
    share = "model" if indexer.config.apart else "head"
    ids, mask = left_padded(MODEL, [40, 31][:batch])
    cache = read(MODEL, ids, policy(indexer, Budget.tokens(9), share=share), 16, mask)
    entered = {}

    def note(module, args, given):
        entered[module.layer_idx] = given["hidden_states"][:, 0]

    hooks = [x.self_attn.register_forward_pre_hook(note, with_kwargs=True) for x in MODEL.model.layers]
    with attach(MODEL), torch.no_grad():
        prefill(MODEL, ids[:, -1:], cache, settle=False)
    for hook in hooks:
        hook.remove()
    assert any(len(set(layer.lengths)) > 1 for layer in cache.evictable) == (share == "model")
    for layer in cache.evictable:
        own = indexer.at(layer.layer_idx)
        for row in range(layer.rows):
            b, head = divmod(row, layer.kv_heads)
            asking = own.index_queries(entered[layer.layer_idx][b : b + 1])
            parts = [layer.annotations(b * layer.kv_heads + h)["index_key"] for h in range(layer.kv_heads)]
            keys = parts[head] if indexer.config.apart else torch.cat(parts, -1)
            group = head if indexer.config.apart else 0
            products = (asking.queries[group, :, 0] @ keys.T).relu() * asking.gates[group]
            notes = layer.annotations(row)["asked_for"][:, 0].float()
            torch.testing.assert_close(notes, products.sum(0), atol=2e-2, rtol=2e-3)


def test_projecting_what_enters_attention_is_projecting_queries_before_rope():
    layer_idx, ids = 1, random_ids(MODEL, 1, 9)
    attention, found = MODEL.model.layers[layer_idx].self_attn, []
    hooks = [
        attention.register_forward_pre_hook(lambda m, a, k: found.append(k["hidden_states"][0]), with_kwargs=True),
        attention.q_proj.register_forward_hook(lambda m, args, out: found.append(out[0])),
    ]
    papers = torch.randn(16, attention.q_proj.out_features, generator=torch.Generator().manual_seed(0))
    indexer = random_indexer(MODEL, heads=2)
    indexer.at(layer_idx).queries.weight.data = papers @ attention.q_proj.weight
    with torch.no_grad():
        MODEL(ids, use_cache=False)
        asking = indexer.at(layer_idx).index_queries(found[0]).queries
        projected = rms_norm((found[1] @ papers.T).view(9, 2, 2, 4), (4,), indexer.at(layer_idx).query_norm.weight)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(asking, projected.permute(1, 2, 0, 3), atol=1e-4, rtol=1e-4)


# Whose scores.


def test_heads_of_a_layer_that_share_a_score_keep_the_same_tokens_and_equally_many_in_every_layer():
    cache = read(MODEL, random_ids(MODEL, 1, 40), policy(SHARED, Budget.tokens(12)), 16)
    for layer in cache.evictable:
        assert torch.equal(layer.positions(0), layer.positions(1)) and len(layer.positions(0)) == 12


def test_a_score_that_heads_share_needs_heads_that_hold_the_same_tokens():
    ids = random_ids(MODEL, 1, 40)
    cache = KVCache(MODEL, KNorm(budget=Budget.tokens(12), sink=1, window=2), observers=[policy(SHARED)])
    with attach(MODEL), torch.no_grad():
        prefill(MODEL, ids, cache)
        fork = cache.fork(policy(SHARED, Budget.tokens(10)))
        with pytest.raises(PolicyError, match="another policy has evicted.*scores apart"):
            prefill(MODEL, ids[:, :4], fork)


def test_heads_with_scores_apart_keep_tokens_of_their_own_and_compete():
    chosen = policy(APART, Budget.tokens(12), share="model")
    cache = read(MODEL, random_ids(MODEL, 1, 40), chosen)
    lengths = [n for layer in cache.evictable for n in layer.lengths]
    assert sum(lengths) == 12 * len(lengths) and len(set(lengths)) > 1


@pytest.mark.parametrize("share", ["layer", "model"])
def test_scores_that_heads_share_cannot_decide_between_them(share):
    with pytest.raises(PolicyError, match="one score for all heads.*share='head'"):
        KVCache(MODEL, policy(SHARED, share=share))


@EITHER
def test_layers_that_follow_keep_what_their_leader_keeps_and_store_no_index(indexer):
    model = tiny("llama", num_hidden_layers=4)
    shape = {"apart": indexer.config.apart, "heads": indexer.config.heads}
    cache = read(model, random_ids(model, 1, 40), policy(random_indexer(model, **shape), Budget.tokens(12), reuse=2))
    leaders, followers = cache.evictable[::2], cache.evictable[1::2]
    for leader, follower in zip(leaders, followers, strict=True):
        for row in range(leader.rows):
            assert torch.equal(leader.positions(row), follower.positions(row))
        assert follower.pair_bytes < leader.pair_bytes
        assert {follower.columns[name].shape[1] for name in ("index_key", "asked_for")} == {0}
    assert not torch.equal(leaders[0].positions(0), leaders[1].positions(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reuse": 0}, "reuse must be an integer of at least 1"),
        ({"reuse": 2, "share": "model"}, "reuse needs share='head'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(PolicyError, match=message):
        policy(**options)


def test_an_unknown_reduction_is_refused(unchecked):
    with pytest.raises(PolicyError, match="max, mean"):
        policy(reduction="median")


# Intervals.


@EITHER
def test_after_an_eviction_only_what_is_asked_since_counts(indexer):
    ids = random_ids(MODEL, 1, 36)
    cache = KVCache(MODEL, policy(indexer, Budget.tokens(10), every=6))
    with attach(MODEL), torch.no_grad():
        prefill(MODEL, ids[:, :24], cache)
        first = [note.clone() for note in noted(cache)]
        for at in range(24, 29):
            MODEL(ids[:, at : at + 1], **cache_argument(cache))
    for before, after, positions in zip(first, noted(cache), held(cache), strict=True):
        assert (before[:, 0] == -torch.inf).all() and before[:, 1].isfinite().all()
        old = positions < 24
        assert old.sum() == 10 and after[old][:, 0].isfinite().all(), "queries since then asked"
        assert torch.equal(after[old][:, 1], before[:, 1])
        assert (after[~old][:, 1] == -torch.inf).all(), "what came since was never asked for before"


def noted(cache):
    return [layer.annotations(row)["asked_for"].float() for layer in cache.evictable for row in range(layer.rows)]


def held(cache):
    return [layer.positions(row) for layer in cache.evictable for row in range(layer.rows)]


def test_while_nobody_asks_what_was_asked_before_decides():
    ids = random_ids(MODEL, 1, 40)
    cache = read(MODEL, ids, policy(APART, Budget.tokens(20)))
    twice = cache.fork(policy(APART, Budget.tokens(8)))
    twice.settle()
    at_once = read(MODEL, ids, policy(APART, Budget.tokens(8)))
    assert twice.held == at_once.held
    for one, other in zip(held(twice), held(at_once), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_renewed_where_nothing_was_evicted():
    cache = read(MODEL, random_ids(MODEL, 1, 20), policy(APART))
    assert all(note[:, 0].isfinite().all() for note in noted(cache))


# Beside the rest.


def test_an_erasure_by_learning_writes_new_index_keys_and_leaves_what_was_asked(monkeypatch):
    ids = random_ids(MODEL, 1, 30)
    cache = read(MODEL, ids, policy(APART, Budget.tokens(20)))
    before = cache.fork()
    monkeypatch.setattr(Learned, "weights_for", lambda self, model: Biased(model))
    erase(cache, Span(10, 14), Learned(), model=MODEL, input_ids=ids)
    for old, new in zip(before.evictable, cache.evictable, strict=True):
        inside = (old.columns["positions"] >= 10) & (old.columns["positions"] < 14)
        assert torch.equal(old.columns["asked_for"], new.columns["asked_for"])
        assert torch.equal(old.columns["index_key"][~inside], new.columns["index_key"][~inside])
        if old.layer_idx:  # what enters the first layer does not hang on attention
            assert bool(inside.any()) and not torch.equal(
                old.columns["index_key"][inside], new.columns["index_key"][inside]
            )


class Biased:
    """An adapter that is none: values come out shifted."""

    def __init__(self, model) -> None:
        self.model = model

    def applied(self, model):
        return self

    def __enter__(self):
        def shift(module, args, out):
            return out + 1

        self.hooks = [layer.self_attn.v_proj.register_forward_hook(shift) for layer in self.model.model.layers]

    def __exit__(self, *args):
        for hook in self.hooks:
            hook.remove()


def test_index_keys_weigh_their_bytes_and_nothing_more():
    cache = read(MODEL, random_ids(MODEL, 1, 20), policy(APART, Budget.tokens(12)))
    pair = MODEL.config.head_dim * 2 * 4 + 4
    note = APART.config.dim * 4 + 2 * 2  # float32 keys, two float16 notes
    assert cache.report().kv_bytes == cache.held * (pair + note)


# Files.


def test_an_indexer_is_the_same_after_saving_and_loading_up_to_float16(tmp_path):
    APART.save(tmp_path)
    found = Indexer.load(tmp_path, MODEL)
    assert found.config == APART.config
    for name, weight in APART.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight, atol=0, rtol=1e-3)
    scores = [read(MODEL, random_ids(MODEL, 1, 20), policy(one)) for one in (APART, found)]
    for one, other in pairwise(map(noted, scores)):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, atol=0.05, rtol=0.02)


def test_an_indexer_of_another_model_is_refused(tmp_path):
    other = tiny("llama", seed=1)
    APART.save(tmp_path)
    for indexer in (APART, str(tmp_path)):
        with pytest.raises(ModelError, match="indexer made for another model"):
            KVCache(other, IndexMem(budget=ROOMY, indexer=indexer))


def test_a_folder_without_an_indexer_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="has no indexer: no indexer.json"):
        KVCache(MODEL, IndexMem(budget=ROOMY, indexer=str(tmp_path)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [({"layers": ()}, "needs layers"), ({"kv_heads": (2,)}, "of each"), ({"dim": 0}, "at least 1")],
)
def test_shapes_that_cannot_be_are_refused(shape, message):
    good = {"layers": (0, 1), "kv_heads": (2, 2), "hidden": 8}
    with pytest.raises(InputError, match=message):
        IndexerConfig(**good | shape)


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "mistral", "gpt_oss"])
def test_indexers_serve_any_model(name):
    model = tiny(name)
    cache = read(model, random_ids(model, 1, 40), policy(random_indexer(model), Budget.tokens(12), share="model"))
    assert cache.held == 12 * sum(layer.rows for layer in cache.evictable)
