"""From turns to ids: what every arm is fed, cut between what is compressed and what stays whole."""

import copy

import pytest
from transformers import AutoTokenizer

from vestige.bench.sample import Turn
from vestige.bench.tokenization import Renderer
from vestige.text.chat_template import ChatTemplate

TURNS = (
    Turn(
        context="The lamp is lit.", question="Who lit it?", answers=("Ada",), answer_prefix="It was", max_new_tokens=5
    ),
    Turn(context="Bo put it out.", question="Who now?", answers=("Bo",), max_new_tokens=7),
)


@pytest.fixture(scope="module", params=["chat", "plain"])
def tokenizer(request, folders):
    return AutoTokenizer.from_pretrained(getattr(folders, request.param))


@pytest.fixture(scope="module")
def model(chatter):
    return chatter[0]


@pytest.fixture
def renderer(tokenizer, model, monkeypatch):
    """Make a renderer for a model that ends replies with the given ids."""

    def make(*, ends: object = None, tokenizer=tokenizer, **options) -> Renderer:
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        return Renderer(tokenizer, model, **options)

    return make


def ids(tensor) -> tuple[int, ...]:
    return tuple(tensor[0].tolist())


def test_a_job_has_the_ids_of_the_chat_text_in_order(tokenizer, renderer):
    frame, job = ChatTemplate(tokenizer), renderer().job(TURNS)
    assert job.keep is None and len(job.turns) == 2
    first, second = job.turns
    assert first.context == ids(frame.context("The lamp is lit."))
    assert first.question == ids(frame.question("Who lit it?", "It was"))
    assert second.context == ids(frame.next_context("Bo put it out."))
    assert second.question == ids(frame.question("Who now?"))
    assert [turn.max_new_tokens for turn in job.turns] == [5, 7]


def test_question_aware_reads_the_whole_question_with_the_context(tokenizer, renderer):
    agnostic = renderer().job(TURNS)
    aware = renderer(question_aware=True).job(TURNS)
    for before, after in zip(agnostic.turns, aware.turns, strict=True):
        assert after.question == ()
        assert after.context == before.context + before.question
        assert after.max_new_tokens == before.max_new_tokens


@pytest.mark.parametrize("aware", [False, True])
def test_a_conversation_measures_all_it_can_come_to(tokenizer, renderer, aware):
    frame = ChatTemplate(tokenizer)
    parts = [frame.context("The lamp is lit."), frame.question("Who lit it?", "It was")]
    one = sum(part.shape[1] for part in parts) + 5
    assert renderer(question_aware=aware).measure(TURNS[:1]) == one
    parts = [frame.next_context("Bo put it out."), frame.question("Who now?")]
    assert renderer(question_aware=aware).measure(TURNS) == one + sum(part.shape[1] for part in parts) + 7


def test_a_piece_of_text_is_counted_without_special_tokens(tokenizer, renderer):
    for text in ("", "The keeper", "日本 🙂"):
        assert renderer().count(text) == len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_reply_is_text_without_special_tokens(tokenizer, renderer):
    reply = tokenizer("  Ada lit it.\n", add_special_tokens=False)["input_ids"]
    assert renderer().text([*reply, tokenizer.eos_token_id]) == "  Ada lit it.\n"  # a metric may look at its lines
    assert renderer().text([]) == ""


def test_replies_end_where_the_model_says_or_else_the_tokenizer(tokenizer, renderer):
    assert renderer(ends=7).stop() == (7,)
    assert renderer(ends=[7, 9]).stop() == (7, 9)
    assert renderer().stop() == (tokenizer.eos_token_id,)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert renderer(tokenizer=endless).stop() == ()
    assert renderer(ends=[7, 9]).job(TURNS).stop == (7, 9)
