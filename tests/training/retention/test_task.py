"""The gates' trainer: attention that forgets is the formula, capacity is the sum, the loss reaches the gates alone."""

import random
from dataclasses import replace

import pytest
import torch

from examples import train_retention_flat
from tests.conftest import random_gates
from vestige import Budget, InputError, PolicyError
from vestige.nn.retention_gates import Gates
from vestige.policies import Retention
from vestige.testing import attention, random_ids, tiny
from vestige.training.config import LoopConfig
from vestige.training.data.synthetic_qa.sequences import SequenceMaker
from vestige.training.data.synthetic_qa.story import KINDS, make_story
from vestige.training.indexmem.task import IndexMemOptions, IndexMemTraining
from vestige.training.loop import train
from vestige.training.retention import soft_topk
from vestige.training.retention.capacity_loss import expected_kept, over_capacity
from vestige.training.retention.soft_attention import GatedAttention, use_gates
from vestige.training.retention.task import RetentionOptions, RetentionTask, RetentionTraining
from vestige.training.retention.warm_start import (
    measure_answers,
    measure_replay,
    ranking_loss,
    regression_loss,
    target_lifetimes,
)

PROSE = [f"Sentence number {i} says that the year {1000 + 7 * i} was calm." for i in range(16)]
SMALL = RetentionOptions(
    length=800, least=500, others=8, moments=16, capacity=0.2, budget=0.5, warm_loss="lives", forgets="gradually"
)


class Fixed(Gates):
    """Gates that say the same in every layer."""

    def __init__(self, model, log_beta: torch.Tensor) -> None:
        super().__init__(random_gates(model).config)
        self.log_beta = log_beta

    def forward(self, layer_idx, hidden):
        return self.log_beta


def logits_of(model, gating: GatedAttention, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), use_gates(model, gating):
        return model(input_ids=ids, position_ids=gating.positions, use_cache=False).logits


# Attention that forgets.


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma4"])
def test_gated_attention_adds_age_times_log_beta_to_the_logits(name):
    model = tiny(name, sliding_window=64) if "gemma" in name else tiny(name)
    config = model.config
    ids, tokens = random_ids(model, 1, 24), 24
    log_beta = -torch.rand(1, config.num_key_value_heads, tokens, generator=torch.Generator().manual_seed(3))
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    bias = (age * log_beta[:, :, None]).repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 1)
    mask = bias.masked_fill(age < 0, torch.finfo(torch.float32).min)
    if "gemma" in name:  # in gemma4 a later layer reads the pairs of an earlier one
        plain = torch.zeros_like(mask).masked_fill(age < 0, torch.finfo(torch.float32).min)
        mask = {"full_attention": mask, "sliding_attention": plain}
    with torch.no_grad(), attention(model, "eager"):
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    gating = GatedAttention(torch.zeros(tokens, dtype=torch.long), Fixed(model, log_beta))
    torch.testing.assert_close(logits_of(model, gating, ids), expected, atol=1e-4, rtol=1e-4)


def test_without_gates_each_document_is_read_as_if_alone(monkeypatch):
    monkeypatch.setattr("vestige.training.retention.soft_attention.BLOCK", 7)
    model = tiny("llama")
    ids = random_ids(model, 1, 40)
    starts = torch.tensor([0] * 13 + [13] * 20 + [33] * 7)
    found = logits_of(model, GatedAttention(starts), ids)
    for start, end in ((0, 13), (13, 33), (33, 40)):
        with torch.no_grad():
            alone = model(input_ids=ids[:, start:end], use_cache=False).logits
        torch.testing.assert_close(found[:, start:end], alone, atol=1e-4, rtol=1e-4)


def test_log_beta_is_what_the_gates_say_and_the_model_is_left_as_it_was():
    model = tiny("llama")
    gates, ids = random_gates(model), random_ids(model, 1, 12)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    gating = GatedAttention(torch.zeros(12, dtype=torch.long), gates)
    logits_of(model, gating, ids)
    entered = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    torch.testing.assert_close(gating.log_beta[0], gates(0, entered))
    assert gating.packed_log_beta().shape == (sum(gates.config.kv_heads), 12)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


# Capacity.


def test_what_is_kept_is_the_naive_sum_and_so_is_its_gradient(monkeypatch):
    monkeypatch.setattr("vestige.training.retention.capacity_loss.BLOCK", 5)
    log_beta = -torch.rand(3, 20, generator=torch.Generator().manual_seed(0)).double()
    starts, at = torch.tensor([0] * 8 + [8] * 12), torch.tensor([0, 3, 7, 8, 11, 12, 19])
    ours, naive = log_beta.clone().requires_grad_(), log_beta.clone().requires_grad_()
    found = expected_kept(ours, starts, at)
    sums = [
        sum(torch.exp((t - i) * naive[row, i]) for row in range(3) for i in range(int(starts[t]), t + 1))
        for t in at.tolist()
    ]
    expected = torch.stack(sums)
    torch.testing.assert_close(found, expected)
    weights = torch.arange(7.0).double()
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, naive.grad)


def test_the_price_is_the_mean_share_of_excess_where_there_is_any():
    kept, seen = torch.tensor([2.0, 12.0, 30.0]), torch.tensor([1, 10, 20])
    found = over_capacity(kept, seen, 2, torch.tensor([4.0, 4.0, 4.0]))
    assert float(found) == pytest.approx(((12 - 8) / (20 - 8) + (30 - 8) / (40 - 8)) / 2)


def test_with_room_for_everything_there_is_no_price():
    seen = torch.tensor([1, 5, 9])
    assert float(over_capacity(2.0 * seen, seen, 2, torch.full((3,), 9.0))) == 0


# Tales and sequences.


def test_every_kind_comes_and_its_answers_stand_in_the_text():
    tales = [make_story(random.Random(i), PROSE) for i in range(150)]
    assert {one.kind for one in tales} == KINDS.keys()
    for one in tales:
        assert one.questions and all(question.answer in one.text for question in one.questions), one
    assert tales[3] == make_story(random.Random(3), PROSE)


@pytest.fixture
def maker(chatter):
    return SequenceMaker(chatter[1], length=800, least=500, others=8, seed=0)


def test_a_sequence_is_documents_behind_each_other_and_its_answers_are_marked(maker, chatter):
    tokenizer = chatter[1]
    for index in range(12):
        packed = maker.make_sequence(("train", index), [PROSE])
        total = packed.ids.shape[1]
        assert total <= 800 and len(packed.starts) == len(packed.sizes) == total
        begins = packed.starts.unique().tolist()
        for start, end in zip(begins, [*begins[1:], total], strict=True):
            assert (packed.sizes[start:end] == end - start).all()
            assert packed.ids[0, start] == tokenizer.bos_token_id
        assert len(packed.texts) == len(begins)
        assert all(start + text <= packed.answers.max() for start, text in zip(begins, packed.texts, strict=True))
        said = tokenizer.decode(packed.ids[0, packed.answers + 1])
        assert said.count(tokenizer.eos_token) >= len(begins)
        assert not set(packed.others.tolist()) & set(packed.answers.tolist()) and len(packed.others) == 8


def test_a_sequence_is_a_function_of_its_name(maker):
    one, again, other = (maker.make_sequence(("train", i), [PROSE]) for i in (3, 3, 4))
    assert torch.equal(one.ids, again.ids) and torch.equal(one.others, again.others)
    assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)


def test_a_talk_of_several_messages_is_asked_about_once_all_are_told(maker, chatter):
    tokenizer = chatter[1]
    talks = [one for i in range(40) if (one := maker.fit_conversation(random.Random(i), [PROSE], 3000))]
    assert {len(one.texts) for one in talks} == {1, 2, 3}
    for one in talks:
        assert len(one.interim) == len(one.texts) - 1 and not set(one.interim) & set(one.questions)
        made, said = maker.tokenize(one), tokenizer.decode(maker.context_ids(one))
        assert made.ids[0, : made.text].tolist() == maker.context_ids(one)
        assert said.endswith(tokenizer.decode(tokenizer(one.texts[-1])["input_ids"], skip_special_tokens=True)[-40:])
        assert all(asked.question in said and f"{asked.prefix} {asked.answer}" in said for asked in one.interim)
        assert all(any(asked.answer in text for text in one.texts) for asked in one.questions)


def test_a_length_that_no_tale_fits_is_no_reason_to_stop(chatter):
    maker = SequenceMaker(chatter[1], length=800, least=96, others=8, seed=0)
    assert maker.fit_conversation(random.Random(0), [PROSE], 100) is None
    assert all(maker.make_sequence(("train", index), [PROSE]).ids.shape[1] <= 800 for index in range(12))


def test_sequences_too_short_for_any_tale_are_refused(chatter):
    with pytest.raises(InputError, match="96 <= least"):
        SequenceMaker(chatter[1], length=90, least=90, others=4, seed=0)
    with pytest.raises(InputError, match="no tale fits into 100 tokens"):
        SequenceMaker(chatter[1], length=100, least=100, others=4, seed=0).make_sequence(("a",), [PROSE])


# The warm start.


def test_lives_are_in_the_order_of_worth_and_so_many_outlive_the_text():
    worth = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    found = target_lifetimes(worth, 0.1)
    assert bool((found.flatten()[worth.flatten().argsort()].diff() >= 0).all())
    assert int((found > torch.tensor(50.0).log()).sum()) == 20


def test_pairs_live_by_their_worth_among_those_that_they_compete_with():
    """Where each head has room of its own, the best of a head that nobody looks at outlives the text, too."""
    model = tiny("llama")
    gates, ids = random_gates(model), random_ids(model, 1, 40)
    worth, entered = measure_answers(model, ids, 30)
    worth = worth * torch.logspace(0, -3, len(worth))[:, None]
    alone = [
        regression_loss(gates, (worth, entered), 0.2, groups).detach() for groups in ((len(worth),), (1,) * len(worth))
    ]
    lasting = soft_topk.log_lifetimes(soft_topk.gate_log_beta(gates, entered)).detach()
    expected = [
        torch.nn.functional.smooth_l1_loss(row, target_lifetimes(paid[None], 0.2)[0])
        for row, paid in zip(lasting, worth, strict=True)
    ]
    assert float(alone[1]) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert float(alone[0]) != pytest.approx(float(alone[1]), rel=1e-3)


def test_a_replay_is_what_kvzip_looks_at_and_its_states_are_those_of_the_text():
    model = tiny("llama")
    ids = random_ids(model, 1, 20)
    worth, entered = measure_replay(model, ids)
    assert worth.shape == (sum(random_gates(model).config.kv_heads), 20) and bool((worth > 0).all())
    torch.testing.assert_close(entered[0], model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)))
    assert all(x.shape[1] == 20 for x in entered.values())


def test_what_is_asked_about_is_what_the_tokens_behind_the_text_attend_to():
    model = tiny("llama")
    ids = random_ids(model, 1, 20)
    worth, entered = measure_answers(model, ids, 14)
    assert all(x.shape[1] == 14 for x in entered.values())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    expected = torch.cat([layer[0, :, 14:, :14].unflatten(0, (2, -1)).amax((1, 2)) for layer in weights])
    torch.testing.assert_close(worth, expected, atol=1e-5, rtol=1e-4)


def test_a_ranking_loses_the_worth_of_what_lives_shorter_for_its_age(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(soft_topk, "SOFTNESS", 1e-3)
    draw = torch.Generator().manual_seed(3)
    gates = Fixed(model, -torch.rand(1, 2, 10, generator=draw))
    rows = len(gates.config.layers) * 2
    looked = torch.rand(rows, 10, generator=draw), dict.fromkeys(gates.config.layers, torch.zeros(1, 10, 1))
    order = (torch.arange(10, 0, -1) * gates.log_beta[0]).repeat(len(gates.config.layers), 1).flatten()
    counts = looked[0].flatten().sqrt()
    kept = order > order.sort(descending=True).values[rows * 3]  # three of ten, and the one at the limit by half
    lost = 1 - counts[kept].sum() / counts.sum()
    assert abs(float(ranking_loss(gates, looked, 0.3, [rows])) - float(lost)) < 0.05


def test_to_let_everything_live_longer_gains_nothing():
    model = tiny("llama")
    log_beta = (-torch.rand(1, 2, 10, generator=torch.Generator().manual_seed(3))).requires_grad_()
    gates = Fixed(model, log_beta)
    entered = dict.fromkeys(gates.config.layers, torch.zeros(1, 10, 1))
    worth = torch.rand(2 * len(entered), 10, generator=torch.Generator().manual_seed(4))
    ranking_loss(gates, (worth, entered), 0.3, [len(worth)]).backward()
    assert log_beta.grad is not None and float(log_beta.grad.abs().max()) > 1e-3
    together = (log_beta.grad * log_beta.detach()).sum()  # along equal steps of all logarithms
    assert abs(float(together)) < 1e-6


@pytest.mark.parametrize("kind", ["answers", "replay"])
def test_gates_learn_what_later_tokens_look_at_without_gradients_through_the_model(kind):
    model = tiny("llama")
    gates, ids = Gates.initialize(model, width=16), random_ids(model, 1, 20)
    looked = measure_replay(model, ids) if kind == "replay" else measure_answers(model, ids, 14)
    first = regression_loss(gates, looked, 0.2, (len(looked[0]),))
    first.backward()
    assert all(weight.grad is None for weight in model.parameters())
    step = torch.optim.Adam(gates.parameters(), lr=0.02)
    for _ in range(30):
        step.zero_grad()
        last = regression_loss(gates, looked, 0.2, (len(looked[0]),))
        last.backward()
        step.step()
    assert float(last.detach()) < 0.5 * float(first.detach())


# The task.


@pytest.fixture
def task(chatter):
    tokenizer = chatter[1]
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=1024, seed=6)
    torch.manual_seed(0)
    gates = Gates.initialize(model, width=16, bias=2.0)
    return RetentionTask(model, tokenizer, gates, [PROSE], [PROSE[::-1]], SMALL, validation=2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma4", "gpt_oss"])
def test_no_answer_depends_on_another_document_whatever_layers_there_are(chatter, name):
    tokenizer = chatter[1]
    more = {"vocab_size_per_layer_input": len(tokenizer)} if name == "gemma4" else {}
    model = tiny(name, vocab_size=len(tokenizer), max_position_embeddings=1024, **more)
    task = RetentionTask(model, tokenizer, random_gates(model), [PROSE], [PROSE], replace(SMALL, length=1000, least=96))
    packed = next(one for i in range(9) if len((one := task.sequence("train", i)).texts) > 1)
    other = replace(packed, ids=packed.ids.clone())
    end = int((packed.starts > 0).nonzero()[0])
    other.ids[:, :end] = torch.randint(9, 99, (1, end), generator=torch.Generator().manual_seed(0))
    at = torch.cat([packed.others, packed.answers])
    logits, log_beta = task._logits(packed, at, task.gates)
    changed, others = task._logits(other, at, task.gates)
    torch.testing.assert_close(logits[at >= end], changed[at >= end], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[at < end], changed[at < end])
    torch.testing.assert_close(log_beta[:, end:], others[:, end:], atol=1e-4, rtol=1e-4)


def test_the_first_part_of_a_training_is_whole_steps():
    loop, data = LoopConfig(steps=4, batch=2), ("texts",)
    with pytest.raises(InputError, match="whole steps of 2"):
        RetentionTraining(data=data, loop=loop, options=replace(SMALL, warm=3))
    with pytest.raises(InputError, match="whole steps of 2"):
        IndexMemTraining(data=data, loop=loop, options=IndexMemOptions(alone=3))


def test_texts_that_differ_anywhere_are_other_data(chatter):
    tokenizer = chatter[1]
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    books = [
        RetentionTask(model, tokenizer, random_gates(model), [prose], [PROSE], SMALL).identity()
        for prose in (PROSE, PROSE[:-1], [*PROSE[:-1], "Another end."])
    ]
    assert books[0] != books[1] != books[2] != books[0]


def test_the_loss_reaches_the_gates_and_nothing_else(task):
    parts = task.loss(0)
    parts["loss"].backward()
    for name, parameter in task.gates.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(weight.grad is None for weight in task.model.parameters())
    expected = parts["kl"] + parts["ce"] + 0.25 * parts["text"] + parts["capacity"]
    torch.testing.assert_close(parts["loss"], expected)
    assert 0 < float(parts["kept"]) < 1


def test_gates_that_keep_everything_say_what_the_model_says(task):
    with torch.no_grad():
        task.gates.heads[0].bias.fill_(40.0)
        parts = task.loss(1)
    assert float(parts["kl"]) == pytest.approx(0, abs=1e-5) and float(parts["kept"]) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["answers", "replay"])
@pytest.mark.parametrize("loss", ["lives", "ranking"])
def test_the_first_sequences_learn_what_later_tokens_look_at(task, kind, loss):
    first = replace(SMALL, warm=2, warm_by=kind, warm_loss=loss, asked=8)
    other = RetentionTask(task.model, task.maker.tokenizer, task.gates, task.texts, task.held_out, first)
    assert other.loss(1).keys() == {"loss", "tokens"} and "kl" in other.loss(2)
    other.loss(0)["loss"].backward()
    assert all(parameter.grad is not None for parameter in other.gates.parameters())


def test_twenty_steps_on_one_sequence_lower_the_loss(task, tmp_path, monkeypatch):
    packed = task.maker.make_sequence(("train", 0), task.texts)
    monkeypatch.setattr(task.maker, "make_sequence", lambda name, texts: packed)
    losses = []
    config = LoopConfig(steps=20, batch=1, lr=3e-2, save_every=100)
    train(task, config, tmp_path / "out", on_step=lambda done, total, record: losses.append(record["loss"]))
    assert losses[-1] < 0.9 * losses[0], losses


def test_sequences_longer_than_the_model_are_refused(chatter):
    model, tokenizer = chatter
    with pytest.raises(InputError, match="800 tokens.*512 positions"):
        RetentionTask(model, tokenizer, Gates.initialize(model), [PROSE], [PROSE], SMALL)


def test_a_share_of_nobody_is_refused(unchecked):
    with pytest.raises(PolicyError, match="rows.*head, layer, model"):
        RetentionOptions(share="rows")


def test_validation_really_evicts(task, monkeypatch):
    from vestige.training.data.synthetic_qa import validation as telling

    monkeypatch.setattr(telling, "_find_known", lambda model, made: made.questions)  # the tiny model knows nothing
    with torch.no_grad():
        half = task.validate()
        task._validation_samples, held = [], task._validation_samples
        whole = telling.evaluate(task.model, Retention(gates=task.gates, budget=Budget.fraction(1.0)), held)
    assert half["answers"] == whole["answers"] > 0 and half["loss"] != whole["loss"]


def test_the_flat_trainer_comes_to_the_same_losses(chatter):
    tokenizer = chatter[1]
    options = replace(SMALL, moments=10_000)
    losses = []
    for kind in ("flat", "full"):
        model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=1024, seed=6)
        torch.manual_seed(0)
        gates = Gates.initialize(model, width=16, bias=2.0)
        task = RetentionTask(model, tokenizer, gates, [PROSE], [PROSE[::-1]], options)
        if kind == "flat":
            model.set_attn_implementation("eager")
            sequences = [task.maker.make_sequence(("train", i), task.texts) for i in range(3)]
            losses.append(train_retention_flat.train(model, gates, sequences, lr=1e-2, capacity=options.capacity))
            continue
        optimizer, found = torch.optim.AdamW(gates.parameters(), lr=1e-2, weight_decay=0.0), []
        for i in range(3):
            optimizer.zero_grad()
            loss = task.loss(i)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
