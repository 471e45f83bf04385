"""The retention policy: its score is the formula, and its gates are asked once, when pairs are written."""

import pytest
import torch

from tests.conftest import random_gates
from tests.policies.test_policies import random_observation
from vestige import (
    Budget,
    CacheFileError,
    KVCache,
    ModelError,
    PolicyError,
    Span,
    attach,
    erase,
    erasers,
    policies,
    prefill,
)
from vestige.models.compat import cache_argument
from vestige.policies.retention import compute_log_worth
from vestige.testing import left_padded, random_ids, tiny, tiny_vl

MODEL = tiny("llama")
GATES = random_gates(MODEL)
ROOM = Budget.tokens(12)


def retention(budget: Budget | None = ROOM, **options) -> policies.Retention:
    return policies.Retention(**{"budget": budget, "gates": GATES} | options)


def read(policy, ids, model=MODEL, **options) -> KVCache:
    cache = KVCache(model, policy)
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache, **options)
    return cache


@pytest.mark.parametrize("horizon", [1, 2, 7, 300])
def test_the_closed_form_is_the_sum(horizon):
    log_beta = -torch.tensor([8.0, 1.0, 0.1, 1e-3, 1e-6])
    age = torch.tensor([1.0, 3.0, 40.0, 1.0, 2000.0])
    terms = (age.double()[:, None] + torch.arange(horizon)) * log_beta.double()[:, None]
    torch.testing.assert_close(
        compute_log_worth(log_beta, age, horizon).double(), terms.logsumexp(1), atol=1e-4, rtol=1e-4
    )


def test_a_pair_that_is_kept_for_good_is_worth_the_horizon():
    found = compute_log_worth(torch.tensor([-0.0, -1e-30]), torch.tensor([5.0, 5.0]), 8)
    torch.testing.assert_close(found, torch.tensor([8.0, 8.0]).log())


def test_the_score_is_age_times_log_beta():
    obs = random_observation(5)
    scores = retention().score(obs)
    for row in obs.rows():
        for i in range(row.pairs.start, row.pairs.stop):
            age = obs.seen[row.batch] - int(obs.positions[i])
            assert float(scores[i]) == pytest.approx(age * float(obs.annotations["log_beta"][i]))


def test_log_beta_is_what_the_gates_say_of_what_enters_attention():
    ids, entered = random_ids(MODEL, 2, 20), {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: entered.update({module.layer_idx: kwargs["hidden_states"]}), with_kwargs=True
        )
        for layer in MODEL.model.layers
    ]
    cache = read(retention(Budget.tokens(64)), ids)
    for hook in hooks:
        hook.remove()
    for layer in cache.evictable:
        found = layer.view("log_beta")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, GATES(layer.layer_idx, entered[layer.layer_idx]))


@pytest.mark.parametrize(("share", "group"), [("head", (2, 2)), ("layer", (1, 2)), ("model", (0, 2))])
def test_a_cache_keeps_exactly_the_best(share, group):
    ids = random_ids(MODEL, 1, 40)
    whole, cache = read(retention(Budget.tokens(64)), ids), read(retention(share=share), ids)
    rows = sum(layer.rows for layer in cache.evictable)
    assert cache.held == 12 * rows
    scores = torch.stack([layer.view("log_beta")[0] * (40 - torch.arange(40)) for layer in whole.evictable])
    flat = scores.flatten(*group)
    count = flat.shape[-1] // 40 * 12
    best = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, flat.topk(count, -1).indices, True)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for i, layer in enumerate(cache.evictable):
        for row in range(layer.rows):
            kept[i, row, layer.positions(row).long()] = True
    assert torch.equal(kept, best.view_as(scores))


def test_a_pair_weighs_four_bytes_more_for_its_retention():
    weights = [read(policy, random_ids(MODEL, 1, 20)).state.footprint() for policy in (retention(), policies.Full())]
    rows = weights[0].rows
    assert weights[0].pair_bytes - weights[1].pair_bytes == 4 * rows


def test_chunks_turns_and_single_tokens_write_the_same():
    ids = random_ids(MODEL, 1, 30)
    whole = read(retention(Budget.tokens(64)), ids)
    parts = KVCache(MODEL, retention(Budget.tokens(64)))
    with torch.no_grad(), attach(MODEL):
        prefill(MODEL, ids[:, :17], parts, chunk=5)
        for i in range(17, 30):
            MODEL(input_ids=ids[:, i : i + 1], **cache_argument(parts))
    for one, other in zip(whole.evictable, parts.evictable, strict=True):
        torch.testing.assert_close(one.view("log_beta"), other.view("log_beta"), atol=1e-5, rtol=1e-4)


def test_padded_rows_count_age_from_their_own_end():
    ids, mask = left_padded(MODEL, [30, 18])
    batch = KVCache(MODEL, retention())
    with torch.no_grad(), attach(MODEL):
        prefill(MODEL, ids, batch, attention_mask=mask)
    alone = read(retention(), ids[1:, 12:])
    for one, other in zip(batch.evictable, alone.evictable, strict=True):
        for head in range(one.kv_heads):
            assert torch.equal(one.positions(one.kv_heads + head), other.positions(head))


def test_an_image_competes_with_the_text_around_it():
    model, inputs = tiny_vl()
    cache = KVCache(model, retention(Budget.tokens(9), gates=random_gates(model)))
    with torch.no_grad(), attach(model):
        model.generate(**inputs, **cache_argument(cache), max_new_tokens=3, do_sample=False)
    image = inputs["mm_token_type_ids"][0].bool()
    held = [layer.positions(row) for layer in cache.evictable for row in range(layer.rows)]
    of_image = [int(image[at[at < len(image)].long()].sum()) for at in held]
    assert 0 < sum(of_image) < sum(map(len, held)) and len(set(of_image)) > 1


def test_an_erased_span_gets_the_retention_of_what_takes_its_place():
    ids = random_ids(MODEL, 1, 30)
    cache = read(retention(Budget.tokens(64)), ids)
    before = cache.evictable[-1].view("log_beta").clone()
    with torch.no_grad(), attach(MODEL):
        erase(cache, Span(4, 9), erasers.Recompute(), model=MODEL, input_ids=ids)
    fresh = read(retention(Budget.tokens(64)), torch.cat([ids[:, :4], ids[:, 9:]], 1))
    for layer, other in zip(cache.evictable, fresh.evictable, strict=True):
        torch.testing.assert_close(layer.view("log_beta"), other.view("log_beta"), atol=1e-4, rtol=1e-3)
    assert not torch.equal(before[..., 9:], cache.evictable[-1].view("log_beta")[..., 4:])


def test_gates_of_another_model_are_refused_before_anything_is_read():
    with pytest.raises(ModelError, match="made for another model"):
        KVCache(tiny("llama", seed=1), retention())


def test_a_fork_may_change_budget_and_horizon_but_not_the_gates():
    cache = read(retention(Budget.tokens(64)), random_ids(MODEL, 1, 30))
    assert cache.fork(policy=retention(horizon=9)).policy.horizon == 9
    with pytest.raises(PolicyError, match="was written with other gates"):
        cache.fork(policy=retention(gates=random_gates(MODEL, seed=1)))


def test_a_cache_with_gates_from_a_folder_is_saved_and_one_with_gates_at_hand_is_not(tmp_path):
    GATES.save(tmp_path / "g")
    ids = random_ids(MODEL, 1, 30)
    cache = read(retention(gates=str(tmp_path / "g")), ids)
    cache.save(tmp_path / "c")
    again = KVCache.load(tmp_path / "c", MODEL)
    assert again.policy == cache.policy
    for one, other in zip(cache.evictable, again.evictable, strict=True):
        assert torch.equal(one.columns["log_beta"], other.columns["log_beta"])
    with pytest.raises(CacheFileError, match="gates at hand: save them"):
        read(retention(), ids).save(tmp_path / "d")


@pytest.mark.parametrize("horizon", [0, -1])
def test_a_horizon_below_one_is_refused(horizon):
    with pytest.raises(PolicyError, match="horizon must be at least 1"):
        retention(horizon=horizon)
