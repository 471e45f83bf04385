"""The main job in process: reading once, answering many questions, the numbers beside the answers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.cache_utils import DynamicCache

from vestige import BudgetError, CacheFileError, InputError, KVCache, PolicyError, VestigeError, attach
from vestige.cache.report import Report
from vestige.models.compat import cache_argument
from vestige.pipelines.document_qa import RunConfig, run
from vestige.text.chat_template import ChatTemplate

QUESTIONS = ("Who keeps lamp 16?", "How many lamps?", "Why?")


def evicting(story: str, **changes) -> RunConfig:
    defaults = {"questions": QUESTIONS[:1], "prompt": story, "policy": "snapkv", "budget": "48", "chunk": 64}
    return RunConfig(**(defaults | {"max_new_tokens": 8} | changes))


def texts(config: RunConfig, model, tokenizer) -> list[str]:
    return [answer.text for answer in run(config, model, tokenizer).answers]


def settled(report: Report) -> Report:
    """Return a report without its clock."""
    return replace(report, evict_s=0.0)


@torch.no_grad()
def plain_answer(model, tokenizer, story: str, question: str, tokens: int) -> str:
    """Return the greedy reply of a DynamicCache that is fed everything at once."""
    frame = ChatTemplate(tokenizer)
    ids = torch.cat([frame.context(story), frame.question(question)], 1)
    cache = DynamicCache(config=model.config)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_argument(cache),
        max_new_tokens=tokens,
        do_sample=False,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_full_answers_as_a_dynamic_cache_does(chatter, story):
    model, tokenizer = chatter
    config = evicting(story, questions=QUESTIONS, policy="full", budget=None, chunk=50)
    expected = [plain_answer(model, tokenizer, story, question, 8) for question in QUESTIONS]
    assert texts(config, model, tokenizer) == expected
    assert len(set(expected)) > 1  # or the comparison says little


def test_a_budget_above_the_length_changes_no_answer(chatter, story):
    model, tokenizer = chatter
    config = evicting(story, questions=QUESTIONS, budget="500")
    assert texts(config, model, tokenizer) == texts(
        evicting(story, questions=QUESTIONS, policy="full", budget=None), model, tokenizer
    )


@pytest.mark.parametrize("policy", ["snapkv", "random", "full"])
def test_questions_asked_together_are_answered_as_if_asked_alone(chatter, story, policy):
    model, tokenizer = chatter
    budget = None if policy == "full" else "48"
    together = texts(evicting(story, questions=QUESTIONS, policy=policy, budget=budget), model, tokenizer)
    alone = [
        texts(evicting(story, questions=(question,), policy=policy, budget=budget), model, tokenizer)[0]
        for question in QUESTIONS
    ]
    assert together == alone


def test_numbers_are_those_of_the_reading_whatever_is_asked_after(chatter, story):
    model, tokenizer = chatter
    one = run(evicting(story, share="model"), model, tokenizer).report
    more = run(evicting(story, share="model", questions=QUESTIONS, max_new_tokens=20), model, tokenizer).report
    assert settled(replace(more, peak_kv_bytes=0)) == settled(replace(one, peak_kv_bytes=0))
    assert one.seen == (ChatTemplate(tokenizer).context(story).shape[1],)
    assert one.held == one.budget_total == 48 * 3 * 2  # layers x KV heads
    assert one.policy == "SnapKV" and one.share == "model"
    assert one.memory_bytes == one.other_kv_bytes == 0


def test_the_peak_covers_the_reading_a_chunk_and_the_answers(chatter, story):
    model, tokenizer = chatter
    pair = 2 * 16 * 4 + 4  # keys, values, position
    result = run(evicting(story, max_new_tokens=70), model, tokenizer)  # past a settle
    report = result.report
    assert report.kv_bytes <= report.peak_kv_bytes
    assert report.peak_kv_bytes >= (48 + 64) * 6 * pair  # a chunk on top of the budget was there once
    whole = run(evicting(story, policy="full", budget=None), model, tokenizer).report
    assert whole.kv_bytes >= whole.full_kv_bytes == whole.held * (pair - 4)
    assert report.peak_kv_bytes < whole.peak_kv_bytes


def test_the_row_for_json_agrees_with_the_result(chatter, story):
    model, tokenizer = chatter
    result = run(evicting(story, questions=QUESTIONS), model, tokenizer)
    row = result.as_dict("tiny", 64)
    assert json.loads(json.dumps(row)) == row
    assert row["answer"] == row["answers"][0] and len(row["answers"]) == 3
    assert row["kept_fraction"] == row["held"] / (row["seen"] * 6)
    assert row["prefill_s"] >= row["evict_s"] > 0
    seconds, tokens = (sum(getattr(a, name) for a in result.answers) for name in ("decode_s", "tokens"))
    assert row["decode_tokens_per_s"] == pytest.approx(tokens / seconds)
    assert tokens == 3 * 8
    assert (row["policy"], row["budget"], row["budget_total"], row["model"]) == ("snapkv", "48", 288, "tiny")


def test_progress_reaches_the_total_in_chunks(chatter, story):
    model, tokenizer = chatter
    calls: list[tuple[int, int]] = []
    result = run(evicting(story), model, tokenizer, lambda done, total: calls.append((done, total)))
    total = result.report.seen[0]
    assert calls == [(min(end, total), total) for end in range(64, total + 64, 64)]


def test_a_saved_reading_answers_like_the_reading_itself(chatter, story, tmp_path):
    model, tokenizer = chatter
    kept = tmp_path / "kept"
    direct = run(evicting(story, questions=QUESTIONS, budget="0.25", save=kept), model, tokenizer)
    again = run(RunConfig(questions=QUESTIONS, cache=kept, max_new_tokens=8), model, tokenizer)
    assert [a.text for a in again.answers] == [a.text for a in direct.answers]
    assert again.prefill_s == 0.0 and again.budget == direct.budget
    for name in ("seen", "held", "full", "full_kv_bytes", "budget_total", "policy", "share", "layers"):
        assert getattr(again.report, name) == getattr(direct.report, name), name


def test_a_reading_can_be_saved_without_a_question(chatter, story, tmp_path):
    model, tokenizer = chatter
    result = run(evicting(story, questions=(), save=tmp_path / "kept"), model, tokenizer)
    assert result.answers == () and result.decode_tokens_per_s == 0.0
    assert result.as_dict("tiny", 64)["answer"] == ""
    assert KVCache.load(tmp_path / "kept", model).held == result.report.held


def test_the_model_is_left_as_it_was_even_by_an_error(chatter, story, tmp_path):
    model, tokenizer = chatter
    before = model.config._attn_implementation
    run(evicting(story), model, tokenizer)
    with pytest.raises(CacheFileError):
        run(RunConfig(questions=QUESTIONS, cache=tmp_path / "gone"), model, tokenizer)
    assert model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_attached_model_stays_attached(chatter, story):
    model, tokenizer = chatter
    with attach(model):
        run(evicting(story), model, tokenizer)
        assert model.config._attn_implementation == "vestige"
    assert model.config._attn_implementation != "vestige"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"prompt": None}, InputError, "exactly one of"),
        ({"cache": Path("somewhere")}, InputError, "exactly one of"),
        ({"context": Path("somewhere")}, InputError, "exactly one of"),
        ({"questions": ()}, InputError, "at least one --question"),
        ({"questions": ("Who?", " ")}, InputError, "--question is empty"),
        ({"chunk": 0}, InputError, "--chunk must be at least 1, got 0"),
        ({"max_new_tokens": 0}, InputError, "--max-new-tokens must be at least 1, got 0"),
        ({"memory": "moment"}, PolicyError, "unknown memory 'moment'.*available: none"),
        ({"policy": "snapvk"}, PolicyError, "unknown policy 'snapvk'; did you mean 'snapkv'"),
        ({"share": "heads"}, PolicyError, "unknown share 'heads'; did you mean 'head'"),
        ({"budget": None}, PolicyError, "policy 'snapkv' needs a budget"),
        ({"policy": "full"}, PolicyError, "'full' takes no budget"),
        ({"budget": "many"}, BudgetError, "cannot read budget 'many'"),
        ({"budget": "12"}, BudgetError, "12 pairs a row.*protect 36"),
        ({"budget": "1.5"}, BudgetError, "fraction must lie in"),
        ({"cache": Path("kept"), "prompt": None, "policy": "full"}, InputError, "brings its policy and budget along"),
        ({"cache": Path("kept"), "prompt": None, "budget": None}, InputError, "brings its policy and budget along"),
    ],
)
def test_a_run_that_cannot_work_is_refused_when_it_is_described(changes, kind, message):
    with pytest.raises(kind, match=message):
        evicting("text", **changes)


def test_save_takes_only_a_new_or_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "new", tmp_path / "empty"):
        assert evicting("text", save=path).save == path
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="exists and is not empty"):
            evicting("text", save=path)


@pytest.mark.parametrize(("budget", "message"), [("0.1", "gives .* sink and window protect 36"), ("9KB", "protect 36")])
def test_a_budget_that_proves_too_small_is_refused_before_reading(chatter, story, tmp_path, budget, message):
    model, tokenizer = chatter
    calls: list[int] = []
    with pytest.raises(BudgetError, match=message):
        run(evicting(story, budget=budget, save=tmp_path / "x"), model, tokenizer, lambda n, _: calls.append(n))
    assert not calls and not list(tmp_path.iterdir())


@pytest.mark.parametrize("over", [0, 1])
def test_a_context_that_leaves_no_position_for_a_reply_is_refused_before_reading(chatter, tmp_path, over):
    """At ``over`` 0, context and question just fit, but a reply would not."""
    model, tokenizer = chatter
    frame, limit = ChatTemplate(tokenizer), model.config.max_position_embeddings
    room = limit - frame.question("Who?").shape[1] + over
    text = "x" * (room - frame.context("").shape[1])
    assert frame.context(text).shape[1] == room
    calls: list[int] = []
    config = evicting(text, questions=("Who?",), budget="64", save=tmp_path / "kept")
    with pytest.raises(InputError, match=f"{limit + over} tokens.*{limit} positions"):
        run(config, model, tokenizer, lambda done, _: calls.append(done))
    assert not list(tmp_path.iterdir())
    assert not calls


def test_a_saved_reading_that_leaves_no_position_for_a_reply_is_refused_before_it_is_saved_again(chatter, tmp_path):
    model, tokenizer = chatter
    room = model.config.max_position_embeddings - ChatTemplate(tokenizer).context("").shape[1] - 5
    run(evicting("x" * room, questions=(), budget="64", save=tmp_path / "kept"), model, tokenizer)
    config = RunConfig(questions=("Who keeps lamp 16?",), cache=tmp_path / "kept", save=tmp_path / "again")
    with pytest.raises(InputError, match="tokens.* 512 positions"):
        run(config, model, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_reply_is_cut_short_where_positions_end(chatter):
    model, tokenizer = chatter
    frame, limit = ChatTemplate(tokenizer), model.config.max_position_embeddings
    text = "x" * (limit - 5 - frame.context("").shape[1] - frame.question("Who?").shape[1])
    result = run(evicting(text, questions=("Who?",), budget="64", max_new_tokens=50), model, tokenizer)
    assert result.answers[0].tokens == 5


def test_every_refusal_is_a_vestige_error():
    for kind in (InputError, PolicyError, BudgetError, CacheFileError):
        assert issubclass(kind, VestigeError)
