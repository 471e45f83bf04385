"""Invariant 1, the oracle of the whole: logits after evictions equal one dense forward with the evicted pairs masked.

The scenario has every phase: a text read in chunks, decoding past a settle, a second turn, decoding again.
"""

import pytest
import torch
from torch import Tensor

from vestige import Budget, KVCache, attach, policies, prefill
from vestige.models.compat import cache_argument
from vestige.policies import POLICIES
from vestige.testing import TINY, covering, left_padded, masked_logits, random_ids, tiny, tiny_vl, watch

EVICTING = sorted(set(POLICIES) - {"full"})
SMALL = {"sink": 2, "window": 3, "every": 4}


def decode(model, cache, mask, token, steps) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Feed greedy tokens one by one; return them, their logits and the grown mask."""
    tokens, logits = [], []
    for _ in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        positions = torch.tensor(cache.seen)[:, None]
        out = model(input_ids=token, attention_mask=mask, position_ids=positions, **cache_argument(cache)).logits
        tokens.append(token)
        logits.append(out)
        token = out[:, -1:].argmax(-1)
    return tokens, logits, mask


def two_turns(model, cache, ids, mask) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Read, decode past a settle, read a second turn, decode; return ids, mask, logits and their columns."""
    cut = ids.shape[1] - 8
    with torch.no_grad(), attach(model):
        first = prefill(model, ids[:, :cut], cache, chunk=7, attention_mask=mask[:, :cut])[:, None]
        made, logits, grown = decode(model, cache, mask[:, :cut], first.argmax(-1), 6)
        second = prefill(model, ids[:, cut:], cache, chunk=5)[:, None]
        grown = torch.cat([grown, mask[:, cut:]], 1)
        more, further, grown = decode(model, cache, grown, second.argmax(-1), 6)
    fed = torch.cat([ids[:, :cut], *made, ids[:, cut:], *more], 1)
    columns = [*range(cut - 1, cut + 6), *range(fed.shape[1] - 7, fed.shape[1])]
    return fed, grown, torch.cat([first, *logits, second, *further], 1), columns


def assert_equals_masking(model, policy, ids, mask) -> KVCache:
    cache = KVCache(model, policy)
    deaths = watch(cache)
    fed, grown, got, at = two_turns(model, cache, ids, mask)
    assert cache.ragged
    with torch.no_grad():
        expected = masked_logits(model, fed, covering(deaths, fed.shape[1]), attention_mask=grown)[:, at]
        dense = masked_logits(model, fed, {}, attention_mask=grown)[:, at]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got - dense).abs().max() > 1e-3, "the evicted pairs did not matter: the test would prove nothing"
    return cache


@pytest.mark.parametrize("batch", ["alone", "left-padded"])
@pytest.mark.parametrize("share", ["head", "layer", "model"])
@pytest.mark.parametrize("name", EVICTING)
def test_every_policy_equals_masking_in_every_phase(name, share, batch):
    model = tiny("llama")
    lengths = [40] if batch == "alone" else [40, 33, 21]
    ids, mask = left_padded(model, lengths, seed=1)
    policy = policies.resolve(name)(budget=Budget.tokens(12), share=share, **SMALL)
    cache = assert_equals_masking(model, policy, ids, mask)
    cache.settle()
    report = cache.report()
    assert report.held == report.budget_total == 12 * 6 * len(lengths)


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_equals_masking(name):
    model = tiny(name)
    ids, mask = left_padded(model, [40, 26], seed=2)
    assert_equals_masking(model, policies.Random(budget=Budget.tokens(10), share="model", **SMALL), ids, mask)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_policies_that_look_at_queries_equal_masking_with_softcap_and_sinks(name):
    model = tiny(name)
    ids, mask = left_padded(model, [40, 26], seed=3)
    policy = policies.SnapKV(budget=Budget.tokens(10), share="model", observed=5, **SMALL)
    assert_equals_masking(model, policy, ids, mask)


@pytest.mark.parametrize("name", ["random", "retention"])
def test_a_vision_language_model_with_an_image_equals_masking(name):
    model, inputs = tiny_vl()
    policy = policies.resolve(name)(budget=Budget.tokens(14), share="model", **SMALL)
    cache = KVCache(model, policy)
    deaths = watch(cache)
    with torch.no_grad(), attach(model):
        out = model.generate(
            **inputs, **cache_argument(cache), max_new_tokens=12, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    fed = out.sequences[:, :-1]
    assert cache.report().kept_fraction < 0.6
    assert torch.equal(cache.ids, fed)
    inputs.pop("input_ids")
    expected = masked_logits(model, fed, covering(deaths, fed.shape[1]), **inputs)
    torch.testing.assert_close(torch.stack(out.logits, 1), expected[:, -12:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_generate_evicts_and_equals_masking(name):
    model = tiny(name)
    ids, mask = left_padded(model, [30, 19], seed=4)
    cache = KVCache(model, policies.KNorm(budget=Budget.tokens(10), share="layer", **SMALL))
    deaths = watch(cache)
    with torch.no_grad(), attach(model):
        out = model.generate(
            ids, attention_mask=mask, **cache_argument(cache), max_new_tokens=11, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        fed = out.sequences[:, :-1]
        expected = masked_logits(model, fed, covering(deaths, fed.shape[1]), attention_mask=mask)
    assert cache.ragged
    torch.testing.assert_close(torch.stack(out.logits, 1), expected[:, -11:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_greedy_generate_with_full_gives_the_tokens_of_a_dynamic_cache(name):
    from vestige.testing import attention

    model = tiny(name)
    ids, mask = left_padded(model, [24, 24, 11], seed=5)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    # Where sdpa cannot express the model (softcap, sinks), some transformers versions use it all the same.
    plain = "eager" if name in ("gemma2", "gpt_oss") else model.get_decoder().config._attn_implementation
    with torch.no_grad():
        with attention(model, plain):
            expected = model.generate(ids, **options)
        with attach(model):
            got = model.generate(ids, **cache_argument(KVCache(model, policies.Full())), **options)
    assert torch.equal(got, expected)


def test_pads_of_a_later_turn_are_not_stored_and_read_zero():
    model = tiny("llama")
    ids = random_ids(model, 2, 20, seed=6)
    cache = KVCache(model, policies.Random(budget=Budget.tokens(10), **SMALL))
    turn, turn_mask = left_padded(model, [6, 3], seed=7)
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, chunk=8)
        held = cache.held
        outputs = []
        hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, x: outputs.append(x[0]))
        logits = prefill(model, turn, cache, settle=False, attention_mask=turn_mask)
        hook.remove()
        alone = KVCache(model, policies.Random(budget=Budget.tokens(10), **SMALL))
        prefill(model, ids[1:], alone, chunk=8)
        expected = prefill(model, turn[1:, 3:], alone, settle=False)
    assert cache.seen == (26, 23)
    assert cache.held == held + 3 * 2 * (6 + 3)
    assert not outputs[0][1, :3].any()
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[1:], expected, atol=1e-5, rtol=1e-5)


def test_chunks_after_an_eviction_attend_causally_within_themselves():
    model = tiny("llama")
    ids = random_ids(model, 1, 40, seed=8)
    policy = policies.StreamingLLM(budget=Budget.tokens(12), **SMALL)
    whole, single = KVCache(model, policy), KVCache(model, policy)
    with torch.no_grad(), attach(model):
        for cache in (whole, single):
            prefill(model, ids[:, :30], cache)
        together = model(ids[:, 30:], **cache_argument(whole)).logits
        single.state.schedule.reading = True  # no settle between the tokens
        apart = torch.cat([model(ids[:, i : i + 1], **cache_argument(single)).logits for i in range(30, 40)], 1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
