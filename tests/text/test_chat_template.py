"""Text in, ids out: the chat text cut at the end of the context."""

import pytest
import torch

from vestige.text.chat_template import ChatTemplate

CONTEXT, QUESTION = "The lamp is lit.\n\n  Ω 日本 🙂 {{ x }} {% y %}", "Who lit it?"


@pytest.fixture(params=["chat", "plain"])
def tokenizer(request, folders):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(getattr(folders, request.param))


def whole_text(tokenizer, content: str) -> str:
    """Return what the model should read for one user message."""
    if tokenizer.chat_template is None:
        return f"{tokenizer.bos_token}{content}\n"
    message = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def test_context_and_question_join_to_the_chat_text_of_one_message(tokenizer):
    frame = ChatTemplate(tokenizer)
    ids = torch.cat([frame.context(CONTEXT), frame.question(QUESTION)], 1)
    assert ids.dtype == torch.long and ids.shape[0] == 1
    assert tokenizer.decode(ids[0]) == whole_text(tokenizer, f"{CONTEXT}\n{QUESTION}")


def test_the_context_part_ends_with_the_context(tokenizer):
    text = tokenizer.decode(ChatTemplate(tokenizer).context(CONTEXT)[0])
    assert text.endswith(CONTEXT) and QUESTION not in text
    assert text.startswith(tokenizer.bos_token) and text.count(tokenizer.bos_token) == 1


def test_each_part_is_tokenised_on_its_own(tokenizer):
    frame, encode = ChatTemplate(tokenizer), lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    before, after = whole_text(tokenizer, f"{CONTEXT}\n{QUESTION}").split(f"{CONTEXT}\n{QUESTION}")
    assert frame.context(CONTEXT)[0].tolist() == encode(before + CONTEXT)
    assert frame.question(QUESTION)[0].tolist() == encode("\n" + QUESTION + after)
    joined = encode("a\nThe")  # across the cut the tokenizer would merge: the parts must not depend on each other
    assert frame.context("a")[0].tolist() + frame.question("The")[0].tolist() != joined


def test_an_answer_prefix_opens_the_reply(tokenizer):
    frame = ChatTemplate(tokenizer)
    text = tokenizer.decode(frame.question(QUESTION, "The keeper is")[0])
    assert text == tokenizer.decode(frame.question(QUESTION)[0]) + "The keeper is"


def test_special_tokens_of_the_template_are_single_ids(folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders.chat)
    user, assistant, bos, eos = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<s>", "</s>"])
    assert ChatTemplate(tokenizer).context("a")[0].tolist()[:2] == [bos, user]
    assert ChatTemplate(tokenizer).question("a")[0].tolist()[-2:] == [eos, assistant]


def test_a_text_longer_than_the_tokenizer_expects_is_read_without_a_warning(tokenizer):
    tokenizer.model_max_length = 5
    assert ChatTemplate(tokenizer).context(CONTEXT).shape[1] > 5


CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|user|>Be brief.</s>\n{% endif %}"
    "<|{{ message.role }}|>\n{{ message.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Puts a system text before the first message and a line break behind what closes one."""


def conversation(tokenizer, contents: list[str]) -> str:
    """Return what the model should read of messages of user and assistant in turn, before the next reply."""
    if tokenizer.chat_template is None:
        return tokenizer.bos_token + "\n".join(contents) + "\n"
    talk = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("template", ["own", "chatml"])
def test_the_parts_of_a_dialogue_join_to_the_chat_text_of_all_its_messages(tokenizer, template):
    if template == "chatml":
        tokenizer.chat_template = CHATML
    frame = ChatTemplate(tokenizer)
    replies = [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in ("It was Ada.", "Bo")]
    parts = [
        frame.context(CONTEXT), frame.question(QUESTION), replies[0], frame.next_context("Bo put it\n out."),
        frame.question("Who put it out?"), replies[1], frame.next_context("Night fell."), frame.question("When?"),
    ]  # fmt: skip
    said = [f"{CONTEXT}\n{QUESTION}", "It was Ada.", "Bo put it\n out.\nWho put it out?", "Bo", "Night fell.\nWhen?"]
    assert tokenizer.decode(torch.cat(parts, 1)[0]) == conversation(tokenizer, said)


def test_what_follows_a_reply_begins_with_the_token_that_ended_it(folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders.chat)
    ids = ChatTemplate(tokenizer).next_context("Bo put it out.")[0].tolist()
    assert ids[:2] == tokenizer.convert_tokens_to_ids(["</s>", "<|user|>"])
    assert tokenizer.decode(ids[2:]) == "Bo put it out." and "<s>" not in tokenizer.decode(ids)


def test_without_a_template_a_line_break_follows_a_reply(folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders.plain)
    assert tokenizer.decode(ChatTemplate(tokenizer).next_context("Bo put it out.")[0]) == "\nBo put it out."


def test_a_next_context_may_be_empty_and_is_not_read_as_a_template(tokenizer):
    frame = ChatTemplate(tokenizer)
    empty = frame.next_context("")
    assert empty.dtype == torch.long and empty.shape[0] == 1 and empty.shape[1] > 0
    assert tokenizer.decode(frame.next_context(CONTEXT)[0]) == tokenizer.decode(empty[0]) + CONTEXT
