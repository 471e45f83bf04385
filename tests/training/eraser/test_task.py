"""The eraser's trainer: samples worth training on, a loss that reaches the adapter alone and falls."""

import random
from dataclasses import replace

import pytest
import torch

from vestige import InputError, KVCache, Span, attach, policies, prefill
from vestige.erasers.erase import erase
from vestige.erasers.learned import Learned
from vestige.nn.lora import Adapter
from vestige.testing import random_ids, tiny
from vestige.training.config import LoopConfig
from vestige.training.data.documents import Document
from vestige.training.data.sentences import require_long_documents, split_all_sentences
from vestige.training.eraser import differentiable_cache
from vestige.training.eraser.facts import draft_facts
from vestige.training.eraser.samples import EraserOptions, SampleMaker, Sources
from vestige.training.eraser.task import EraserTask
from vestige.training.loop import train

PROSE = [f"Sentence number {i} says that the year {1000 + 7 * i} was calm." for i in range(16)]
TEXTS = Sources(texts=[PROSE, PROSE[::-1]])
SMALL = EraserOptions(neighbours=2, least=100, most=200, reply=4, tries=2)


# Steering with gradients.


def test_steering_writes_what_the_eraser_writes_into_a_live_cache():
    model = tiny("llama")
    adapter, draw = Adapter.initialize(model, rank=4), torch.Generator().manual_seed(0)
    for weight in (*adapter.down, *adapter.up):
        weight.data = 0.1 * torch.randn(weight.shape, generator=draw)
    ids, spans = random_ids(model, 1, 40), [Span(8, 12), Span(20, 27)]
    layers = differentiable_cache.read(model, ids)
    with torch.no_grad():
        steered = differentiable_cache.steer(model, adapter, ids, layers, spans)
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
    layers = differentiable_cache.read(model, ids)
    whole = torch.cat([ids, question], 1)
    out = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=6, do_sample=False)
    expected = out[0, 35:].tolist()
    said = differentiable_cache.greedy_reply(model, layers, question, 6, (tokenizer.eos_token_id,))
    end = expected.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in expected else 6
    assert said == expected[:end]


# The task.


@pytest.fixture
def task(chatter):
    model, tokenizer = chatter
    torch.manual_seed(0)
    adapter = Adapter.initialize(model, rank=4)
    return EraserTask(model, tokenizer, adapter, TEXTS, TEXTS, SMALL, validation=3)


def test_a_sample_is_a_function_of_its_index(task):
    one, again, other = (task.maker.make_sample(("train", i), task.sources, neighbours=False) for i in (3, 3, 4))
    assert torch.equal(one.ids, again.ids) and one.spans == again.spans
    assert torch.equal(one.queries[0].target, again.queries[0].target)
    assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)


def test_an_untrained_adapter_is_as_wrong_as_the_text_with_the_passage(task):
    sample = task.maker.make_sample(("train", 0), task.sources, neighbours=True)
    dirty = differentiable_cache.read(task.model, sample.ids)
    with torch.no_grad():
        for one, logits in task._answer(sample):
            expected = differentiable_cache.compute_logits(task.model, dirty, one.input_ids, one.input_ids.shape[1])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_the_loss_reaches_the_adapter_and_nothing_else(task):
    for weight in task.adapter.up:
        weight.data.normal_(std=0.02)
    task.loss(5)["loss"].backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in task.adapter.parameters())
    assert all(weight.grad is None for weight in task.model.parameters())


def test_twenty_steps_on_few_samples_lower_the_loss(task, tmp_path, monkeypatch):
    samples = [task.maker.make_sample(("train", i), task.sources, neighbours=False) for i in range(2)]
    monkeypatch.setattr(task.maker, "make_sample", lambda name, sources, *, neighbours: samples[name[1] % 2])
    losses = []
    config = LoopConfig(steps=20, batch=2, lr=5e-3, save_every=100)
    train(task, config, tmp_path / "out", on_step=lambda done, total, record: losses.append(record["loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_samples_of_a_pool_are_made_once_and_trained_on_in_several_passes(chatter, task, monkeypatch):
    options = replace(SMALL, passes=3, pool=2)
    assert [options.sample_number(i) for i in range(9)] == [0, 1, 0, 1, 0, 1, 2, 3, 2]
    other, made = EraserTask(*chatter, task.adapter, TEXTS, TEXTS, options), []
    make = other.maker.make_sample

    def counted(name, texts, *, neighbours):
        made.append((name[1], neighbours))
        return make(name, texts, neighbours=neighbours)

    monkeypatch.setattr(other.maker, "make_sample", counted)
    with torch.no_grad():
        losses = [float(other.loss(i)["loss"]) for i in range(7)]
        once = [float(task.loss(i)["loss"]) for i in range(2)]
    assert made == [(0, True), (1, True), (2, False)] and len(other._pool) == 1
    assert losses[:2] == losses[2:4] == losses[4:6] == once


@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.25), (1.0, 0.0, 0.0), (2.0, 0.5, 3.0)])
def test_the_loss_weighs_the_reply_and_the_divergence_from_the_clean_text(chatter, task, weights):
    options = replace(SMALL, **dict(zip(("nll", "kl", "question_kl"), weights, strict=True)))
    other = EraserTask(*chatter, task.adapter, TEXTS, TEXTS, options)
    with torch.no_grad():
        parts = other.loss(3)
        figures = parts["nll"], parts["kl"], parts["question_kl"]
        sample = other._sample(3)
        own = [logits for _, logits in other._answer(sample)]
    torch.testing.assert_close(parts["loss"], sum(w * x for w, x in zip(weights, figures, strict=True)))
    replies, questions = [], []
    for one, edited in zip(sample.queries, own, strict=True):
        clean = one.clean.float().log_softmax(-1)
        divergences = (clean.exp() * (clean - edited.log_softmax(-1))).sum(-1)
        replies.append(divergences[-len(one.target) :].mean())
        questions.append(divergences[: -len(one.target)].mean())
    torch.testing.assert_close(parts["kl"], torch.stack(replies).mean())
    torch.testing.assert_close(parts["question_kl"], torch.stack(questions).mean())
    assert min(float(one) for one in figures) > 0


def test_validation_tells_exact_match_by_kind(task):
    with torch.no_grad():
        figures = task.validate()
    assert 0 <= figures["exact"] <= 1 and any(name.startswith("exact_") for name in figures) and figures["kl"] > 0


def test_texts_without_sentences_are_refused():
    long, other, short = Document("a", " ".join(PROSE)), Document("c", " ".join(PROSE[::-1])), Document("b", "no end")
    assert split_all_sentences(require_long_documents([long, short, other])) == [PROSE, PROSE[::-1]]
    for few, count in (([short], "none among 1"), ([long, short], "1 among 2"), ([long, long], "1 among 2")):
        with pytest.raises(InputError, match=f"two texts of 12 sentences or more.*{count}"):
            require_long_documents(few)


@pytest.mark.parametrize(
    "wrong",
    [
        {"least": 10},
        {"least": 500, "most": 400},
        {"reply": 0},
        {"free_reply": 0},
        {"kl": -1.0},
        {"passes": 0},
        {"kl": 0.0, "question_kl": 0.0},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(InputError):
        EraserOptions(**wrong)


def test_a_model_that_says_nothing_is_told(chatter, monkeypatch):
    maker = SampleMaker(*chatter, SMALL)
    maker.stop = (7,)
    monkeypatch.setattr(differentiable_cache, "greedy_reply", lambda *args: [7])
    with pytest.raises(InputError, match="says nothing"):
        maker.make_sample(("x", 0), TEXTS, neighbours=False)


def test_when_to_stop_is_part_of_what_is_learned(chatter):
    maker = SampleMaker(*chatter, SMALL)
    usual = maker.make_sample(("x", 0), TEXTS, neighbours=False).queries[0].target.tolist()
    assert len(usual) == SMALL.reply
    maker.stop = (usual[1],)
    assert maker.make_sample(("x", 0), TEXTS, neighbours=False).queries[0].target.tolist() == usual[:2]


# What the model says.


def test_reading_on_behind_what_was_read_is_reading_it_all():
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    whole = differentiable_cache.read(model, ids)
    rest = differentiable_cache.read(model, ids[:, 25:], differentiable_cache.read(model, ids[:, :25]))
    torch.testing.assert_close(rest, whole, atol=1e-5, rtol=1e-4)


def test_a_reply_that_is_guessed_right_is_the_greedy_one(task):
    maker, draft = task.maker, draft_facts(random.Random(0), PROSE)
    layers = differentiable_cache.read(maker.model, maker._ids(draft))
    main = draft.queries[0]
    with torch.no_grad():
        greedy = differentiable_cache.greedy_reply(maker.model, layers, maker._question(main), 4, maker.stop)
        answer = maker.tokenizer.decode(greedy[:3]).removeprefix(" ")
        for guess in (answer, "nothing of the kind", ""):
            said = maker._greedy_answer(replace(main, answer=guess), layers)
            assert said == greedy[: len(said)] and said


def test_the_clean_reply_is_that_of_a_text_that_never_had_the_passage(task):
    sample = task.maker.make_sample(("train", 1), task.sources, neighbours=False)
    kept = torch.ones(sample.ids.shape[1], dtype=torch.bool)
    for span in sample.spans:
        kept[span.start : span.end] = False
    clean = differentiable_cache.read(task.model, sample.ids[:, kept])
    for one in sample.queries:
        with torch.no_grad():
            logits = differentiable_cache.compute_logits(task.model, clean, one.input_ids, len(one.target))
        torch.testing.assert_close(one.clean[-len(one.target) :], logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(logits.argmax(-1), one.target)


def test_only_a_right_reply_that_the_passage_spoils_is_worth_training_on(task, monkeypatch):
    draft = next(
        one for one in (draft_facts(random.Random(i), PROSE) for i in range(40)) if one.queries[0].kind == "order"
    )
    rights = iter([True])  # the dirty text gives the right answer: nothing to learn
    monkeypatch.setattr(task.maker, "_is_right", lambda query, said: next(rights))
    assert task.maker._find_worthwhile(draft) is None


def test_a_wrong_reply_teaches_too_if_that_is_asked_for_as_long_as_the_passage_changes_it(chatter, task):
    query = replace(draft_facts(random.Random(0), PROSE).queries[0], misled=True)
    sample = task.maker.make_sample(("train", 0), task.sources, neighbours=False)
    lenient = SampleMaker(*chatter, replace(SMALL, right=False))
    for right, fooled, expected in (
        (True, True, (True, True)),
        (False, True, (False, True)),
        (True, False, (False, False)),
    ):
        asked = replace(sample.queries[0], right=right, fooled=fooled)
        assert tuple(maker._is_worthwhile(query, asked) for maker in (task.maker, lenient)) == expected


def test_a_reply_that_nothing_opens_may_be_longer(chatter):
    maker = SampleMaker(*chatter, replace(SMALL, free_reply=9, right=False))
    maker.stop = ()
    drafts = (draft_facts(random.Random(i), PROSE) for i in range(40))
    draft = next(one for one in drafts if any(query.kind == "free" for query in one.queries))
    layers = differentiable_cache.read(maker.model, ids := maker._ids(draft))
    made = maker._make_sample(draft, ids, layers, worth=False)
    lengths = {one.kind: len(one.target) for one in made.queries}
    assert lengths["free"] == 9 and lengths[draft.queries[0].kind] == SMALL.reply


def test_a_sample_kept_for_long_lets_its_pairs_go(task):
    sample = task.maker.make_sample(("train", 0), task.sources, neighbours=True)
    assert sample.layers is not None and sample.without_layers().layers is None
    with torch.no_grad():
        for (_, one), (_, other) in zip(task._answer(sample), task._answer(sample.without_layers()), strict=True):
            torch.testing.assert_close(one, other)
