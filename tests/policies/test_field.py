"""The training-free field against naive oracles: h2o, pyramidkv, adakv, criticalkv, lagkv, r_kv."""

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.conftest import made
from tests.policies.test_policies import EXTRAS, naive_snapkv, random_observation, rows_of
from vestige import Budget, KVCache, Observation, Phase, PolicyError, attach, policies, prefill
from vestige.kernels import AttentionScale
from vestige.models.compat import cache_argument
from vestige.models.output_projection import OutputProjection
from vestige.policies import h2o
from vestige.policies.base import NewPairs
from vestige.policies.observation import RowView
from vestige.policies.selection import RowIndex, select
from vestige.testing import attention, left_padded, random_ids, tiny

SMALL = {"sink": 1, "window": 3, "every": 4}


def read(model, policy, ids, mask=None, chunk=7) -> KVCache:
    cache = KVCache(model, policy)
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, chunk=chunk, attention_mask=mask)
    return cache


def generate(model, cache, steps: int) -> Tensor:
    """Feed random tokens one by one, with what padded rows need; return them."""
    ids = random_ids(model, len(cache.seen), steps, seed=9)
    mask = cache.real.long()
    with torch.no_grad(), attach(model):
        for t in range(steps):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            at = torch.tensor(cache.seen)[:, None]
            model(input_ids=ids[:, t : t + 1], attention_mask=mask, position_ids=at, **cache_argument(cache))
    return ids


def held(cache) -> Iterator[tuple[int, int, int, list[int]]]:
    """Yield layer, batch row, KV head and positions of every row."""
    for layer in cache.evictable:
        for row in range(layer.rows):
            yield layer.layer_idx, *divmod(row, layer.kv_heads), layer.positions(row).tolist()


def positions_of(cache) -> list[list[int]]:
    return [positions for *_, positions in held(cache)]


# H2O.


@pytest.mark.parametrize("chunk", [7, 100])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_h2o_receives_the_column_sums_of_a_dense_softmax(name, chunk, monkeypatch):
    monkeypatch.setattr(h2o, "QUERY_BLOCK", 3)
    model = tiny(name)
    ids, mask = left_padded(model, [30, 19], seed=1)
    cache = read(model, made("h2o"), ids, mask, chunk)
    fed = torch.cat([ids, generate(model, cache, 5)], 1)
    mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
    with torch.no_grad(), attention(model, "eager"):
        at = (mask.cumsum(1) - 1).clamp_min(0)
        dense = model(input_ids=fed, attention_mask=mask, position_ids=at, output_attentions=True).attentions
    for layer in cache.evictable:
        weights = dense[layer.layer_idx].unflatten(1, (layer.kv_heads, -1)).mean(2)  # (batch, kv_heads, queries, keys)
        expected = (weights * mask[:, None, :, None]).sum(2)
        received = layer.view("received")
        assert received.dtype == torch.float32
        torch.testing.assert_close(received * mask[:, None], expected * mask[:, None], atol=1e-5, rtol=1e-5)
        assert not received[1, :, :11].any(), "nobody sees a pad"


def naive_received(view: RowView, scale: AttentionScale) -> list[float]:
    """Return what every pair of a row received, by loops over query heads, queries and pairs."""
    received = [0.0] * len(view.positions)
    for head, queries in enumerate(view.queries.double()):
        for query, at in zip(queries, view.query_positions.tolist(), strict=True):
            logits = {}
            for pair, position in enumerate(view.positions.tolist()):
                if 0 <= position <= at:
                    x = float(query @ view.keys[pair].double()) * scale.scaling
                    logits[pair] = x if scale.softcap is None else scale.softcap * math.tanh(x / scale.softcap)
            total = sum(map(math.exp, logits.values()))
            total += 0 if scale.sinks is None else math.exp(scale.sinks[head])
            for pair, x in logits.items():
                received[pair] += math.exp(x) / total / len(view.queries)
    return received


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("block", [2, 256])
def test_h2o_adds_up_what_a_row_with_gaps_and_pads_is_paid(block, extra, monkeypatch):
    monkeypatch.setattr(h2o, "QUERY_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([0, 3, 4, -1, -1, 9, 10, 11, 12, 13], dtype=torch.int32)
    options = EXTRAS[extra]
    sinks = torch.randn(2, generator=generator) if "sinks" in options else None
    scale = AttentionScale(0.5, options.get("softcap"), sinks)
    before = torch.rand(10, generator=generator)
    view = RowView(
        layer_idx=0,
        kv_head=0,
        queries=torch.randn(2, 5, 4, generator=generator),
        query_positions=torch.arange(9, 14),
        attention=scale,
        positions=positions,
        keys=torch.randn(10, 4, generator=generator),
        values=torch.randn(10, 4, generator=generator),
        annotations={"received": before.clone()},
    )
    made("h2o").watch(view)
    gained = view.annotations["received"] - before
    torch.testing.assert_close(gained, torch.tensor(naive_received(view, scale)))


def test_h2o_counts_attention_also_while_gradients_are_on():
    model = tiny("gpt_oss")
    ids = random_ids(model, 1, 12, seed=2)
    cache, plain = KVCache(model, made("h2o")), read(model, made("h2o"), ids)
    with attach(model):
        model(input_ids=ids, **cache_argument(cache)).logits.sum().backward()
    for one, other in zip(cache.evictable, plain.evictable, strict=True):
        assert not one.columns["received"].requires_grad
        torch.testing.assert_close(one.view("received"), other.view("received"))


def test_h2o_keeps_the_recent_half_and_the_heavy_hitters_through_reading_and_decoding():
    model = tiny("llama")
    ids = random_ids(model, 2, 30, seed=3)
    full = read(model, made("h2o"), ids, chunk=30)
    cache = read(model, policies.H2O(budget=Budget.tokens(11), window=0, every=4), ids, chunk=30)
    for layer, b, kv_head, positions in held(cache):
        assert positions[-5:] == [25, 26, 27, 28, 29], "half of 11, rounded down"
        received = full.layers[layer].view("received")[b, kv_head, :25]
        assert positions[:6] == sorted(received.topk(6).indices.tolist())
    generate(model, cache, 9)
    for *_, positions in held(cache):
        assert len(positions) == 11 + 1 and positions[-6:] == [33, 34, 35, 36, 37, 38]


def test_h2o_forgets_nothing_that_a_pair_received_before_an_eviction():
    model = tiny("llama")
    ids = random_ids(model, 1, 40, seed=4)
    cache = read(model, policies.H2O(budget=Budget.tokens(12), share="layer", **SMALL), ids, chunk=40)
    full = read(model, made("h2o"), ids)
    for layer in cache.evictable:
        for kv_head in range(layer.kv_heads):
            row = slice(layer.starts[kv_head], layer.starts[kv_head] + layer.lengths[kv_head])
            expected = full.layers[layer.layer_idx].view("received")[0, kv_head, layer.positions(kv_head).long()]
            torch.testing.assert_close(layer.columns["received"][row], expected)


def test_forks_and_loaded_caches_of_h2o_go_on_counting(tmp_path):
    model = tiny("llama")
    cache = read(model, policies.H2O(budget=Budget.tokens(12), **SMALL), random_ids(model, 1, 20, seed=19), chunk=20)
    cache.save(tmp_path / "kept")
    others = [cache.fork(), KVCache.load(tmp_path / "kept", model)]
    before = cache.evictable[0].view("received").sum()
    for one in (cache, *others):
        generate(model, one, 3)
    gained = cache.evictable[0].view("received").sum() - before
    assert float(gained) == pytest.approx(2 * 3), "three queries in two rows pay 1 each"
    for other in others:
        for a, b in zip(cache.evictable, other.evictable, strict=True):
            for row in range(a.rows):
                mine, theirs = (x.columns["received"][x.starts[row] :][: x.lengths[row]] for x in (a, b))
                assert torch.equal(mine, theirs)


# PyramidKV.


def rectangle(layers: list[int], lengths: list[int], heads: int = 2) -> RowIndex:
    """Return a grid in which each batch row has so many pairs in every row."""
    flat = [(n, layer, b) for layer in layers for b, n in enumerate(lengths) for _ in range(heads)]
    return RowIndex(*(torch.tensor(x) for x in zip(*flat, strict=True)))


def wanted(grid: RowIndex, room: list[int], **options) -> list[float]:
    policy = made("pyramidkv", sink=2, window=2, **options)
    return policy.allot(torch.empty(int(grid.lengths.sum())), grid, torch.tensor(room)).tolist()


@pytest.mark.parametrize(
    ("layers", "length", "options", "expected"),
    [
        ([0, 1, 2], 100, {}, [4 + 39, 4 + 20, 4 + 1]),  # 20 beyond sink and window; 20 / 20 last, 2 * 20 - 1 first
        ([1, 4, 9], 100, {}, [4 + 39, 4 + 20, 4 + 1]),  # other layers slide
        ([0, 1, 2], 100, {"beta": 4.0}, [4 + 35, 4 + 20, 4 + 5]),
        ([0, 1, 2], 100, {"beta": 1.0}, [24, 24, 24]),
        ([0, 1, 2, 3], 100, {"beta": 2.0}, [34, 4 + 20 + 10 / 3, 4 + 20 - 10 / 3, 14]),
        ([0, 1, 2], 34, {}, [34, 24, 14]),  # the first layer cannot have 43, so the last has more
        ([0, 1, 2], 24, {}, [24, 24, 24]),
        ([0, 1, 2], 9, {}, [24, 24, 24]),
        ([5], 100, {}, [24]),
    ],
)
def test_a_pyramid_falls_linearly_to_a_part_of_the_average(layers, length, options, expected):
    got = wanted(rectangle(layers, [length]), [24], **options)
    assert got == pytest.approx([n for n in expected for _ in range(2)])
    assert sum(got) == pytest.approx(24 * len(got))


def test_every_batch_row_has_its_own_pyramid():
    got = torch.tensor(wanted(rectangle([0, 1], [100, 50]), [24, 14])).view(2, 2, 2)
    assert got.tolist() == [[[43, 43], [23.5, 23.5]], [[5, 5], [4.5, 4.5]]]


def test_no_room_beyond_sink_and_window_makes_no_pyramid():
    assert wanted(rectangle([0, 1], [100]), [4]) == [4] * 4


@pytest.mark.parametrize("budget", [7, 25, 39])
def test_a_pyramid_adds_up_exactly_and_rows_of_a_layer_are_equal(budget):
    model = tiny("llama", num_hidden_layers=4)
    ids, mask = left_padded(model, [40, 33], seed=5)
    cache = read(model, policies.PyramidKV(budget=Budget.tokens(budget), **SMALL), ids, mask)
    for steps in (0, 9):
        if steps:
            generate(model, cache, steps)
            cache.settle()
        for b, seen in enumerate(cache.seen):
            counts = [[len(p) for i, row, _, p in held(cache) if (i, row) == (layer, b)] for layer in range(4)]
            assert sum(map(sum, counts)) == min(budget, seen) * 8
            assert all(max(rows) - min(rows) <= 1 for rows in counts)
            assert all(min(lower) >= max(higher) - 1 for lower, higher in pairwise(counts))
            assert budget > 30 or min(counts[0]) > max(counts[3])


def test_a_pyramid_scores_as_snapkv():
    obs = random_observation(1)
    options = {"observed": 3, "kernel": 3}
    assert torch.equal(made("pyramidkv", **options).score(obs), made("snapkv", **options).score(obs))


@pytest.mark.parametrize("beta", [0.0, 0.5, -3.0, math.nan])
def test_a_pyramid_that_stands_on_its_top_is_refused(beta):
    with pytest.raises(PolicyError, match=f"beta must be a number of at least 1, got {beta!r}"):
        made("pyramidkv", beta=beta)


# AdaKV.


def test_adakv_is_snapkv_with_heads_that_compete_above_a_floor():
    model = tiny("llama")
    ids = random_ids(model, 2, 40, seed=6)
    options = {"budget": Budget.tokens(14), "observed": 3, "kernel": 3, **SMALL}
    got = positions_of(read(model, policies.AdaKV(**options), ids))
    assert got == positions_of(read(model, policies.SnapKV(**options, share="layer", floor=0.2), ids))
    assert len({len(positions) for positions in got}) > 1
    assert got != positions_of(read(model, policies.SnapKV(**options), ids))


def test_the_floor_of_adakv_guards_a_head_that_nobody_attends_to():
    scores = torch.cat([torch.arange(20) + 100.0, torch.arange(20) * 1.0])
    policy, grid = made("adakv", **SMALL), rectangle([0], [20])
    kept = select(
        scores, torch.arange(20).repeat(2), torch.zeros(40, dtype=torch.bool), grid, torch.tensor([10]),
        share=policy.share, scale=policy.scale, floor=policy.floor,
    )  # fmt: skip
    assert kept.view(2, 20).sum(1).tolist() == [18, 2]


def test_adakv_with_one_kv_head_is_snapkv():
    model = tiny("llama", num_key_value_heads=1)
    ids, mask = left_padded(model, [40, 31], seed=7)
    options = {"budget": Budget.tokens(12), "observed": 3, "kernel": 3, **SMALL}
    ada, snap = (read(model, cls(**options), ids, mask) for cls in (policies.AdaKV, policies.SnapKV))
    for cache in (ada, snap):
        generate(model, cache, 9)
    assert positions_of(ada) == positions_of(snap)


# CriticalKV.


def naive_criticalkv(obs: Observation, policy) -> list[float]:
    """Return the two stages by loops: places for the first are filled one by one, from the largest, latest pair."""
    attention = naive_snapkv(obs, policy.observed, policy.kernel, policy.causal)
    norms = obs.annotations["absolute_output_norms"].tolist()
    product = [(a + policy.epsilon) * n for a, n in zip(attention, norms, strict=True)]
    rows = rows_of(obs)
    pairs = [(row, p) for row, positions in enumerate(rows) for p in positions]
    free = [policy.sink <= p < obs.seen[row // obs.kv_heads] - policy.window for row, p in pairs]
    first: set[int] = set()
    members = {"head": [[row] for row in range(len(rows))]}
    members["layer"] = [list(range(b * obs.kv_heads, (b + 1) * obs.kv_heads)) for b in range(len(obs.seen))]
    members["model"] = members["layer"]
    for group in members[policy.share]:
        for _ in range(
            sum(int((obs.pair_limits[r // obs.kv_heads] - policy.protected) * policy.first_stage) for r in group)
        ):
            left = [i for i, (row, _) in enumerate(pairs) if row in group and free[i] and i not in first]
            first |= {max(left, key=lambda i: (attention[i], pairs[i][1]))} if left else set()
    scores = []
    for i, (row, _) in enumerate(pairs):
        values = attention if i in first else product
        layer = [j for j, (r, _) in enumerate(pairs) if r // obs.kv_heads == row // obs.kv_heads and free[j]]
        total = sum(values[j] for j in layer)
        share = min(values[i] / total, 1) if total else float(values[i] > 0)
        scores.append(share + 2 * (i in first))
    return scores


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("share", ["head", "layer", "model"])
@pytest.mark.parametrize(("first_stage", "causal"), [(0.0, False), (0.6, False), (0.6, True)])
def test_criticalkv_equals_the_naive_one(first_stage, causal, share, extra):
    obs = random_observation(8, kv_heads=3, **EXTRAS[extra])
    obs = Observation(**vars(obs) | {"pair_limits": (7, 9)})
    policy = made(
        "criticalkv", observed=3, kernel=3, first_stage=first_stage, causal=causal, share=share, sink=1, window=1
    )
    torch.testing.assert_close(policy.score(obs), torch.tensor(naive_criticalkv(obs, policy)))


@pytest.mark.parametrize("share", ["head", "layer"])
def test_criticalkv_keeps_half_by_attention_and_half_by_output(share):
    model = tiny("llama")
    ids = random_ids(model, 2, 40, seed=9)
    options = {"observed": 3, "kernel": 3, **SMALL}
    whole = policies.CriticalKV(budget=Budget.tokens(64), **options)
    full = read(model, whole, ids, chunk=40)
    cache = read(model, policies.CriticalKV(budget=Budget.tokens(12), share=share, **options), ids, chunk=40)
    for layer in full.evictable:
        obs = layer.observe(Phase.PREFILL, full.seen, [12, 12], *layer.live_slots())
        attention = torch.tensor(naive_snapkv(obs, 3, 3)).view(2, 2, 40)
        norms = layer.view("absolute_output_norms")
        for b in range(2):
            rows = [[kv_head] for kv_head in range(2)] if share == "head" else [[0, 1]]
            for group in rows:
                free = [(h, p) for h in group for p in range(1, 37)]
                by_attention = sorted(free, key=lambda x: float(attention[b][x]), reverse=True)[: 4 * len(group)]
                rest = set(free) - set(by_attention)
                by_output = sorted(
                    rest, key=lambda x: float((attention[b][x] + 1e-4) * norms[b][x]), reverse=True
                )[: 4 * len(group)]  # fmt: skip
                kept = {(h, p) for i, row, h, held_ in held(cache) if (i, row) == (layer.layer_idx, b) for p in held_}
                assert {x for x in kept if x in free} == {*by_attention, *by_output}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_criticalkv_stores_mean_l1_norms_after_the_output_projection(name):
    model = tiny(name)
    ids = random_ids(model, 1, 9, seed=10)
    cache = read(model, made("criticalkv"), ids)
    for layer in cache.evictable:
        weight = model.model.layers[layer.layer_idx].self_attn.o_proj.weight.detach()  # (hidden, heads * head_dim)
        heads = weight.shape[1] // layer.view("values").shape[-1]
        for kv_head in range(layer.kv_heads):
            for token, value in enumerate(layer.view("values")[0, kv_head]):
                group = [h for h in range(heads) if h * layer.kv_heads // heads == kv_head]
                norms = [float((weight.unflatten(1, (heads, -1))[:, h] @ value).abs().sum()) for h in group]
                got = float(layer.view("absolute_output_norms")[0, kv_head, token])
                assert got == pytest.approx(sum(norms) / len(norms), rel=1e-5)


def test_norms_beyond_half_precision_stay_finite():
    values = torch.full((1, 1, 2, 4), 30.0, dtype=torch.bfloat16)
    output = OutputProjection(torch.ones(2, 4, 1024, dtype=torch.bfloat16))
    written = NewPairs(layer_idx=0, hidden=None, keys=values, values=values, output=output)
    norms = made("criticalkv").annotate(written)["absolute_output_norms"]
    assert norms.tolist() == [[[120.0 * 1024] * 2]]  # 122880 > 65504


def test_the_first_stage_stands_above_the_second_in_every_layer():
    small, large = random_observation(11, kv_heads=2), random_observation(12, kv_heads=2)
    large.annotations["absolute_output_norms"].mul_(1e6)
    for share in ("head", "layer", "model"):
        policy = made("criticalkv", observed=3, share=share, sink=0, window=0)
        scores = torch.cat([policy.score(obs) for obs in (small, large)])
        assert ((scores >= 0) & (scores <= 1) | (scores >= 2) & (scores <= 3)).all()
        # Half of 4 places in each row; one row of either layer holds nothing, and gives its places up or to its layer.
        assert (scores >= 2).sum() == 2 * (3 * 2 if share == "head" else 4 * 2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"first_stage": 1.5}, "first_stage=1.5"),
        ({"first_stage": -0.1}, "first_stage=-0.1"),
        ({"epsilon": -1e-4}, "epsilon=-0.0001"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"observed": 0}, "observed=0"),
        ({"kernel": 4}, "kernel=4"),
    ],
)
def test_criticalkv_refuses_what_it_cannot_work_with(options, told):
    with pytest.raises(PolicyError, match=told):
        made("criticalkv", **options)
