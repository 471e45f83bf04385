"""Scorers of kvpress's shape as policies: stand-ins written here, equal to policies of our own."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from vestige import Budget, CacheFileError, KVCache, ModelError, Phase, PolicyError, attach, check, policies, prefill
from vestige.models.compat import cache_argument
from vestige.policies import from_kvpress
from vestige.testing import left_padded, random_ids, tiny, tiny_vl

SMALL = {"sink": 2, "window": 4, "every": 4}


@dataclass
class Norms:
    """Looks at keys alone."""

    compression_ratio: float = 0.0
    calls: list[Any] = field(default_factory=list)

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        self.calls.append((module, hidden_states, keys, values, attentions, kwargs))
        return -keys.norm(dim=-1)


@dataclass
class Window:
    """Recomputes the latest queries from hidden states, as kvpress's SnapKVPress does, and averages their attention."""

    size: int = 4
    kernel: int = 3

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert hidden_states.shape[1] >= self.size, f"too few hidden states for a window of {self.size}"
        kv_heads, held, size = keys.shape[1:]
        queries = module.q_proj(hidden_states[:, -self.size :]).unflatten(-1, (-1, size)).transpose(1, 2)
        cos, sin = (x[:, -self.size :].unsqueeze(1) for x in kwargs["position_embeddings"])
        first, second = queries.chunk(2, dim=-1)
        queries = queries * cos + torch.cat([-second, first], -1) * sin
        logits = queries @ keys.repeat_interleave(queries.shape[1] // kv_heads, 1).mT * size**-0.5
        future = torch.ones(self.size, held, dtype=torch.bool).triu(held - self.size + 1)
        weights = logits.masked_fill(future, -torch.inf).softmax(-1)[..., : -self.size].mean(-2)
        weights = torch.nn.functional.pad(weights.unflatten(1, (kv_heads, -1)).mean(2), (0, self.size))
        return torch.nn.functional.avg_pool1d(weights, self.kernel, stride=1, padding=self.kernel // 2)


def read(policy: Any, *, batch: int = 1, chunk: int = 16, steps: int = 5) -> KVCache:
    """Return a cache that has read a text in chunks, generated, read a second turn and generated again."""
    model = tiny("llama", num_hidden_layers=2)
    ids = random_ids(model, batch, 64)
    cache = KVCache(model, policy)
    with torch.no_grad(), attach(model):
        for start, end in ((0, 40), (40 + steps, 64)):
            prefill(model, ids[:, start:end], cache, chunk=chunk)
            for i in range(steps):
                model(ids[:, i : i + 1], **cache_argument(cache))
    return cache


def held(cache: KVCache) -> list[list[int]]:
    return [layer.positions(row).tolist() for layer in cache.evictable for row in range(layer.rows)]


# Equal to policies of our own, through chunks, turns and decoding.


@pytest.mark.parametrize("share", ["head", "layer", "model"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_press_that_looks_at_keys_alone_keeps_what_knorm_keeps(share, batch):
    options = SMALL | {"budget": Budget.tokens(12), "share": share}
    ours = read(policies.KNorm(**options), batch=batch)
    theirs = read(from_kvpress(Norms(), keys_only=True, **options), batch=batch)
    assert ours.ragged and held(theirs) == held(ours)
    if share != "head":
        assert len({len(row) for row in held(ours)}) > 1, "rows were equally long: the test would prove less"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("chunk", [16, 64])
def test_a_press_that_looks_at_hidden_states_keeps_what_snapkv_keeps(batch, chunk):
    options = SMALL | {"budget": Budget.tokens(12), "scale": "mass"}
    ours = read(policies.SnapKV(observed=4, kernel=3, **options), batch=batch, chunk=chunk)
    theirs = read(from_kvpress(Window(), **options), batch=batch, chunk=chunk)
    assert ours.ragged and held(theirs) == held(ours)


@pytest.mark.parametrize("share", ["layer", "model"])
def test_a_first_model_wide_settle_needs_no_equal_rows_afterwards(share):
    model = tiny("llama")
    ids, kept = random_ids(model, 1, 40), []
    options = SMALL | {"budget": Budget.tokens(12), "share": share, "scale": "mass"}
    for policy in (policies.SnapKV(observed=4, kernel=3, **options), from_kvpress(Window(), **options)):
        cache = KVCache(model, policy)
        with torch.no_grad(), attach(model):
            prefill(model, ids, cache)
        kept.append(held(cache))
    assert kept[0] == kept[1]
    assert len({len(row) for row in kept[0]}) > 1


def test_scores_of_the_window_press_are_those_of_snapkv():
    model, scores = tiny("llama"), []
    ours, theirs = (
        policies.SnapKV(budget=Budget.tokens(64), observed=4, kernel=3),
        from_kvpress(Window(), budget=Budget.tokens(64)),
    )
    cache = KVCache(model, ours, observers=[theirs])
    with torch.no_grad(), attach(model):
        prefill(model, random_ids(model, 2, 30), cache)
        layer = cache.evictable[1]
        obs = layer.observe(Phase.PREFILL, cache.seen, [64, 64], *layer.live_slots())
        scores = [one.score(obs) for one in (ours, theirs)]
    torch.testing.assert_close(*scores, atol=1e-6, rtol=1e-5)
    assert scores[0].max() > 0.01


# What the press is handed.


def test_the_press_is_handed_what_it_would_find_in_kvpress():
    model, press = tiny("gpt_oss"), Norms()
    ids = random_ids(model, 2, 20)
    cache = KVCache(model, from_kvpress(press, budget=Budget.tokens(10), hidden_observed=6, **SMALL))
    given: dict[int, Any] = {}
    for i, module in check(model).attentions.items():
        module.register_forward_pre_hook(lambda _, __, kwargs, i=i: given.update({i: kwargs}), with_kwargs=True)
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache)
    assert len(press.calls) == len(check(model).evictable)
    for (i, module), call in zip(check(model).attentions.items(), press.calls, strict=True):
        attention, hidden, keys, values, attentions, kwargs = call
        assert attention is module and attentions is None
        assert keys.shape == values.shape == (2, 2, 20, 16)
        torch.testing.assert_close(hidden, given[i]["hidden_states"][:, -6:])
        for got, full in zip(kwargs["position_embeddings"], given[i]["position_embeddings"], strict=True):
            torch.testing.assert_close(got, full[:, -6:].expand_as(got))


@pytest.mark.parametrize("options", [{"keys_only": True}, {"hidden_observed": 0}])
def test_without_hidden_states_nothing_is_recorded_and_the_tensor_is_empty(options):
    press = Norms()
    cache = read(from_kvpress(press, budget=Budget.tokens(10), **SMALL, **options), batch=2)
    assert not cache.evictable[0].rings and cache.state.rope is None
    assert all(hidden.shape[:2] == (2, 0) and kwargs == {} for _, hidden, *_, kwargs in press.calls)


def test_the_hidden_states_are_recorded_as_far_as_they_are_looked_at():
    cache = read(from_kvpress(Window(), budget=Budget.tokens(10), hidden_observed=5, **SMALL))
    assert cache.evictable[0].rings["hidden"].data.shape == (1, 1, 5, 64)


def test_rows_of_unequal_length_go_one_by_one_to_a_press_that_looks_at_keys_alone():
    press = Norms()
    read(from_kvpress(press, budget=Budget.tokens(12), share="model", keys_only=True, **SMALL))
    shapes = {keys.shape[:2] for _, _, keys, *_ in press.calls}
    assert shapes == {(1, 2), (1, 1)}


def test_batch_rows_of_unequal_length_go_one_by_one_to_a_press_that_looks_at_keys_alone():
    model, press = tiny("llama"), Norms()
    ids, mask = left_padded(model, [30, 21])
    options = SMALL | {"budget": Budget.fraction(0.5)}
    kept = []
    for policy in (policies.KNorm(**options), from_kvpress(press, keys_only=True, **options)):
        cache = KVCache(model, policy)
        with torch.no_grad(), attach(model):
            prefill(model, ids, cache, attention_mask=mask)
        kept.append(held(cache))
    assert kept[0] == kept[1]


# Budgets.


def test_the_budget_is_what_the_compression_ratio_leaves_unless_another_is_given():
    assert from_kvpress(Norms(compression_ratio=0.75)).budget == Budget.fraction(0.25)
    assert from_kvpress(Norms(compression_ratio=0.75), budget=Budget.tokens(99)).budget == Budget.tokens(99)
    assert isinstance(from_kvpress(Norms(0.5), share="model"), policies.FromKVPress)


@pytest.mark.parametrize("ratio", [0.0, 1.0, None])
def test_without_a_budget_or_a_compression_ratio_there_is_no_policy(ratio):
    press = Norms(ratio)
    with pytest.raises(PolicyError, match=rf"needs a budget, or a press with a compression_ratio .*, got {ratio}"):
        from_kvpress(press)


# Refusals.


def test_what_has_no_score_is_refused():
    with pytest.raises(PolicyError, match=r"dict has no score\(module, hidden_states, keys"):
        from_kvpress({}, budget=Budget.tokens(64))


def test_a_negative_number_of_hidden_states_is_refused():
    with pytest.raises(PolicyError, match=r"hidden_observed must not be negative, got -1"):
        from_kvpress(Norms(0.5), hidden_observed=-1)


def unchanged_after(cache: KVCache, told: str, *, ids: Tensor, mask: Tensor | None = None) -> None:
    model = cache.layout.model
    with torch.no_grad(), attach(model):
        before = [layer.lengths for layer in cache.evictable]
        prefill(model, ids, cache, attention_mask=mask, settle=False)
        read = [[n + ids.shape[1] for n in lengths] for lengths in before if lengths] or None
        with pytest.raises(PolicyError, match=told):
            cache.settle()
        after = [layer.lengths for layer in cache.evictable]
    assert read is None or after == read


def test_rows_of_unequal_length_are_refused_by_reason_and_remedy():
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    cache = KVCache(model, from_kvpress(Window(), budget=Budget.tokens(12), share="model", **SMALL))
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache)
    told = r"Window scores all rows of a layer at once.* layer \d holds \d+ to \d+; use share=\"head\".*keys_only=True"
    unchanged_after(cache, told, ids=ids[:, :8])


def test_batch_rows_that_saw_unequally_many_tokens_are_refused_where_hidden_states_are_looked_at():
    model = tiny("llama")
    ids, mask = left_padded(model, [40, 30])
    cache = KVCache(model, from_kvpress(Window(), budget=Budget.tokens(12), **SMALL))
    told = r"Window scores all rows .* layer 0 holds 30 to 40; use share=\"head\" and batch rows of one length"
    unchanged_after(cache, told, ids=ids, mask=mask)
    ids, mask = left_padded(model, [40, 30])
    cache = KVCache(model, from_kvpress(Window(), budget=Budget.tokens(12), **SMALL))
    layer = cache.evictable[0]
    with torch.no_grad(), attach(model):  # rows brought to one length, as by an earlier settle, of unequal texts
        prefill(model, ids, cache, attention_mask=mask, settle=False)
        slots, lengths = layer.live_slots()
        last = torch.cat([part[-12:] for part in slots.split(lengths)])
        obs = layer.observe(Phase.PREFILL, cache.seen, [12, 12], last, [12] * 4)
        with pytest.raises(PolicyError, match=r"they must have seen equally many tokens, but they saw 30 to 40"):
            cache.policy.score(obs)


class Wrong:
    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return self.scores(keys)


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (lambda keys: keys[..., :-1, 0], r"Wrong gave scores \(1, 2, 39\), expected \(1, 2, 40\)"),
        (lambda keys: keys.norm(dim=-1)[0], r"Wrong gave scores \(2, 40\), expected \(1, 2, 40\)"),
        (lambda keys: None, r"Wrong gave scores NoneType, expected \(1, 2, 40\)"),
        (lambda keys: keys.norm(dim=-1) * torch.nan, r"scores are NaN, the first in layer 0"),
        (lambda keys: keys @ keys, r"Wrong failed on 40 pairs a row and 40 hidden states \(hidden_observed=128, keys_"),
    ],
)
def test_broken_scores_are_refused_and_nothing_is_evicted(scores, told):
    model = tiny("llama")
    cache = KVCache(model, from_kvpress(Wrong(scores), budget=Budget.tokens(12), **SMALL))
    unchanged_after(cache, told, ids=random_ids(model, 1, 40))
    assert not cache.ragged


def test_a_press_that_wants_more_hidden_states_is_told_of_the_option():
    model = tiny("llama")
    cache = KVCache(model, from_kvpress(Window(size=9), budget=Budget.tokens(12), hidden_observed=8, **SMALL))
    told = r"Window failed .* 8 hidden states \(hidden_observed=8, keys_only=False\): too few hidden states"
    unchanged_after(cache, told, ids=random_ids(model, 1, 40))


def test_models_whose_rotation_is_unknown_are_refused_only_where_it_is_needed():
    model, _ = tiny_vl()
    with pytest.raises(ModelError, match="mRoPE"):
        KVCache(model, from_kvpress(Norms(0.5)))
    KVCache(model, from_kvpress(Norms(0.5), keys_only=True))


def test_saving_is_refused_by_name(tmp_path):
    cache = read(from_kvpress(Norms(), budget=Budget.tokens(12), **SMALL))
    with pytest.raises(CacheFileError, match="FromKVPress cannot be saved"):
        cache.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
