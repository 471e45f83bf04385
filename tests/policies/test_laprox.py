"""LaProx against the column-row sampling importance it stands for, through real models and settles."""

import math
from itertools import pairwise

import pytest
import torch

from tests.policies.test_policies import naive_attention, random_observation, rows_of
from vestige import Budget, KVCache, ModelError, PolicyError, attach, policies, prefill
from vestige.models.compat import cache_argument
from vestige.models.layout import check
from vestige.models.output_projection import OutputProjection
from vestige.policies import scoring
from vestige.policies.base import NewPairs
from vestige.testing import left_padded, random_ids, tiny

TOKENS = Budget.tokens(12)


def laprox(budget: Budget = TOKENS, **options):
    return policies.LaProx(**{"budget": budget, "window": 4, "observed": 4, "kernel": 3} | options)


def annotated(obs, output: OutputProjection):
    """Return an observation with the norms that LaProx would have written for its values."""
    from dataclasses import replace

    group = output.weight.shape[0] // obs.kv_heads
    norms = torch.zeros(len(obs.positions), group)
    for row in obs.rows():
        heads = slice(row.kv_head * group, (row.kv_head + 1) * group)
        own = OutputProjection(output.weight[heads])
        norms[row.pairs] = own.norms(obs.values[row.pairs][None, None])[0, 0]
    return replace(obs, annotations={"output_norms": norms})


def column_row_importance(obs, weight: torch.Tensor, observed: int) -> list[float]:
    """Return, pair by pair, the mean over the query group of ||A[:, i]|| * ||v_i W_O||, by loops and by definition."""
    group = weight.shape[0] // obs.kv_heads
    scores = []
    for row, held in enumerate(rows_of(obs)):
        start, b = obs.cu_seqlens[row], row // obs.kv_heads
        first = obs.seen[b] - min(observed, obs.queries[b].shape[1])
        attention = naive_attention(obs, row, observed)
        for number, position in enumerate(held):
            worth = 0.0
            for g in range(group):
                column = math.hypot(*(query.get(position, 0.0) for query in attention[g]))
                head = row % obs.kv_heads * group + g
                projected = obs.values[start + number].double() @ weight[head].double()
                worth += column * float(projected.norm()) / group
            scores.append(worth if position < first else 0.0)
    return scores


@pytest.mark.parametrize("extra", [{}, {"softcap": 1.5}, {"sinks": True}], ids=["plain", "softcap", "sinks"])
def test_the_score_is_the_column_row_sampling_importance(extra):
    obs = random_observation(3, queries_per_kv=3, **extra)
    weight = torch.randn(6, 8, 20, generator=torch.Generator().manual_seed(0))
    scores = laprox(kernel=1).score(annotated(obs, OutputProjection(weight)))
    torch.testing.assert_close(scores, torch.tensor(column_row_importance(obs, weight, 4)), atol=1e-5, rtol=1e-4)


def test_causal_pooling_gives_a_pair_what_those_before_it_are_worth():
    obs = random_observation(3)
    weight = torch.randn(4, 8, 20, generator=torch.Generator().manual_seed(0))
    worth, expected = column_row_importance(obs, weight, 4), []
    for start, end in pairwise(obs.cu_seqlens):
        expected += [sum(worth[max(start, i - 2) : i + 1]) / 3 for i in range(start, end)]
    scores = laprox(kernel=3, causal=True).score(annotated(obs, OutputProjection(weight)))
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=1e-4)


def test_the_importance_is_the_norm_of_the_rank_one_term_that_a_pair_adds_to_the_output():
    # ||a b^T||_F = ||a|| ||b||: what the output of the observed rows loses if one (head, pair) term is left out.
    obs = random_observation(5, seen=(20,), kv_heads=1, queries_per_kv=1, observed=4)
    weight = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(1))
    row = next(obs.rows())
    attention, first = scoring.compute_observed_attention(obs, row, 4)
    outputs = obs.values @ weight[0]
    lost = torch.stack([torch.outer(attention[0, :, i], outputs[i]).norm() for i in range(len(outputs))])
    scores = laprox(kernel=1).score(annotated(obs, OutputProjection(weight)))
    torch.testing.assert_close(scores, lost * (obs.positions < first))


def test_norms_are_stored_in_half_precision_for_each_query_head_when_pairs_are_written():
    model = tiny("llama")
    cache = KVCache(model, laprox())
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 1, 9), cache)
    for layer in cache.evictable:
        assert layer.columns["output_norms"].dtype == torch.float16
        weight = model.model.layers[layer.layer_idx].self_attn.o_proj.weight  # (hidden, heads * head_dim)
        for head in range(4):
            values = layer.view("values")[0, head // 2]
            direct = (values @ weight[:, head * 16 : (head + 1) * 16].T).norm(dim=-1)
            stored = layer.view("output_norms")[0, head // 2, :, head % 2].float()
            torch.testing.assert_close(stored, direct, rtol=1e-3, atol=1e-3)


def kept_by_layer(model, policy, ids):
    cache = KVCache(model, policy)
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache)
    return [[layer.positions(row).tolist() for row in range(layer.rows)] for layer in cache.evictable]


def test_scaling_the_last_output_projection_moves_the_raw_ranking_and_not_the_normalised_one():
    model = tiny("llama")
    ids = random_ids(model, 1, 60)
    before = {scale: kept_by_layer(model, laprox(scale=scale), ids) for scale in ("mass", "calibrated")}
    with torch.no_grad():  # the last layer's: no other layer's pairs depend on it
        model.model.layers[-1].self_attn.o_proj.weight.mul_(10)
    after = {scale: kept_by_layer(model, laprox(scale=scale), ids) for scale in ("mass", "calibrated")}
    assert before["mass"] == after["mass"]
    assert sum(map(len, before["calibrated"][-1])) < sum(map(len, after["calibrated"][-1]))


def test_all_layers_and_heads_share_one_budget_to_the_last_pair():
    model = tiny("llama")
    rows = kept_by_layer(model, laprox(), random_ids(model, 1, 60))
    lengths = [len(row) for layer in rows for row in layer]
    assert sum(lengths) == 12 * 6
    assert len(set(lengths)) > 1
    assert all(row[-4:] == [56, 57, 58, 59] for layer in rows for row in layer)


def test_a_long_text_is_held_to_twice_the_budget_until_its_end():
    model = tiny("llama")
    ids, cache, held = random_ids(model, 1, 120), KVCache(model, laprox()), []
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, chunk=20, progress=lambda _: held.append(cache.held))
    assert held == [20 * 6, *[24 * 6] * 4, (24 + 20) * 6] and cache.held == 12 * 6


def test_room_is_made_while_decoding_from_the_latest_queries():
    model = tiny("llama")
    ids, cache = random_ids(model, 1, 41), KVCache(model, laprox(every=5))
    with torch.no_grad(), attach(model):
        prefill(model, ids[:, :-1], cache)
        model.generate(ids, **cache_argument(cache), max_new_tokens=23, do_sample=False)
        assert cache.held <= (12 + 5) * 6
        cache.settle()
    assert cache.held == 12 * 6
    assert all(layer.positions(0)[-1] == cache.seen[0] - 1 for layer in cache.evictable)


def test_no_attention_matrix_is_larger_than_the_observed_queries_of_one_row(monkeypatch):
    shapes, weigh = [], scoring.compute_attention

    def spy(queries, at, keys, positions, scale):
        shapes.append((queries.shape[1], len(keys)))
        return weigh(queries, at, keys, positions, scale)

    monkeypatch.setattr(scoring, "compute_attention", spy)
    model = tiny("llama")
    kept_by_layer(model, laprox(), random_ids(model, 1, 100))
    assert shapes == [(4, 100)] * 6


def test_a_model_without_a_plain_output_projection_is_refused_before_anything_is_read():
    model = tiny("llama")
    del model.model.layers[1].self_attn.o_proj
    with pytest.raises(ModelError, match="output projection of LlamaAttention was not found or is packed"):
        KVCache(model, laprox())
    KVCache(model, policies.SnapKV(budget=Budget.tokens(50)))


def test_the_gram_matrices_are_made_once_and_anew_when_weights_change():
    model = tiny("llama")
    first = check(model).output(0)
    assert check(model).output(0) is first and check(model).output(0).gram is first.gram
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(2)
    torch.testing.assert_close(check(model).output(0).gram, 4 * first.gram)


def test_a_padded_batch_stores_norms_for_every_pair():
    model = tiny("llama")
    ids, mask = left_padded(model, [30, 17])
    cache = KVCache(model, laprox())
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, attention_mask=mask)
    assert sum(cache.evictable[0].lengths) == len(cache.evictable[0].columns["output_norms"])


def test_large_values_stay_finite():
    values = torch.full((1, 1, 2, 8), 1e6)
    policy, output = laprox(), OutputProjection(torch.eye(8)[None])
    written = NewPairs(layer_idx=0, hidden=None, keys=values, values=values, output=output)
    assert policy.annotate(written)["output_norms"].isfinite().all()


@pytest.mark.parametrize("options", [{"kernel": 2}, {"observed": 0}, {"kernel": -1}])
def test_a_window_without_queries_and_an_even_kernel_are_refused(options):
    with pytest.raises(PolicyError, match="observed must be at least 1 and kernel odd"):
        laprox(**options)
