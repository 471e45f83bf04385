"""A whole run of the benchmark of erasers on a tiny model: records, rows, bounds, resuming, refusals, and latency."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

from vestige import BudgetError, InputError, KVCache, ModelError, PolicyError, attach, erasers, policies
from vestige.bench.erasing import runner as running
from vestige.bench.erasing import tasks
from vestige.bench.erasing.config import EraseBenchConfig
from vestige.bench.erasing.divergence import BatchedCaches, read
from vestige.bench.erasing.items import as_item, collect
from vestige.bench.erasing.latency import LatencyConfig, latency
from vestige.bench.erasing.runner import bench_erase
from vestige.bench.erasing.sample import EraseSample, Question, erased, unmarked, what_is
from vestige.bench.erasing.scoring import clean_is_correct, keep_sample
from vestige.bench.erasing.story_templates import StoryTemplate, draw_depths, draw_sentences, make_each
from vestige.bench.tasks import TaskSpec
from vestige.bench.tokenization import Renderer
from vestige.errors import CacheError
from vestige.testing import tiny
from vestige.text.chat_template import ChatTemplate

pytest.importorskip("wonderwords")

LENGTH = 400
CLOCKS = {"edit_s"}


@pytest.fixture(scope="module")
def talker(chatter):
    """Return a tiny model with room for samples, and its tokenizer of nearly one token a character."""
    tokenizer = chatter[1]
    return tiny("llama", vocab_size=len(tokenizer), seed=6, max_position_embeddings=4096), tokenizer


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    (root / "essays").mkdir()
    for i in range(10):
        lines = (f"In essay {i} the clerk wrote line {n}." for n in range(40))
        (root / "essays" / f"{i}.txt").write_text(" ".join(lines))
    return root


def lamps(order: TaskSpec, rng: random.Random) -> StoryTemplate:
    """Return a plot with few letters and short replies: a tiny model is soon done with it."""
    wrong, right, other, empty = map(str, rng.sample(range(100, 1000), 4))
    lines = [erased(f"Lamp {wrong} is lit."), f"Lamp {right} is lit.", f"Lamp {other} is red."]
    questions = (
        what_is("target", "lit", right, forbidden=[wrong], room=3),
        what_is("retained", "red", other, room=3),
        Question(kind="leak", text="What is gone?", forbidden=(wrong, empty), max_new_tokens=4),
    )
    filler = draw_sentences(order, rng)
    return StoryTemplate(opening="", lines=lines, depths=draw_depths(rng, 3), filler=filler, questions=questions)


@pytest.fixture(autouse=True)
def lamps_are_a_task(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "lamps", make_each(lamps))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def config(texts: Path, **changes) -> EraseBenchConfig:
    given = {"lengths": (LENGTH,), "tasks": ("lamps",), "samples": 2, "essays": texts / "essays"}
    return EraseBenchConfig(**(given | changes))


@pytest.fixture
def measure(talker, texts, out):
    """Run the benchmark and return the rows."""

    def call(**options):
        given = {name: options.pop(name) for name in ("resume", "progress", "out", "command") if name in options}
        return bench_erase(config(texts, **options), *talker, name="tiny", **({"out": out} | given))

    return call


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def timeless(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in CLOCKS} for row in rows]


# Ids.


def test_passages_are_found_in_the_one_tokenisation_and_the_clean_prompt_is_the_other_ids(talker, texts):
    _, tokenizer = talker
    for item in collect(
        config(texts, tasks=("several_spans", "derived_0"), lengths=(1400,)), Renderer(talker[1], talker[0])
    ):
        said = [tokenizer.decode(item.context[0, span.start : span.end].tolist()).strip() for span in item.spans]
        assert said == [item.sample.context[start:end] for start, end in item.sample.passages]
        assert torch.equal(item.context, ChatTemplate(tokenizer).context(item.sample.context))
        gone = {i for span in item.spans for i in range(span.start, span.end)}
        assert item.clean[0].tolist() == [x for i, x in enumerate(item.context[0].tolist()) if i not in gone]
        assert item.tokens <= 1400 < item.tokens + 120


def test_lengths_beyond_the_models_positions_are_refused_before_anything_runs(measure, out):
    with pytest.raises(InputError, match="--length 5000 is more than the model's 4096 positions"):
        measure(lengths=(LENGTH, 5000))
    assert not out.exists()


# A run.

RECORD = {
    "task", "length", "index", "arm", "method", "tags", "kept", "kept_only", "questions", "edit_s", "slots_dropped",
    "slots_replaced", "slots_left", "suffix_left", "tokens_recomputed", "held", "context_tokens", "span_tokens",
    "digest", "revision", "versions", "device", "dtype",
}  # fmt: skip
REPLY = {
    "kind", "question", "answer_prefix", "answers", "forbidden", "prediction", "clean", "exact", "f1", "correct",
    "clean_correct", "leak", "clean_leak", "kl", "top1", "tokens",
}  # fmt: skip


def test_records_and_rows_have_every_promised_field_and_the_bounds_are_always_there(measure, out):
    rows = measure(
        methods=("drop", "noop"), samples=1, tasks=("needles_early",), lengths=(900,), command="vestige bench erase"
    )
    assert [row["method"] for row in rows] == ["noop", "recompute", "drop"]
    kept = json.loads((out / "rows.json").read_text())
    assert kept["rows"] == json.loads(json.dumps(rows)) and kept["command"] == "vestige bench erase"
    for one in records(out):
        assert one.keys() == RECORD and all(reply.keys() == REPLY for reply in one["questions"])
        assert [reply["kind"] for reply in one["questions"]] == ["target", "retained", "leak"]
        assert one["arm"] == {
            "policy": "full",
            "share": "head",
            "memory": "none",
            "budget": "1.0",
            "peer": one["method"],
        }
        slots = one["slots_dropped"] + one["slots_replaced"] + one["slots_left"]
        assert slots == 6 * sum(one["span_tokens"]) and one["edit_s"] > 0
    noop, recompute, drop = rows
    assert noop["held"] == 6 * noop["context_tokens"] and drop["held"] == recompute["held"] < noop["held"]
    assert (
        noop["slots_left"] and drop["slots_dropped"] and noop["tokens_recomputed"] == 0 < recompute["tokens_recomputed"]
    )
    assert all(row["model"] == "tiny" and row["split"] == "dev" and row["seed"] == 0 for row in rows)


def test_recompute_says_what_the_clean_prompt_says_and_the_others_differ(measure):
    noop, recompute, drop = measure(methods=("drop",))
    assert recompute["retained_exact"] == 1.0 and recompute["retained_kl"] < 1e-6
    assert noop["retained_kl"] > 10 * recompute["retained_kl"] and drop["retained_kl"] > 10 * recompute["retained_kl"]
    assert recompute["exact"] == 1.0 == recompute["top1"] and recompute["kl"] < 1e-6 < drop["kl"]
    assert noop["exact_over_recompute"] <= 0 == recompute["exact_over_recompute"]


def test_replies_and_likelihoods_are_those_of_plain_forwards(talker, texts):
    model, tokenizer = talker
    renderer = Renderer(tokenizer, model)
    (item,) = collect(config(texts, samples=1), renderer)
    texts_read = item.clean, item.context
    with torch.no_grad():
        with attach(model):
            caches = [read(model, ids, KVCache(model, policies.Full())) for ids in texts_read]
            batched, limits = BatchedCaches(model, caches), [one.max_new_tokens for one in item.sample.questions]
            replies, forced = list[tuple[int, ...]](), list[torch.Tensor]()
            for question, limit in zip(item.questions, limits, strict=True):
                with batched.ask(question) as asked:
                    replies.append(asked.decode(limit, renderer.stop()).replies[0])
                    forced.append(asked.score(replies[-1]))
        for question, limit, reply, both in zip(item.questions, limits, replies, forced, strict=True):
            for ids, logits in zip(texts_read, both, strict=True):
                fed = torch.cat([ids, question, torch.tensor([reply])], 1)
                plain = model(fed).logits[0, -len(reply) - 1 : -1]
                torch.testing.assert_close(logits, plain, atol=1e-4, rtol=1e-4)
            assert both[0].argmax(-1).tolist() == list(reply) and len(reply) <= limit


def test_what_is_evicted_first_is_evicted_for_all_methods_but_the_clean_prompt(measure, out):
    rows = measure(methods=("drop",), policy="keydiff", budget="0.5", samples=1)
    noop, recompute, drop = rows
    assert all((row["policy"], row["budget"]) == ("keydiff", "0.5") for row in rows)
    assert noop["held"] <= 3 * noop["context_tokens"] + 6 and drop["held"] < noop["held"] > recompute["held"]
    assert recompute["kl"] > 1e-6
    measure(methods=("drop",), samples=1, resume=True)
    by = {(one["arm"]["policy"], one["method"]): one for one in records(out)}
    assert len(by) == 6 == len(records(out))
    for which in range(3):
        assert by["full", "noop"]["questions"][which]["clean"] == by["keydiff", "noop"]["questions"][which]["clean"]


def test_several_spans_go_in_one_call(measure, out):
    rows = measure(tasks=("several_spans",), methods=("shift",), lengths=(1400,), samples=1)
    assert all(
        len(one["span_tokens"]) == 3 and one["slots_dropped"] == 6 * sum(one["span_tokens"]) for one in records(out)[1:]
    )
    assert rows[1]["exact"] == 1.0


def test_methods_asked_together_say_what_each_says_alone(measure, out, monkeypatch, tmp_path):
    methods = ("drop", "shift", "repair")
    together = measure(methods=methods, samples=1)
    monkeypatch.setattr(running, "can_join", lambda caches: False)
    alone = measure(methods=methods, samples=1, out=tmp_path / "alone")
    for one, other in zip(together, alone, strict=True):
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-4)
        assert {**timeless([one])[0], "kl": 0}.keys() == other.keys() - CLOCKS | {"kl"}
    said = [
        [reply["prediction"] for record in records(folder) for reply in record["questions"]]
        for folder in (out, tmp_path / "alone")
    ]
    assert said[0] == said[1]


# Resuming.


def test_an_interrupted_run_goes_on_and_ends_like_one_that_was_not(measure, out, tmp_path):
    whole = measure(methods=("drop",), out=tmp_path / "whole")

    def stop(done: int, of: int, what: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(methods=("drop",), progress=stop)
    assert len(records(out)) == 3 and (out / "rows.json").exists()
    with (out / "samples.jsonl").open("a") as file:
        file.write('{"task": "lam')
    with pytest.raises(InputError, match="not empty"):
        measure(methods=("drop",))
    told = []
    rows = measure(methods=("drop",), resume=True, progress=lambda *said: told.append(said))
    assert timeless(rows) == timeless(whole) and len(records(out)) == 6
    assert told[0] == (0, 6, "lamps noop recompute drop") and told[-1][:2] == (6, 6)


def test_what_is_there_is_not_run_again_and_methods_may_be_added(measure, out, monkeypatch):
    measure(samples=1)
    read_before = []
    monkeypatch.setattr(running, "read", lambda *args: read_before.append(args) or read(*args))
    measure(samples=1, resume=True)
    assert len(read_before) == 1  # the trial alone
    measure(samples=1, methods=("shift",), resume=True)
    assert [one["method"] for one in records(out)] == ["noop", "recompute", "shift"]
    assert len({one["kept"] for one in records(out)}) == 1


def test_other_texts_or_seeds_are_refused_when_a_run_goes_on(measure, texts, tmp_path):
    measure(samples=1)
    with pytest.raises(InputError, match="begun with seed 0, not 1"):
        measure(samples=1, resume=True, seed=1)
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "a.txt").write_text("Another text it is. " * 200)
    with pytest.raises(InputError, match="the data have changed"):
        measure(samples=1, resume=True, essays=tmp_path / "essays")


def test_only_samples_that_pass_the_filter_are_run_if_so_wanted(measure, out, monkeypatch):
    promising, kept = iter([False, True, True]), iter([False, True])
    monkeypatch.setattr(running, "clean_is_correct", lambda replies: next(promising))
    monkeypatch.setattr(running, "keep_sample", lambda replies: next(kept))
    read_before = []
    monkeypatch.setattr(running, "read", lambda *args: read_before.append(args) or read(*args))
    wanted = {"methods": ("drop",), "kept_only": True, "samples": 3}
    rows = measure(**wanted)
    assert [(one["index"], one["method"], bool(one["questions"])) for one in records(out)] == [
        (0, "noop", False), (1, "noop", True), (2, "noop", True), (2, "recompute", True), (2, "drop", True),
    ]  # fmt: skip
    assert len(read_before) == 1 + 1 + 2 + 2  # the trial; the clean text alone where that decides
    assert [(row["n"], row["n_kept"], row["kept_only"]) for row in rows] == [(2, 1, False), (1, 1, True), (1, 1, True)]
    assert measure(**wanted, resume=True) == rows and len(read_before) == 7


def test_what_clean_replies_decide_is_what_the_filter_asks_of_them():
    def reply(kind: str, clean: bool, correct: bool) -> dict:
        return {"kind": kind, "clean_correct": clean, "correct": correct}

    wrong, misled, right = reply("target", False, False), reply("target", True, False), reply("target", True, True)
    other, lost = reply("retained", False, False), reply("leak", True, True)
    assert not clean_is_correct([wrong, misled]) and not keep_sample([wrong, misled])
    assert clean_is_correct([right, other, lost]) and not keep_sample([right, other])
    assert clean_is_correct([misled, other]) and keep_sample([misled, right, other])
    assert not clean_is_correct([other, lost]) and keep_sample([reply("retained", True, False), lost])


# What cannot run.


def test_a_method_that_cannot_work_is_known_before_the_first_sample(measure, out):
    with pytest.raises(ModelError, match="no eraser weights are shipped"):
        measure(methods=("learned",))
    with pytest.raises(InputError, match="no tokenizer lies beside this model"):
        measure(methods=("erratum",))
    assert not out.exists()


def test_a_method_that_fails_on_a_sample_is_a_row_with_its_reason_and_the_others_go_on(measure, monkeypatch):
    original = running.erase

    def failing(cache, spans, eraser, **options):
        if isinstance(eraser, erasers.resolve("shift")) and max(cache.seen) > 100:
            raise CacheError("it broke")
        return original(cache, spans, eraser, **options)

    monkeypatch.setattr(running, "erase", failing)
    rows = {row["method"]: row for row in measure(methods=("shift", "drop"))}
    assert rows["shift"]["error"] == "it broke" and rows["shift"]["n"] == 0 and rows["drop"]["n"] == 2


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"tasks": ("needle",)}, InputError, "unknown task 'needle'"),
        ({"tasks": ("distractor_qa",)}, InputError, "distractor_qa needs --qa FILE"),
        ({"methods": ("lerned",)}, InputError, "did you mean 'learned'"),
        ({"methods": ("repair(share=2)",)}, InputError, "share must lie in"),
        ({"lengths": ()}, InputError, "--length must be positive whole numbers"),
        ({"lengths": (0,)}, InputError, "--length must be positive whole numbers"),
        ({"samples": 0}, InputError, "--samples must be at least 1, got 0"),
        ({"split": "train"}, InputError, "--split must be one of dev, test, got 'train'"),
        ({"essays": Path("gone")}, InputError, "no such file or folder: gone"),
        ({"policy": "kvzip"}, PolicyError, "needs a budget"),
        ({"policy": "kvzap", "budget": "0.5"}, PolicyError, "unknown policy 'kvzap'"),
        ({"budget": "0.5"}, PolicyError, "so it takes no budget, got 0.5"),
        ({"policy": "kvzip", "budget": "x"}, BudgetError, "x"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_in_one_line(texts, options, error, said):
    with pytest.raises(error, match=re.escape(said)) as caught:
        config(texts, **options)
    assert "\n" not in str(caught.value)


def test_all_tasks_are_those_that_the_length_and_the_files_allow(texts, tmp_path):
    short = config(texts, tasks=()).tasks_at(1024)
    assert "derived_1500" not in short and "distractor_qa" not in short and len(short) == 11
    (tmp_path / "qa.json").write_text("{}")
    assert len(config(texts, tasks=(), qa=tmp_path / "qa.json").tasks_at(2048)) == 13
    assert config(texts, tasks=("repeat", "repeat")).tasks_at(10) == ("repeat",)


def test_a_sample_that_says_what_is_forbidden_outside_of_its_passages_is_our_own_mistake():
    context, passages = unmarked(f"It is 42. {erased('No, it is 7.')} Or 7.")
    with pytest.raises(AssertionError, match="outside of what is erased"):
        EraseSample(
            task="t", index=0, length=9, context=context, passages=passages,
            questions=(Question(kind="target", text="?", forbidden=("7",)),),
        )  # fmt: skip


def test_a_passage_between_words_takes_whole_tokens_and_nothing_else(talker):
    context, passages = unmarked(f"One is here. {erased('Two is gone.')} Three stays.")
    sample = EraseSample(
        task="t", index=0, length=9, context=context, passages=passages, questions=(Question(kind="leak", text="?"),)
    )
    item = as_item(sample, ChatTemplate(talker[1]))
    left = talker[1].decode(item.clean[0].tolist(), skip_special_tokens=True)
    assert "One is here." in left and "Three stays." in left and "Two" not in left and "gone" not in left


# Latency.


def test_latency_times_every_method_at_every_length_in_turn(talker):
    told = []
    settings = LatencyConfig(lengths=(260, 300), methods=("shift", "repair(share=0.5)"), question=4, reply=3)
    rows = latency(settings, talker[0], name="tiny", progress=lambda *said: told.append(said))
    assert [(row["length"], row["method"]) for row in rows] == [
        (length, method) for length in (260, 300) for method in ("noop", "recompute", "shift", "repair(share=0.5)")
    ]  # fmt: skip
    assert all(row[name] > 0 for row in rows for name in ("edit_s", "first_token_s", "decode_ms"))
    by = {(row["length"], row["method"]): row["tokens_recomputed"] for row in rows}
    assert by[260, "recompute"] == 60 and by[300, "recompute"] == 100 and by[300, "repair(share=0.5)"] == 50
    assert by[300, "noop"] == 0 and rows[0]["span"] == 100 == rows[0]["before"] and rows[0]["rounds"] == 5
    methods = [what.split()[1] for _, _, what in told[:-1]]
    assert methods[:5] == ["noop", "recompute", "shift", "repair(share=0.5)", "noop"] and len(methods) == 2 * 4 * 6
    assert told[-1][:2] == (48, 48)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lengths": (200,)}, "--length must be more than 200 tokens"),
        ({"rounds": 4}, "at least 5 rounds, got 4"),
        ({"reply": 1}, "the reply at least 2"),
        ({"methods": ("lerned",)}, "unknown eraser 'lerned'"),
    ],
)
def test_what_cannot_be_timed_is_refused(options, said):
    with pytest.raises(InputError, match=re.escape(said)):
        LatencyConfig(**options)


def test_a_length_beyond_the_models_positions_is_not_timed(talker):
    with pytest.raises(InputError, match="are 4148 tokens; the model has 4096 positions"):
        latency(LatencyConfig(lengths=(4100,)), talker[0], name="tiny")
