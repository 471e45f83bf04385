"""Plugging in and out: three public hooks, nothing patched, everything restored; what does not fit is refused."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedConfig
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

from vestige import (
    Budget,
    BudgetError,
    CacheError,
    InputError,
    KVCache,
    ModelError,
    attach,
    check,
    detach,
    policies,
    prefill,
)
from vestige.models.compat import CACHE_NAME, OLD_NAME, cache_argument
from vestige.testing import REFUSED, TINY, left_padded, random_ids, tiny, tiny_vl

NAMES = [*TINY]


def evicting(model, tokens=10, **options):
    return KVCache(model, policies.Random(budget=Budget.tokens(tokens), sink=2, window=3, every=4, **options))


def hooks_of(model: nn.Module) -> list[int]:
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_detaching_leaves_model_and_config_as_they_were(name):
    model = tiny(name)
    config, hooks = copy.deepcopy(model.config.to_dict()), hooks_of(model)
    implementation = model.get_decoder().config._attn_implementation
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    ids = random_ids(model, 1, 30)
    with torch.no_grad(), attach(model):
        assert model.get_decoder().config._attn_implementation == "vestige"
        model.generate(ids, **cache_argument(evicting(model)), max_new_tokens=6, do_sample=False)
    assert model.config.to_dict() == config
    assert model.get_decoder().config._attn_implementation == implementation
    assert hooks_of(model) == hooks
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_everything_is_restored_when_the_block_raises():
    model = tiny("llama")
    before = model.config._attn_implementation
    with pytest.raises(KeyError), attach(model):
        raise KeyError
    assert model.config._attn_implementation == before
    assert not any(hooks_of(model))


def test_attach_nests_and_detach_is_the_other_way_out():
    model = tiny("llama")
    attach(model)
    with attach(model):
        pass
    assert model.config._attn_implementation == "vestige"
    detach(model)
    detach(model)  # once too often is no error
    assert model.config._attn_implementation != "vestige"
    assert not any(hooks_of(model))


def test_only_the_text_config_of_a_vision_language_model_is_switched():
    model, inputs = tiny_vl()
    vision = model.config.vision_config._attn_implementation
    with torch.no_grad():
        expected = model(**inputs).logits
        with attach(model):
            assert model.config.text_config._attn_implementation == "vestige"
            assert model.config.vision_config._attn_implementation == vision
            got = model(**inputs, **cache_argument(KVCache(model, policies.Full()))).logits
    assert torch.equal(got, expected)


def test_a_cache_on_a_model_that_is_not_attached_raises_at_the_first_update():
    model = tiny("llama")
    ids = random_ids(model, 1, 5)
    cache = KVCache(model, policies.Full())
    with torch.no_grad():
        with pytest.raises(CacheError, match=r"not attached.*vestige.attach"):
            model(ids, **cache_argument(cache))
        with attach(model):
            model(ids, **cache_argument(cache))
        with pytest.raises(CacheError, match="not attached"):
            model(ids, **cache_argument(cache))


@pytest.mark.parametrize("name", NAMES)
def test_an_attached_model_works_as_before_without_a_cache_and_with_a_dynamic_one(name):
    model = tiny(name)
    ids, mask = left_padded(model, [12, 7])
    from vestige.testing import attention

    plain = "eager" if name in ("gemma2", "gpt_oss") else model.get_decoder().config._attn_implementation
    with torch.no_grad():
        with attention(model, plain):
            expected = model(ids, attention_mask=mask).logits
        with attach(model):
            without = model(ids, attention_mask=mask, use_cache=False).logits
            dynamic = model(ids, attention_mask=mask, **cache_argument(DynamicCache(config=model.config))).logits
    real = mask.bool()
    torch.testing.assert_close(without[real], expected[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dynamic[real], expected[real], atol=1e-5, rtol=1e-5)
    if plain == "sdpa":
        assert torch.equal(without[real], expected[real])


def test_static_quantised_and_foreign_caches_are_refused_where_they_arrive():
    model = tiny("llama")
    ids = random_ids(model, 1, 5)

    class Foreign(DynamicCache):
        pass

    quantised = object.__new__(QuantizedCache)
    quantised.layers = []
    with torch.no_grad(), attach(model):
        for cache in (StaticCache(config=model.config, max_cache_len=16), Foreign(config=model.config), quantised):
            with pytest.raises(CacheError, match=type(cache).__name__):
                model(ids, **cache_argument(cache))
        with pytest.raises(CacheError, match=r"takes a vestige.KVCache, got DynamicCache"):
            prefill(model, ids, DynamicCache(config=model.config))  # type: ignore[arg-type]


def test_a_cache_of_another_model_is_refused():
    model, other = tiny("llama"), tiny("llama", seed=1)
    with torch.no_grad(), attach(model), attach(other), pytest.raises(CacheError, match="another model"):
        other(random_ids(model, 1, 5), **cache_argument(KVCache(model, policies.Full())))


REASONS = {"deepseek_v3": "MLA", "jetmoe": "repeats the cached keys", "diffllama": "subtracts", "bloom": "no attention"}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_evicted_are_refused_by_name_and_reason(name):
    model = tiny(name)
    for refuse in (check, attach, lambda m: KVCache(m, policies.Full())):
        with pytest.raises(ModelError, match=f"{type(model).__name__}.*{REASONS[name]}"):
            refuse(model)


def test_a_model_without_full_attention_layers_is_refused():
    model = tiny("mistral", sliding_window=8)
    with pytest.raises(ModelError, match="no full-attention layer"):
        check(model)


def test_check_refuses_what_is_not_a_transformers_model():
    with pytest.raises(ModelError, match="Linear"):
        check(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["jetmoe", "diffllama", "deepseek_v3"])
def test_transforms_after_update_that_no_list_knows_raise_at_the_handle(name, monkeypatch):
    from vestige.models import layout as models

    monkeypatch.setattr(models, "TRANSFORMS_AFTER_UPDATE", {})
    model = tiny(name)
    monkeypatch.setattr(type(model.config), "kv_lora_rank", None, raising=False)
    if name == "deepseek_v3":
        monkeypatch.delattr(PreTrainedConfig, "kv_lora_rank", raising=False)
        anatomy_of = models.ModelLayout
        layers = model.get_decoder().layers
        anatomy = anatomy_of(model, model.get_decoder(), (0, 1, 2), {i: layers[i].self_attn for i in range(3)})
        monkeypatch.setattr("vestige.cache.attach.check", lambda _: anatomy)
        monkeypatch.setattr("vestige.cache.kv_cache.check", lambda _: anatomy)
    with torch.no_grad(), attach(model), pytest.raises(CacheError, match=r"between storing and attending"):
        model(random_ids(model, 1, 5), **cache_argument(KVCache(model, policies.Full())))


def test_the_input_must_begin_where_the_cache_ends():
    model = tiny("llama")
    ids = random_ids(model, 1, 20)
    cache = KVCache(model, policies.Full())
    with torch.no_grad(), attach(model):
        model(ids[:, :10], **cache_argument(cache))
        with pytest.raises(CacheError, match=r"begins at position 5, but the cache has seen 10"):
            model(ids[:, 10:], position_ids=torch.arange(5, 15)[None], **cache_argument(cache))
        cache.crop(-3)
        with pytest.raises(CacheError, match="batch rows"):
            model(random_ids(model, 2, 3), **cache_argument(cache))
        model(ids[:, 7:], position_ids=torch.arange(7, 20)[None], **cache_argument(cache))
    assert cache.seen == (20,)
    assert torch.equal(cache.ids, ids)


def test_pads_without_positions_are_refused():
    model = tiny("llama")
    ids, mask = left_padded(model, [6, 4])
    with torch.no_grad(), attach(model), pytest.raises(CacheError, match="position_ids"):
        model(ids, attention_mask=mask, **cache_argument(KVCache(model, policies.Full())))


def test_a_forward_that_died_midway_is_noticed_at_the_next():
    model = tiny("llama")
    cache = KVCache(model, policies.Full())
    ids = random_ids(model, 1, 8)

    def die(*_):
        raise RuntimeError("out of memory")

    with torch.no_grad(), attach(model):
        model(ids[:, :4], **cache_argument(cache))
        hook = model.model.layers[1].self_attn.register_forward_hook(die)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(ids[:, 4:6], **cache_argument(cache))
        hook.remove()
        with pytest.raises(CacheError, match="died midway"):
            model(ids[:, 6:], **cache_argument(cache))
        with pytest.raises(CacheError, match="died midway"):
            cache.settle() if cache.policy.budget else cache.crop(-1)


def test_custom_masks_work_while_dense_and_are_refused_after_an_eviction():
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    bidirectional = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    cache = evicting(model)
    with torch.no_grad(), attach(model):
        prefill(model, ids[:, :20], cache)
        assert cache.ragged
        with pytest.raises(CacheError, match="custom mask"):
            model(ids[:, 20:24], attention_mask=bidirectional, **cache_argument(cache.fork()))
        twin = cache.fork()
        plain = model(ids[:, 20:24], **cache_argument(cache)).logits
        masked = model(ids[:, 20:24], attention_mask=causal, **cache_argument(twin)).logits
        assert torch.equal(plain, masked)


def test_hidden_states_reach_policies_that_ask_for_them():
    from dataclasses import dataclass
    from typing import ClassVar

    from vestige import Policy

    @dataclass(frozen=True, kw_only=True)
    class HiddenNorm(Policy):
        needs: ClassVar = frozenset({"hidden"})
        annotations: ClassVar = frozenset({"norm"})

        def annotate(self, written):
            norm = written.hidden.norm(dim=-1)
            return {"norm": norm[:, None].expand(-1, written.keys.shape[1], -1)}

        def score(self, seen):
            return seen.annotations["norm"].float()

    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    entering = {}
    hook = model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, __, kwargs: entering.update(x=kwargs["hidden_states"]), with_kwargs=True
    )
    cache = KVCache(model, HiddenNorm(budget=Budget.tokens(10), sink=0, window=0))
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache)
    hook.remove()
    best = entering["x"][0].norm(dim=-1).topk(10).indices.sort().values
    for row in range(2):
        assert torch.equal(cache.evictable[1].positions(row).long(), best)
    assert cache.evictable[1].columns["norm"].shape == cache.evictable[1].columns["positions"].shape


def test_policies_with_forwards_of_their_own_need_prefill():
    from dataclasses import dataclass

    from vestige import Policy, PolicyError

    calls = []

    @dataclass(frozen=True, kw_only=True)
    class Replaying(Policy):
        def prepare(self, model, cache, ids):
            replay = cache.fork(policies.Full())
            model(ids[:, :3], **cache_argument(replay))
            calls.append((cache.held, ids.shape))

        def score(self, seen):
            return seen.positions.float()

    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    policy = Replaying(budget=Budget.tokens(10), sink=2, window=3)
    with torch.no_grad(), attach(model):
        with pytest.raises(PolicyError, match=r"Replaying.*vestige.prefill"):
            model.generate(ids, **cache_argument(KVCache(model, policy)), max_new_tokens=3)
        cache = KVCache(model, policy)
        prefill(model, ids, cache)
        assert calls == [(30 * 6, (1, 30))]
        assert cache.held == 10 * 6
        prefill(model, ids[:, :9], cache, chunk=20, settle=False)  # a question
        model(ids[:, :1], **cache_argument(cache))
        model(ids[:, :25], **cache_argument(cache))  # a second text, longer than a chunk, that no prefill reads
        with pytest.raises(PolicyError, match=r"Replaying.*vestige.prefill"):
            model(ids[:, :1], **cache_argument(cache))


def test_a_budget_or_a_text_that_cannot_work_is_refused_before_anything_is_read():
    model = tiny("llama")
    with pytest.raises(BudgetError, match=r"4 pairs a row, but sink and window protect 5"):
        evicting(model, tokens=4)
    cache = KVCache(model, policies.Random(budget=Budget.fraction(0.1)))
    with torch.no_grad(), attach(model):
        with pytest.raises(BudgetError, match=r"10 pairs a row.*protect 36"):
            prefill(model, random_ids(model, 1, 60), cache, length=100)
        with pytest.raises(InputError, match=r"513 tokens are more than the model's 512"):
            prefill(model, random_ids(model, 1, 513), cache)
        with pytest.raises(InputError, match="nothing to read"):
            prefill(model, random_ids(model, 1, 0), cache)
    assert cache.seen == () and cache.held == 0
    with pytest.raises(BudgetError, match="protect 36"):
        KVCache(model, policies.Random(budget=Budget.bytes(10_000)))


def test_gradients_flow_through_the_cache():
    model = tiny("llama")
    ids = random_ids(model, 1, 24)
    with attach(model):
        cache = KVCache(model, policies.Full())
        first = model(ids[:, :12], **cache_argument(cache)).logits
        second = model(ids[:, 12:], **cache_argument(cache)).logits
        torch.cat([first, second], 1).square().mean().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(ids, use_cache=False).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_gradients_flow_through_a_cache_that_was_evicted():
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    cache = evicting(model, share="model")
    with attach(model):
        with torch.no_grad():
            prefill(model, ids[:, :30], cache)
        with torch.no_grad():
            expected = model(ids[:, 30:], **cache_argument(cache.fork())).logits
        got = model(ids[:, 30:36], **cache_argument(cache)).logits
        singly = [model(ids[:, i : i + 1], **cache_argument(cache)).logits for i in range(36, 40)]
        rest = torch.cat(singly, 1)
        torch.testing.assert_close(torch.cat([got, rest], 1), expected, atol=1e-5, rtol=1e-5)
        rest.square().mean().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_a_hybrid_of_convolutions_and_attention_keeps_its_other_layers():
    config = Lfm2Config(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, full_attn_idxs=[1, 3], bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(config).eval()
    ids = random_ids(model, 1, 40)
    options = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        expected = model.generate(ids, **options)
        with attach(model):
            cache = KVCache(model, policies.Full())
            assert torch.equal(model.generate(ids, **cache_argument(cache), **options), expected)
            cache = evicting(model, tokens=12)
            prefill(model, ids, cache, chunk=8)
            twin = cache.fork()
            nxt = random_ids(model, 1, 2, seed=1)
            got = model(nxt, **cache_argument(cache)).logits
            assert torch.equal(model(nxt, **cache_argument(twin)).logits, got)
    report = cache.report()
    assert [layer.layer_idx for layer in report.layers] == [1, 3]
    assert report.other_kv_bytes > 0 and report.kept_fraction < 0.4


def test_the_cache_is_taken_under_every_name_that_transformers_has_for_it():
    """Code written before 5.24 says ``past_key_values``, which newer ones rename only once the hooks have run."""
    model = tiny("llama")
    ids = random_ids(model, 1, 30)
    held = []
    with torch.no_grad(), attach(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name in (OLD_NAME, CACHE_NAME):
            cache = evicting(model)
            model(ids[:, :20], **{name: cache})
            model.generate(ids, **{name: cache}, max_new_tokens=4, min_new_tokens=4, do_sample=False)
            held.append((cache.seen, cache.report().held))
    assert held[0] == held[1]
    assert held[0][0] == (33,)
    assert cache.report().held < cache.report().full
