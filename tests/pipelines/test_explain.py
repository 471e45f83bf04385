"""How much attention evidence gets, and which of its pairs are left."""

import pytest
import torch

from vestige import InputError, KVCache, Span, attach, policies, prefill
from vestige.budget import Budget
from vestige.pipelines.explain import attention_to, explain, find_held
from vestige.testing import random_ids, tiny

STREAMING = policies.StreamingLLM(budget=Budget.tokens(6), sink=2, window=4)


def read(model, ids, policy=None):
    cache = KVCache(model, policy or policies.Full())
    with attach(model), torch.no_grad():
        prefill(model, ids, cache)
    return cache


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_attention_to_all_that_was_read_is_that_of_the_model(name):
    model = tiny(name)
    ids, asked = random_ids(model, 1, 12), random_ids(model, 1, 3, seed=1)
    cache = read(model, ids)
    with attach(model):
        paid = attention_to(model, cache, asked, torch.tensor([2, 3, 7]))
    assert cache.seen == (12,) and cache.report().held == 12 * sum(layer.rows for layer in cache.evictable)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(torch.cat([ids, asked], 1), output_attentions=True).attentions
    for layer, got in zip(cache.evictable, paid, strict=True):
        own = weights[layer.layer_idx][0, :, 12:][:, :, [2, 3, 7]].unflatten(0, (layer.kv_heads, -1))
        torch.testing.assert_close(got, own.mean((1, 2)), atol=1e-5, rtol=1e-4)


def test_the_held_pairs_are_those_that_the_cache_holds():
    model = tiny("llama")
    held = find_held(read(model, random_ids(model, 1, 12), STREAMING), torch.arange(1, 10))
    assert len(held) == model.config.num_hidden_layers
    assert all((layer == torch.tensor([True] + [False] * 6 + [True] * 2)).all() for layer in held)


def test_what_is_evicted_gets_nothing_and_what_is_left_gets_more():
    model = tiny("llama")
    ids, asked = random_ids(model, 1, 12), random_ids(model, 1, 3, seed=1)
    full, cache = read(model, ids), read(model, ids, STREAMING)
    with attach(model):
        found = explain(model, full, cache, asked, [Span(0, 2), Span(5, 7)])
    assert found.held_share == 0.5
    assert all((layer[:, 2:] == 0).all() and (layer[:, :2] > 0).all() for layer in found.kept)
    assert 0 < found.attention_held < 1
    with attach(model):
        sinks = explain(model, full, cache, asked, [Span(0, 2)])
    assert sinks.held_share == 1.0 and sinks.attention_held == 1.0
    assert sinks.dilution_kept < sinks.dilution_full < 1.0
    row = found.as_dict()
    assert row["evidence"] == [0, 1, 5, 6] and all(layer["held"] == [[0, 1]] * 2 for layer in row["layers"])
    row = sinks.as_dict()
    assert row["dilution_kept"] == sinks.dilution_kept and len(row["layers"]) == len(full.evictable)


def test_attention_to_what_is_left_is_that_of_a_model_that_cannot_see_the_rest():
    model = tiny("llama")
    ids, asked = random_ids(model, 1, 12), random_ids(model, 1, 3, seed=1)
    cache, evidence = read(model, ids, STREAMING), torch.tensor([1, 5, 9])
    with attach(model):
        paid = attention_to(model, cache, asked, evidence)
    seen = torch.ones(15, 15, dtype=torch.bool).tril()
    seen[12:, 2:8] = False  # what is evicted is so only for what comes after it
    model.set_attn_implementation("eager")
    mask = torch.zeros(15, 15).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        weights = model(torch.cat([ids, asked], 1), attention_mask=mask, output_attentions=True).attentions
    for layer, got in zip(cache.evictable, paid, strict=True):
        own = weights[layer.layer_idx][0, :, 12:][:, :, evidence].unflatten(0, (layer.kv_heads, -1))
        torch.testing.assert_close(got, own.mean((1, 2)), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_explained_is_refused():
    model = tiny("llama")
    ids, asked = random_ids(model, 1, 12), random_ids(model, 1, 3, seed=1)
    full = read(model, ids)
    with attach(model), pytest.raises(InputError, match="both caches"):
        explain(model, full, read(model, ids[:, :11]), asked, [Span(0, 2)])
    with attach(model), pytest.raises(InputError, match="no token of the evidence"):
        explain(model, full, full, asked, [Span(12, 14)])


def test_what_an_answer_rests_on_is_shown_before_and_after_eviction(vestige, folders, place):
    asked = ("--context", "story.txt", "--question", "Who?", "--question", "Why?", "--max-new-tokens", "3")
    command = ("run", "--model", folders.chat, *asked, "--policy", "snapkv", "--budget", "48")
    explained = (*command, "--explain", "the keeper of lamp 16", "--explain", "Line 7")
    row = vestige(*explained, "--json").row
    plain = vestige(*command, "--json").row
    assert row["answers"] == plain["answers"] and row["held"] == plain["held"]
    assert len(row["explain"]) == 2 and row["explain"][0]["held_share"] == row["explain"][1]["held_share"] < 1
    assert all(0 < one["dilution_full"] < 1 and 0 < one["attention_held"] < 1 for one in row["explain"])
    shown = vestige(*explained).out
    assert "attention to the evidence" in shown and f"{row['explain'][0]['held_share']:.1%}" in shown
    whole = ("run", "--model", folders.chat, *asked, "--explain", "Line 7", "--json")
    assert all(one["dilution_full"] == one["dilution_kept"] for one in vestige(*whole).row["explain"])
