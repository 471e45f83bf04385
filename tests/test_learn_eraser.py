"""The eraser's trainer: made-up texts, samples worth training on, a loss that reaches the adapter alone and falls."""

import random

import pytest
import torch

from vestige import InputError, KVCache, Span, attach, policies, prefill
from vestige.adapter import Adapter
from vestige.erasers.learned import Learned
from vestige.erasing import erase
from vestige.learn import Document, LoopConfig, steering, train
from vestige.learn.eraser import EraserOptions, EraserTask, SampleMaker
from vestige.learn.erasing_texts import facts, neighbour, sentences
from vestige.testing import random_ids, tiny

PROSE = [f"Sentence number {i} says that the year {1000 + 7 * i} was calm." for i in range(16)]
OTHER = [f"Strange words {i} stand here for no reason at all." for i in range(6)]
SMALL = EraserOptions(neighbours=2, least=100, most=200, reply=4, tries=2)


def drafts(count: int = 60):
    return [facts(random.Random(i), PROSE) for i in range(count)]


# Texts.


def test_every_kind_of_statement_comes_and_its_spans_are_the_passages_that_are_gone():
    made = drafts()
    assert {one.kind for one in made} == {"conflict", "order", "several", "retained", "alone"}
    for one in made:
        gone = " ".join(passage.text for passage in one.passages if passage.gone)
        assert " ".join(one.text[start:end] for start, end in one.spans) == gone != ""
        kept = " ".join(passage.text for passage in one.passages if not passage.gone)
        assert one.answer in kept and (one.kind == "alone") == (one.answer == "")


def test_what_is_erased_contradicts_commands_or_has_nothing_to_do_with_the_answer():
    for one in drafts():
        stated = [passage.states for passage in one.passages if passage.gone and passage.states]
        expected = {"conflict": 1, "order": 0, "retained": 0, "alone": 1}
        assert len(stated) == expected.get(one.kind, len(stated)) and one.answer not in stated
        assert one.kind != "several" or len(stated) in (2, 3)


def test_a_conflict_can_be_erased_either_way():
    one = next(draft for draft in drafts() if draft.kind == "conflict")
    other = one.flipped()
    assert other.text == one.text and other.answer != one.answer and other.flipped() == one
    assert next(draft for draft in drafts() if draft.kind == "order").flipped() is None


def test_a_quotation_goes_on_behind_its_anchor_in_the_clean_text():
    for seed in range(20):
        one = neighbour(random.Random(seed), PROSE, OTHER)
        clean = " ".join(passage.text for passage in one.passages if not passage.gone)
        assert f"{one.prefix} {one.answer}" in clean
        (span,) = one.spans
        assert (one.kind == "across") == one.text[: span[0]].rstrip().endswith(one.prefix)


def test_the_same_seed_gives_the_same_text():
    assert drafts(5) == drafts(5) and facts(random.Random(1), PROSE) != facts(random.Random(2), PROSE)


def test_sentences_are_cut_at_their_ends_and_rubbish_is_left_out():
    text = "One sentence stands here alone.  Another\none follows it now! Short. " + "x" * 500 + "."
    assert sentences(text) == ["One sentence stands here alone.", "Another one follows it now!"]


# Steering with gradients.


def test_steering_writes_what_the_eraser_writes_into_a_live_cache():
    model = tiny("llama")
    adapter, draw = Adapter.fresh(model, rank=4), torch.Generator().manual_seed(0)
    for weight in (*adapter.down, *adapter.up):
        weight.data = 0.1 * torch.randn(weight.shape, generator=draw)
    ids, spans = random_ids(model, 1, 40), [Span(8, 12), Span(20, 27)]
    layers, _ = steering.read(model, ids)
    with torch.no_grad():
        steered = steering.steer(model, adapter, ids, layers, spans)
    cache = KVCache(model, policies.Full())
    with torch.no_grad(), attach(model):
        prefill(model, ids, cache)
    erase(cache, spans, Learned(adapter=adapter), model=model, input_ids=ids)
    for layer, (keys, values) in zip(cache.evictable, steered, strict=True):
        torch.testing.assert_close(layer.view("keys"), keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.view("values"), values, atol=1e-5, rtol=1e-4)


def test_the_reply_is_that_of_generate(chatter):
    model, tokenizer = chatter
    ids, question = random_ids(model, 1, 30), random_ids(model, 1, 5, seed=1)
    layers, _ = steering.read(model, ids)
    whole = torch.cat([ids, question], 1)
    out = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=6, do_sample=False)
    expected = out[0, 35:].tolist()
    said = steering.reply(model, layers, question, 6, (tokenizer.eos_token_id,))
    assert said == [token for token in expected if token != tokenizer.eos_token_id]


# The task.


@pytest.fixture
def task(chatter):
    model, tokenizer = chatter
    torch.manual_seed(0)
    adapter = Adapter.fresh(model, rank=4)
    documents = [Document("a", " ".join(PROSE)), Document("b", " ".join(reversed(PROSE)))]
    return EraserTask(model, tokenizer, adapter, documents, documents[:1], SMALL, validation=3)


def test_a_sample_is_a_function_of_its_index(task):
    one, again, other = (task.maker.sample(("train", i), task.prose, neighbours=False) for i in (3, 3, 4))
    assert torch.equal(one.ids, again.ids) and one.spans == again.spans and torch.equal(one.target, again.target)
    assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)


def test_an_untrained_adapter_is_as_wrong_as_the_text_with_the_passage(task):
    sample = task.maker.sample(("train", 0), task.prose, neighbours=True)
    dirty, _ = steering.read(task.model, sample.ids)
    with torch.no_grad():
        expected = steering.logits_over(task.model, dirty, sample.fed, len(sample.target))
        torch.testing.assert_close(task._steered(sample), expected, atol=1e-4, rtol=1e-4)


def test_the_loss_reaches_the_adapter_and_nothing_else(task):
    for weight in task.adapter.up:
        weight.data.normal_(std=0.02)
    task.loss(5)["loss"].backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in task.adapter.parameters())
    assert all(weight.grad is None for weight in task.model.parameters())


def test_twenty_steps_on_few_samples_lower_the_loss(task, tmp_path, monkeypatch):
    whole = EraserTask.loss
    monkeypatch.setattr(EraserTask, "loss", lambda self, index: whole(self, index % 2))
    losses = []
    config = LoopConfig(steps=20, batch=2, lr=5e-3, save_every=100)
    train(task, config, tmp_path / "out", tell=lambda done, total, record: losses.append(record["loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_the_divergence_from_the_clean_text_can_be_added(chatter, task):
    model, tokenizer = chatter
    options = EraserOptions(neighbours=2, least=100, most=200, reply=4, tries=2, kl=0.5)
    documents = [Document("a", " ".join(PROSE)), Document("b", " ".join(reversed(PROSE)))]
    other = EraserTask(model, tokenizer, task.adapter, documents, documents[:1], options)
    with torch.no_grad():
        plain, parts = task.loss(3), other.loss(3)
    assert float(parts["kl"]) > 0
    torch.testing.assert_close(parts["loss"], plain["loss"] + 0.5 * parts["kl"])


def test_validation_tells_exact_match_by_kind(task):
    with torch.no_grad():
        figures = task.validate()
    assert 0 <= figures["exact"] <= 1 and any(name.startswith("exact_") for name in figures) and figures["loss"] > 0


def test_texts_without_sentences_are_refused(chatter):
    model, tokenizer = chatter
    with pytest.raises(InputError, match="12 sentences or more"):
        EraserTask(model, tokenizer, Adapter.fresh(model), [Document("a", "no end")], [], SMALL)


@pytest.mark.parametrize("wrong", [{"least": 10}, {"least": 500, "most": 400}, {"reply": 0}, {"kl": -1.0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(InputError):
        EraserOptions(**wrong)


def test_a_model_that_says_nothing_is_told(chatter, monkeypatch):
    model, tokenizer = chatter
    monkeypatch.setattr(steering, "reply", lambda *args: [])
    with pytest.raises(InputError, match="said nothing"):
        SampleMaker(model, tokenizer, SMALL).sample(("x", 0), [PROSE], neighbours=False)
