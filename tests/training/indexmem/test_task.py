"""IndexMem's two lessons against dense ones, that they are about what eviction does, and who learns from them."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import random_indexer, random_latent
from tests.training.retention.test_task import PROSE
from vestige import Budget, InputError, KVCache, attach, prefill
from vestige.models.layout import check
from vestige.nn import indexer as indexing
from vestige.nn.indexer import Indexer
from vestige.nn.latent_memory import Latent
from vestige.policies import IndexMem
from vestige.testing import attention, random_ids, tiny
from vestige.training.config import LoopConfig
from vestige.training.indexmem.indexer_loss import (
    attention_to_text,
    attention_within_text,
    indexer_loss,
    max_index_scores,
)
from vestige.training.indexmem.memory_loss import attend_to_pairs, make_memory, memory_loss, select_pairs
from vestige.training.indexmem.task import IndexMemOptions, IndexMemTask, _find_first_reply
from vestige.training.indexmem.teacher_trace import trace_text
from vestige.training.loop import train

SMALL = IndexMemOptions(length=600, least=400, asked=2, window=8, seed=3)


@pytest.fixture
def task(chatter):
    tokenizer = chatter[1]
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=1024, seed=6)
    torch.manual_seed(0)
    indexer = Indexer.initialize(model, dim=4, apart=True)
    latents = [Latent.initialize(model, kind="linear", width=8), Latent.initialize(model, kind="slots", width=4)]
    return IndexMemTask(model, tokenizer, indexer, latents, [PROSE], [PROSE[::-1]], SMALL, validation=2)


# What is looked at.


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_oss", "gemma2"])
def test_what_stands_behind_a_text_looks_at_what_the_model_s_attention_says(name):
    model = tiny(name)
    ids = random_ids(model, 1, 30)
    layers = trace_text(model, ids)
    with torch.no_grad(), attention(model, "eager"):
        weights = model(ids, output_attentions=True).attentions
    assert [layer.layer_idx for layer in layers] == list(check(model).evictable)
    for layer in layers:
        for told in (slice(22, 30), slice(22, 25)):
            expected = weights[layer.layer_idx][0, :, told, 2:20].amax(1)
            torch.testing.assert_close(attention_to_text(layer, 20, told, 2), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("asking", [20, 26])
def test_what_is_looked_at_before_a_reply_is_the_softmax_of_the_largest_products(asking, monkeypatch):
    monkeypatch.setattr("vestige.training.indexmem.indexer_loss._BLOCK", 6)
    model = tiny("llama")
    for layer in trace_text(model, random_ids(model, 1, 30)):
        keys = layer.keys.repeat_interleave(2, 0)[:, :20]
        logits = layer.queries[:, :asking] @ keys.mT * layer.scale.scaling
        logits = logits.masked_fill(~torch.ones(asking, 20, dtype=torch.bool).tril(), -torch.inf)
        expected = logits.amax(1)[:, 2:].softmax(-1)
        torch.testing.assert_close(attention_within_text(layer, 20, asking, 2), expected, atol=1e-5, rtol=1e-4)


# What the indexer says.


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("asking", [20, 26])
def test_the_most_that_is_asked_for_and_its_gradient_are_the_dense_ones(apart, asking, monkeypatch):
    monkeypatch.setattr(indexing, "QUERY_BLOCK", 7)
    model = tiny("llama")
    layer = trace_text(model, random_ids(model, 1, 30))[1]
    own = random_indexer(model, apart=apart, heads=2).at(1)
    found = max_index_scores(own, layer, 20, asking)
    asked = own.index_queries(layer.hidden[:asking])
    everything = indexing.index_scores(asked, own.index_keys(layer.hidden[:20]))
    late = torch.arange(20) > torch.arange(asking)[:, None]
    expected = everything.masked_fill(late, -torch.inf).amax(1)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(own.parameters())
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_an_indexer_that_says_what_is_looked_at_has_nothing_to_learn(monkeypatch):
    model = tiny("llama")
    layers, indexer = trace_text(model, random_ids(model, 1, 30)), random_indexer(model)
    told = slice(22, 30)
    said = {
        id(layer): attention_to_text(layer, 20, told, 0).view(2, -1, 20).mean(1).clamp_min(1e-30).log()
        for layer in layers
    }
    monkeypatch.setattr(
        "vestige.training.indexmem.indexer_loss.max_index_scores", lambda own, layer, *_: said[id(layer)]
    )
    assert float(indexer_loss(indexer, layers, 20, told, teacher="answers", sink=0)) == pytest.approx(0, abs=1e-5)
    assert float(indexer_loss(indexer, layers, 20, told, teacher="text", sink=0)) > 0.01


# What an eviction takes, and what a memory gives back.


@pytest.mark.parametrize("apart", [True, False])
def test_in_training_what_goes_is_what_the_policy_evicts(apart):
    model = tiny("llama")
    ids, indexer = random_ids(model, 1, 40), random_indexer(model, apart=apart)
    kept = select_pairs(indexer, trace_text(model, ids), 30, 0.4, sink=1, window=3)
    share = "model" if apart else "head"
    cache = KVCache(model, IndexMem(budget=Budget.tokens(12), indexer=indexer, sink=1, window=3, share=share))
    with attach(model), torch.no_grad():
        prefill(model, ids[:, :30], cache, chunk=30)
    held, expected = set(), set()
    for layer, stays in zip(cache.evictable, kept, strict=True):
        for row in range(layer.rows):
            held |= {(layer.layer_idx, row, at) for at in layer.positions(row).tolist()}
            expected |= {(layer.layer_idx, row, at) for at in stays[row].nonzero()[:, 0].tolist()}
    assert len(held) == len(expected) == 12 * 6 and len(held - expected) <= apart  # the cache notes in float16


@pytest.mark.parametrize("kind", ["linear", "slots"])
def test_in_training_a_memory_gives_back_what_it_gives_back_in_a_cache(kind):
    model = tiny("llama", num_hidden_layers=1)  # so that nothing else that is evicted bears on queries
    ids, indexer, latent = random_ids(model, 1, 40), random_indexer(model), random_latent(model, kind)
    layers = trace_text(model, ids)
    policy = IndexMem(budget=Budget.tokens(12), indexer=indexer, sink=1, window=3)
    outputs = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, args: outputs.append(args[0][0]))
    with attach(model), torch.no_grad():
        for memory in (None, make_memory(latent)):
            cache = KVCache(model, policy, memory=memory)
            prefill(model, ids[:, :30], cache, chunk=30)
            kept = [torch.stack([torch.isin(torch.arange(30), cache.evictable[0].positions(row)) for row in range(2)])]
            prefill(model, ids[:, 30:], cache, settle=False)
        model(ids)
    hook.remove()
    plain, restored, whole = (x.view(-1, 4, 16).transpose(0, 1) for x in (outputs[1], outputs[3], outputs[4][30:]))
    torch.testing.assert_close(attend_to_pairs(layers[0], 30, kept[0]).output, plain, atol=1e-5, rtol=1e-4)
    everything = torch.ones_like(kept[0])
    torch.testing.assert_close(attend_to_pairs(layers[0], 30, everything).output, whole, atol=1e-5, rtol=1e-4)
    (error,), without = memory_loss([latent], layers, kept)
    size = whole.square().mean()
    assert float(error) == pytest.approx(float((restored - whole).square().mean() / size), rel=1e-3)
    assert float(without) == pytest.approx(float((plain - whole).square().mean() / size), rel=1e-3)


# Who learns.


def test_first_the_indexer_learns_alone_then_both_and_the_model_never(task):
    for alone, learns in ((10, False), (0, True)):
        task.options = replace(task.options, alone=alone)
        task.module.zero_grad()
        torch.manual_seed(0)
        parts = task.loss(0)
        parts["loss"].backward()
        assert parts.keys() == {"loss", "index", "linear", "slots", "tokens"}
        assert all(float(weight.grad.abs().sum()) > 0 for weight in task.indexer.parameters())
        for kind, latent in task.latents.items():
            assert all((float(weight.grad.abs().sum()) > 0) == learns for weight in latent.parameters()), kind
            assert bool(parts[kind] > 0) if learns else bool(parts[kind].isnan())
    assert all(weight.grad is None for weight in task.model.parameters())


def test_where_a_question_was_read_its_own_reply_is_foretold(task):
    """The replies to others, which nobody asked yet, are not."""
    found = []
    for index in range(12):
        (one,) = task.maker.make_sequence(("train", index), task.texts).documents()
        told = _find_first_reply(one)
        replies = (one.answers.diff() > 1).sum() + 1
        found.append(int(replies))
        assert told.start == one.answers[0] and set(range(told.start, told.stop)) <= set(one.answers.tolist())
        assert (told.stop == one.answers[-1] + 1) == (replies == 1) and told.stop not in one.answers.tolist()
    assert set(found) == {1, 2}


def test_scales_are_attention_behind_a_text_times_medians_of_projected_values(task):
    packed = [one for i in range(4) for one in task.maker.make_sequence(("measured", i), task.texts).documents()]
    anatomy = check(task.model)
    for place, layer_idx in enumerate(anatomy.evictable):
        values = torch.cat(
            [trace_text(task.model, one.ids)[place].values for one in packed], 1
        )  # (kv_heads, tokens, dim)
        weight = anatomy.attentions[layer_idx].o_proj.weight.T.view(2, 2, 16, -1)  # (kv_heads, group, dim, hidden)
        norms = torch.einsum("ktd,kgdh->kgth", values, weight).norm(dim=-1).mean(1)
        behind = [
            attention_to_text(trace_text(task.model, one.ids)[place], one.text, slice(one.text, one.ids.shape[1]), 4)
            for one in packed
        ]
        paid = torch.stack([one.sum(-1).view(2, 2).mean(1) for one in behind]).mean(0)
        expected = (norms.median(1).values * paid).log()
        torch.testing.assert_close(task.indexer.log_scales[place], expected, atol=1e-3, rtol=1e-3)


def test_steps_on_one_sequence_lower_both_losses(task, tmp_path, monkeypatch):
    packed = task.maker.make_sequence(("train", 0), task.texts)
    monkeypatch.setattr(task.maker, "make_sequence", lambda name, texts: packed)
    monkeypatch.setattr("vestige.training.indexmem.task.draw_share", lambda: 0.1)
    task.options = replace(task.options, aware=0.0)
    found = []
    config = LoopConfig(steps=40, batch=1, lr=2e-2, save_every=100)
    train(task, config, tmp_path / "out", on_step=lambda done, total, record: found.append(record))
    assert found[-1]["index"] < 0.8 * found[0]["index"]
    assert found[-1]["linear"] < 0.95 * found[0]["linear"] and found[-1]["slots"] < 0.9 * found[0]["slots"]


def test_validation_really_evicts_and_asks_with_and_without_memories(task, monkeypatch):
    from vestige.training.data.synthetic_qa import validation as telling

    monkeypatch.setattr(telling, "_find_known", lambda model, made: made.questions)  # the tiny model knows nothing
    with torch.no_grad():
        tight = task.validate()
        task.options = replace(task.options, budget=1.0)
        roomy = task.validate()
    assert tight.keys() == {"answers"} | {
        f"{figure}{kind}" for figure in ("loss", "exact") for kind in ("", "_linear", "_slots")
    }
    assert tight["loss"] != roomy["loss"] and len({tight[f"loss{kind}"] for kind in ("", "_linear", "_slots")}) == 3
    assert roomy["loss_linear"] == roomy["loss_slots"] == roomy["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aware": 1.5}, "aware must lie in"),
        ({"budget": 0.0}, "budget in"),
        ({"alone": -1}, "must not be negative"),
        ({"asked": 0}, "asked at least 1"),
        ({"memory_weight": float("nan")}, "memory_weight must be a number"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        replace(SMALL, **options)


def test_an_unknown_teacher_is_refused(unchecked):
    with pytest.raises(InputError, match="answers, text"):
        replace(SMALL, teacher="nobody")


def test_sequences_longer_than_the_model_are_refused(chatter):
    model, tokenizer = chatter
    with pytest.raises(InputError, match="600 tokens.*512 positions"):
        IndexMemTask(model, tokenizer, Indexer.initialize(model), [], [PROSE], [PROSE], SMALL)
