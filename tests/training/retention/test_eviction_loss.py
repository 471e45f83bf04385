"""Gates trained by what an eviction costs: the soft one is the hard one in the limit, and only gates learn from it."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import random_gates
from tests.training.retention.test_task import PROSE, SMALL
from vestige import Budget, InputError, KVCache, PolicyError, prefill
from vestige.cache.attach import attach
from vestige.models.compat import cache_argument
from vestige.nn.retention_gates import Gates
from vestige.policies import Retention
from vestige.policies.selection import parse_share
from vestige.testing import random_ids, tiny
from vestige.training.config import LoopConfig
from vestige.training.loop import train
from vestige.training.retention import soft_topk
from vestige.training.retention.eviction_loss import SoftEviction, answer_log_probs, read_text
from vestige.training.retention.soft_topk import competing_rows, log_kept
from vestige.training.retention.task import RetentionTask

AT_ONCE = replace(SMALL, forgets="at_once")


@pytest.fixture
def task(chatter):
    tokenizer = chatter[1]
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=1024, seed=6)
    return RetentionTask(model, tokenizer, random_gates(model), [PROSE], [PROSE[::-1]], AT_ONCE, validation=2)


# What a budget keeps.


@pytest.mark.parametrize(("share", "groups"), [("model", (6,)), ("layer", (2, 2, 2)), ("head", (1,) * 6)])
def test_so_many_are_kept_of_each_group(share, groups, monkeypatch):
    model = tiny("llama", num_hidden_layers=3)
    config = Gates.initialize(model).config
    assert competing_rows(config, share) == groups
    monkeypatch.setattr(soft_topk, "SOFTNESS", 1e-4)
    log_beta = -torch.rand(6, 40, generator=torch.Generator().manual_seed(0))
    kept = log_kept(log_beta, 0.25, groups).exp()
    counts = [float(part.sum()) for part in kept.split(list(groups))]
    assert counts == pytest.approx([10 * rows for rows in groups], abs=0.6)  # the one at the limit by half


def test_to_be_kept_follows_age_times_log_beta():
    log_beta = -torch.rand(3, 30, generator=torch.Generator().manual_seed(0))
    kept = log_kept(log_beta, 0.5, [3]).flatten()
    order = (torch.arange(30, 0, -1) * log_beta).flatten().argsort()
    assert bool((kept[order].diff() >= 0).all())


def test_a_share_has_one_of_three_names():
    assert parse_share("layer") == "layer"
    with pytest.raises(PolicyError, match="head, layer, model"):
        parse_share("row")


# Answers behind a text.


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma4"])
def test_with_everything_kept_answers_are_the_full_model_s(name):
    model = tiny(name, sliding_window=64) if "gemma" in name else tiny(name)
    gates, ids, at = Gates.initialize(model), random_ids(model, 1, 24), torch.tensor([0, 3, 7])
    text = read_text(model, ids[:, :16])
    rows = dict(zip(gates.config.layers, gates.config.kv_heads, strict=True))
    all_kept = SoftEviction({layer_idx: torch.zeros(heads, 16) for layer_idx, heads in rows.items()})
    with torch.no_grad():
        expected = model(ids).logits[0, 16 + at].float().log_softmax(-1)
        torch.testing.assert_close(answer_log_probs(model, text, ids[:, 16:], at), expected, atol=1e-4, rtol=1e-4)
        found = answer_log_probs(model, text, ids[:, 16:], at, all_kept)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert text.cache.get_seq_length() == 16


@pytest.mark.parametrize("block", [3, 256])
def test_a_hard_limit_is_the_eviction_that_the_policy_does(block, monkeypatch):
    monkeypatch.setattr("vestige.training.retention.eviction_loss.BLOCK", block)
    monkeypatch.setattr(soft_topk, "SOFTNESS", 1e-6)
    model = tiny("llama")
    gates, ids = random_gates(model), random_ids(model, 1, 48)
    cache = KVCache(model, Retention(gates=gates, budget=Budget.fraction(0.3)))
    with attach(model), torch.no_grad():
        prefill(model, ids[:, :40], cache)
        expected = model(input_ids=ids[:, 40:], **cache_argument(cache)).logits[0].float().log_softmax(-1)
    text = read_text(model, ids[:, :40])
    with torch.no_grad():
        log_beta = soft_topk.gate_log_beta(gates, text.states)
        kept = log_kept(log_beta, 0.3, [len(log_beta)])
        kept[kept < -0.1] = -1e4  # the pair at the limit goes
        fading = SoftEviction(dict(zip(gates.config.layers, kept.split(list(gates.config.kv_heads)), strict=True)))
        found = answer_log_probs(model, text, ids[:, 40:], torch.arange(8), fading)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_loss_reaches_the_gates_and_nothing_else(task):
    parts = task.loss(0)
    assert parts.keys() == {"loss", "kl", "ce", "kept", "tokens"} and 0 < float(parts["kept"]) < 1
    parts["loss"].backward()
    for name, parameter in task.gates.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(weight.grad is None for weight in task.model.parameters())


@pytest.mark.parametrize("forgets", ["at_once", "gradually"])
def test_a_bfloat16_model_teaches_float32_gates(chatter, forgets):
    tokenizer = chatter[1]
    small = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "seed": 6}
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama", dtype=dtype, **small)
        torch.manual_seed(0)
        gates, options = Gates.initialize(model, width=16), replace(SMALL, forgets=forgets)
        one = RetentionTask(model, tokenizer, gates, [PROSE], [PROSE[::-1]], options, validation=2)
        loss = one.loss(0)["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in gates.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_twenty_steps_on_one_sequence_lower_the_loss(task, tmp_path, monkeypatch):
    packed = task.maker.make_sequence(("train", 0), task.texts)
    monkeypatch.setattr(task.maker, "make_sequence", lambda name, texts: packed)
    monkeypatch.setattr("vestige.training.retention.task.draw_share", lambda: 0.1)
    losses = []
    config = LoopConfig(steps=20, batch=1, lr=3e-3, save_every=100)
    train(task, config, tmp_path / "out", on_step=lambda done, total, record: losses.append(record["loss"]))
    assert losses[-1] < losses[0] - 0.01, losses


def test_other_ways_to_forget_are_refused():
    with pytest.raises(InputError, match="gradually, at_once"):
        replace(SMALL, forgets="never")


# Who competes.


@pytest.mark.parametrize("share", ["layer", "head"])
@pytest.mark.parametrize("options", [{"warm": 1, "warm_loss": "ranking"}, {"forgets": "at_once"}, {"capacity": 0.05}])
def test_pairs_of_a_layer_or_head_can_compete_among_themselves(task, share, options):
    wide, narrow = (
        RetentionTask(
            task.model,
            task.maker.tokenizer,
            task.gates,
            task.texts,
            task.held_out,
            replace(SMALL, share=one, **options),
        )
        for one in ("model", share)
    )
    found = []
    for one in (wide, narrow):
        torch.manual_seed(0)
        found.append(float(one.loss(0)["loss"].detach()))
    assert found[0] != found[1]
