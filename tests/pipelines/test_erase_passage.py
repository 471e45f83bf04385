"""`vestige erase`, in process and as a command: a passage is found, taken out, and the answers are those without it."""

import re

import pytest
import torch

from vestige import InputError
from vestige.pipelines.document_qa import RunConfig, run
from vestige.pipelines.erase_passage import EraseConfig, erase_text
from vestige.text.chat_template import ChatTemplate

QUESTION = "Who keeps lamp 16?"
SHORT = ("--max-new-tokens", "4")


@pytest.fixture
def passage(story):
    """A sentence of the story that occurs once."""
    sentences = [one for one in re.split(r"(?<=\.)\s+", story) if one.endswith(".") and story.count(one) == 1]
    return sentences[len(sentences) // 3]


def config(story, method="recompute", *, span=None, span_text=None, **reading) -> EraseConfig:
    defaults = {"questions": (QUESTION,), "prompt": story, "chunk": 64, "max_new_tokens": 8}
    return EraseConfig(run=RunConfig(**(defaults | reading)), method=method, span=span, span_text=span_text)


def test_recomputing_answers_as_a_text_of_the_remaining_tokens_does(chatter, story, passage):
    model, tokenizer = chatter
    result = erase_text(config(story, span_text=passage), model, tokenizer)
    assert result.report.exact and passage.strip() in result.passage
    (one,) = result.report.spans
    frame = ChatTemplate(tokenizer)
    context = frame.context(story)
    left = torch.cat([context[:, : one.span.start], context[:, one.span.end :], frame.question(QUESTION)], 1)
    out = model.generate(left, attention_mask=torch.ones_like(left), max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(out[0, left.shape[1] :], skip_special_tokens=True).strip()
    assert result.run.answers[0].text == expected
    assert result.run.report.seen[0] == context.shape[1] - len(one.span) and one.dropped == len(one.span) * 6


def test_a_span_by_numbers_is_the_span_by_text(chatter, story, passage):
    model, tokenizer = chatter
    by_text = erase_text(config(story, "shift", span_text=passage), model, tokenizer)
    span = by_text.report.spans[0].span
    prefix = len(tokenizer(story, add_special_tokens=False)["input_ids"])
    total = run(RunConfig(questions=(QUESTION,), prompt=story, max_new_tokens=1), model, tokenizer).report.seen[0]
    first = span.start - (total - prefix)
    by_number = erase_text(config(story, "shift", span=f"{first}:{first + len(span)}"), model, tokenizer)
    assert by_number.report.spans[0].span == span and by_number.passage == by_text.passage
    assert [a.text for a in by_number.run.answers] == [a.text for a in by_text.run.answers]


@pytest.mark.parametrize("method", ["drop", "shift", "repair(share=0.5)", "blend", "erratum", "noop"])
def test_every_method_answers_after_an_eviction_too(chatter, story, passage, method):
    model, tokenizer = chatter
    evicted = {"policy": "streaming_llm(sink=40)", "budget": "150"}
    result = erase_text(config(story, method, span_text=passage, **evicted), model, tokenizer)
    row = result.as_dict("m", 64)
    assert row["method"] == method.partition("(")[0] and row["edit_s"] > 0 and not row["exact"]
    assert row["slots_dropped"] + row["slots_replaced"] + row["slots_left"] == sum(
        one.dropped + one.replaced + one.left for one in result.report.spans
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one of --span-text TEXT and --span A:B"),
        ({"span": "1:2", "span_text": "x"}, "exactly one of"),
        ({"span": "1-2"}, "--span takes A:B"),
        ({"span": "1:2", "method": "lerned"}, "did you mean 'learned'"),
        ({"span": "1:2", "method": "repair(share=0)"}, "share must lie in"),
    ],
)
def test_options_that_cannot_be_used_are_named(story, options, said):
    with pytest.raises(InputError, match=re.escape(said)):
        config(story, **options)


# The command.

FIELDS = {
    "method", "exact", "edit_s", "span", "slots_dropped", "slots_replaced", "slots_left", "suffix_left",
    "tokens_recomputed", "memory_free_of_span",
}  # fmt: skip


def test_erase_json_has_the_fields_of_run_and_its_own(vestige, folders, place):
    common = ("--model", folders.chat, "--context", "story.txt", "--question", QUESTION, *SHORT, "--json")
    row = vestige("erase", *common, "--span", "30:40", "--method", "shift").row
    assert set(row) == set(vestige("run", *common).row) | FIELDS
    assert row["method"] == "shift" and row["slots_dropped"] == 60 and row["span"][1] - row["span"][0] == 10


def test_erase_shows_what_went_and_that_it_steers(vestige, folders, place):
    common = ("--model", folders.chat, "--context", "story.txt", "--question", QUESTION, *SHORT)
    said = vestige("erase", *common, "--span", "30:40", "--method", "drop").out
    assert "erased:" in said and "60 dropped" in said and "this steers, it does not delete" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--span-text", "no such words"), "does not occur"),
        (("--span", "9:3"), "no span of it"),
        (("--span", "3:9", "--method", "learned"), "no eraser weights are shipped"),
        (("--span", "3:9", "--method", "drop", "--context", "gone.txt"), "no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(vestige, folders, place, arguments, said):
    base = ("erase", "--model", folders.chat, "--context", "story.txt", "--question", QUESTION)
    result = vestige(*base, *arguments)
    assert result.code == 2 and said in result.err and result.err.count("\n") == 1


def test_the_erasers_are_listed(vestige):
    said = vestige("erasers").out
    assert all(name in said for name in ("recompute", "learned", "shift", "erratum")) and len(said.splitlines()) == 8
