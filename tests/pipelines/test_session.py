"""A conversation whose messages are spans: turns share one cache, and what is erased is gone from later turns."""

import io
import json

import pytest
import torch
from rich.console import Console

from vestige import CacheFileError, InputError, Session, Span, erasers, policies
from vestige.budget import Budget
from vestige.cli.chat import chat
from vestige.text.chat_template import ChatTemplate

SAY = ("Lamp 3 is kept by Ann.", "Lamp 7 is kept by Bob.", "Who keeps lamp 3?")


@pytest.fixture
def talk(chatter):
    """A conversation of two turns."""
    session = Session(*chatter)
    for text in SAY[:2]:
        session.send(text, max_new_tokens=5)
    return session


def said_in_one(session, chatter, texts, tokens):
    """Return the reply of ``generate`` to the whole conversation as one prompt of ids."""
    model, _ = chatter
    ids = torch.cat([session.cache.ids, torch.tensor([session._pending], dtype=torch.long).view(1, -1)], 1)
    turns = session.template
    ids = torch.cat([ids, torch.tensor([[*turns.next_opening(), *turns.message(texts)[0], *turns.reply_opening()]])], 1)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return turns.decode(out[0, ids.shape[1] :].tolist())


def test_a_turn_over_the_cache_is_what_the_whole_prompt_gives(talk, chatter):
    expected = said_in_one(talk, chatter, SAY[2], 8)
    assert talk.send(SAY[2], max_new_tokens=8) == expected
    assert [one.role for one in talk.messages] == ["user", "assistant"] * 3


def test_the_first_turn_is_the_chat_template_word_for_word(chatter):
    model, tokenizer = chatter
    session = Session(model, tokenizer)
    session.send(SAY[0], max_new_tokens=4)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": SAY[0]}], tokenize=False, add_generation_prompt=True
    )
    read = tokenizer.decode(session.cache.ids[0, : session.messages[1].span.start].tolist())
    assert read == asked


def test_every_message_is_the_span_of_its_own_tokens(talk, chatter):
    _, tokenizer = chatter
    ids = [*talk.cache.ids[0].tolist(), *talk._pending]
    for one in talk.messages:
        inside = ids[one.span.start : one.span.end]
        assert tokenizer.decode(inside, skip_special_tokens=True) == one.text
        assert len(one.offsets) == len(one.span) and one.offsets[-1][1] == len(one.text)


@pytest.mark.parametrize("how", [{"message": 0}, {"text": "Lamp 3 is kept by Ann."}, "span"])
def test_an_erased_message_might_never_have_been(talk, chatter, how):
    span = talk.messages[0].span
    ids = talk.cache.ids
    report = talk.erase(**({"span": span} if how == "span" else how))
    assert report.exact and talk.messages[0].span is None and talk.messages[0].erased == ((0, len(SAY[0])),)
    assert torch.equal(talk.cache.ids, torch.cat([ids[:, : span.start], ids[:, span.end :]], 1))
    expected = said_in_one(talk, chatter, SAY[2], 8)
    assert talk.send(SAY[2], max_new_tokens=8) == expected
    for one in talk.messages[1:]:
        inside = [*talk.cache.ids[0].tolist(), *talk._pending][one.span.start : one.span.end]
        assert talk.template.decode(inside) == one.text


def test_a_passage_of_a_message_can_be_erased_and_then_the_rest(talk):
    report = talk.erase(text="kept by Bob")
    assert report.exact
    (gone,) = talk.messages[2].erased
    assert "kept by Bob" in talk.messages[2].text[slice(*gone)]
    with pytest.raises(InputError, match="taken out already"):
        talk.erase(text="kept by Bob")
    talk.erase(message=2)
    assert talk.messages[2].span is None


def test_erasers_that_keep_positions_mark_the_message(chatter):
    session = Session(*chatter, eraser=erasers.make("drop"))
    session.send(SAY[0], max_new_tokens=4)
    before = session.messages[0].span
    session.erase(message=0)
    assert session.messages[0].span == before and session.messages[0].erased
    assert session.cache.state.erased == (before,)
    session.send(SAY[1], max_new_tokens=4)


def test_a_reply_whose_last_token_was_never_fed_is_erased_with_it(chatter):
    session = Session(*chatter)
    session.send(SAY[0], max_new_tokens=3)
    if not session._pending:
        pytest.skip("this model ended its reply")
    session.erase(message=-1)
    assert session._pending == [] and session.messages[1].span is None
    session.send(SAY[1], max_new_tokens=3)


def test_a_budget_holds_over_many_turns(chatter):
    session = Session(*chatter, policies.StreamingLLM(budget=Budget.tokens(48), sink=4, window=32))
    for n in range(12):
        session.send(f"Lamp {n} is kept by {n * n}.", max_new_tokens=6)
    report = session.report()
    assert report.seen[0] > 200 and report.held <= 6 * (48 + 2 * 64)


def test_pieces_of_a_reply_come_as_they_are_made(chatter):
    pieces = []
    reply = Session(*chatter).send(SAY[0], max_new_tokens=9, on_text=pieces.append)
    assert "".join(pieces) == reply and len(pieces) > 1


def test_a_fork_goes_its_own_way(talk):
    twin = talk.fork()
    twin.erase(message=0)
    assert talk.messages[0].span is not None and talk.cache.seen != twin.cache.seen
    assert talk.send(SAY[2], max_new_tokens=4) and len(twin.messages) == 4


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "exactly one of"),
        ({"message": 0, "text": "x"}, "exactly one of"),
        ({"message": 9}, "there is no message 9; the conversation has 4"),
        ({"text": "is kept by"}, "in message 0, message 2; it must be in one"),
        ({"text": "zebra"}, "in no message"),
        ({"span": Span(5, 9999)}, "not in the cache"),
    ],
)
def test_what_cannot_be_erased_is_named(talk, how, said):
    with pytest.raises(InputError, match=said):
        talk.erase(**how)


def test_an_empty_message_is_refused_and_an_interrupt_takes_the_turn_back(talk, monkeypatch):
    with pytest.raises(InputError, match="nothing in this message"):
        talk.send("  ")
    seen, messages = talk.cache.seen, talk.messages

    def stop(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.send(SAY[2], max_new_tokens=9, on_text=stop)
    assert talk.cache.seen == seen and talk.messages == messages
    assert talk.send(SAY[2], max_new_tokens=4)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupt_in_the_midst_of_a_forward_takes_the_turn_back_too(talk, chatter, layer):
    """Nearly all the time of a reply is spent there."""
    model, twin, calls = chatter[0], talk.fork(), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = model.model.layers[layer].mlp.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        talk.send(SAY[2], max_new_tokens=9)
    hook.remove()
    assert talk.cache.seen == twin.cache.seen and talk.messages == twin.messages
    assert talk.cache.state.schedule == twin.cache.state.schedule, "no speculation was seen"
    assert talk.send(SAY[2], max_new_tokens=8) == twin.send(SAY[2], max_new_tokens=8)


def test_a_message_of_a_short_talk_can_be_taken_out_under_a_fraction(chatter):
    """A fraction that nobody announced a length for never asks for less than sink and window."""
    session = Session(*chatter, policies.SnapKV(budget=Budget.fraction(0.1)))
    for text in SAY:
        session.send(text, max_new_tokens=3)
    assert session.erase(message=0).exact and session.send("And lamp 7?", max_new_tokens=3)


# Kept on disk.


def test_a_conversation_goes_on_from_disk(talk, chatter, tmp_path):
    talk.erase(text="kept by Ann")
    talk.save(tmp_path / "kept")
    again = Session.load(tmp_path / "kept", *chatter)
    assert again.messages == talk.messages and again._pending == talk._pending
    assert again.send(SAY[2], max_new_tokens=8) == talk.send(SAY[2], max_new_tokens=8)


def test_a_damaged_conversation_is_refused(talk, chatter, tmp_path):
    talk.save(tmp_path / "kept")
    with pytest.raises(InputError, match="not empty"):
        talk.save(tmp_path / "kept")
    path = tmp_path / "kept" / "session.json"
    books = json.loads(path.read_text())
    for wrong, said in (({"format": 9}, "has format 9"), ({"messages": [{}]}, "is damaged")):
        path.write_text(json.dumps(books | wrong))
        with pytest.raises(CacheFileError, match=said):
            Session.load(tmp_path / "kept", *chatter)
    path.unlink()
    with pytest.raises(CacheFileError):
        Session.load(tmp_path / "kept", *chatter)


# In the terminal.


def shown(session, *lines) -> str:
    console = Console(file=io.StringIO(), width=100, highlight=False)
    chat(session, lines, console, max_new_tokens=4, prompt=lambda: None)
    return console.file.getvalue()


def test_the_terminal_erases_reports_and_saves(chatter, tmp_path):
    session = Session(*chatter)
    text = shown(
        session, SAY[0], "/messages", "/erase 0", "/messages", "/report", f"/save {tmp_path / 'kept'}", "/quit", SAY[1]
    )
    assert "0 user Lamp 3 is kept by Ann." in text and "0 user ····" in text
    assert "recompute, exact" in text and "pairs" in text and (tmp_path / "kept" / "session.json").exists()
    assert len(session.messages) == 2, "nothing is said after /quit"


def test_the_terminal_explains_what_it_does_not_know(chatter):
    text = shown(Session(*chatter), "/help", "/frobnicate", "/erase", "/erase 7", "")
    assert "/save FOLDER" in text and text.count("/help lists them") == 2 and "there is no message 7" in text


def test_chat_reads_its_lines_from_a_pipe(vestige, folders, place, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{SAY[0]}\n/erase 0\n/report\n"))
    result = vestige("chat", "--model", folders.chat, "--max-new-tokens", "4", "--method", "shift")
    assert result.code == 0 and "shift, approximate" in result.out and "pairs" in result.out


def test_chat_names_what_is_wrong_with_its_options(vestige, folders):
    result = vestige("chat", "--model", folders.chat, "--method", "forget")
    assert result.code == 2 and "unknown eraser 'forget'" in result.err


def test_a_model_without_a_template_gets_lines(folders):
    from vestige.models.loading import load

    _, tokenizer = load(folders.plain)
    turns = ChatTemplate(tokenizer, "Be brief.")
    decode = tokenizer.decode
    assert decode(turns.opening()).endswith("Be brief.\n") and decode(turns.reply_opening()) == "\n"
    assert decode(turns.next_opening()) == "\n"
