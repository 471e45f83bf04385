"""LongBench: where its samples come from, how they are asked, cut to a length, and shared between dev and test."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vestige import InputError
from vestige.bench.metrics.scores import METRICS
from vestige.bench.sample import Turn
from vestige.bench.tasks import TASKS, TaskSpec, make
from vestige.bench.tasks.longbench import prompts as prompts
from vestige.bench.tasks.longbench.samples import DATASETS, DATASETS_E, choose_places, cut_middle, find_largest_fit
from vestige.text.jsonl import Entry


def words(text: str) -> int:
    return len(text.split())


def measure(turns: Sequence[Turn]) -> int:
    """Count words, and a token for each of a reply."""
    return sum(words(f"{t.context} {t.question} {t.answer_prefix}") + t.max_new_tokens for t in turns)


def order(**changes) -> TaskSpec:
    return TaskSpec(**({"count": words, "measure": measure} | changes))


def row(i: int = 0, **changes) -> dict:
    """Return a sample as the original data have it."""
    plain = {"input": f"Who is {i}?", "context": f"Text {i} tells who.", "answers": [f"Man {i}"], "length": 4}
    return plain | {"dataset": "hotpotqa", "language": "en", "all_classes": None, "_id": str(i)} | changes


def own(i: int = 0, **changes) -> dict:
    """Return a sample with prompt columns, as in kvpress's data."""
    plain = {"context": f"Read {i}.", "question": "Q: who?", "answer_prefix": "A:", "answers": ["Man"], "length": "4"}
    return plain | {"task": "hotpotqa", "max_new_tokens": "52", "all_classes": []} | changes


def choice(i: int = 0, **changes) -> dict:
    """Return a sample of v2."""
    choices = {f"choice_{letter}": f"{letter.lower()}{i}" for letter in "ABCD"}
    plain = {"_id": str(i), "context": f"Text {i}", "question": f"Which {i}?", "answer": "C", "length": "short"}
    return plain | choices | {"domain": "Law", "difficulty": "hard"} | changes


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def hotpot(tmp_path) -> Path:
    return write(tmp_path / "hotpotqa.jsonl", [row(i) for i in range(12)])


@pytest.fixture
def hub(monkeypatch):
    """Stand in for ``datasets``: return the calls; samples are those of ``served``."""
    state = SimpleNamespace(calls=[], served=[row(i) for i in range(4)])

    def load_dataset(repo, config, split):
        state.calls.append((repo, config, split))
        if isinstance(state.served, Exception):
            raise state.served
        return state.served

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return state


# What there is


def test_there_are_21_datasets_13_of_them_in_e_each_with_a_metric_and_a_prompt():
    assert len(DATASETS) == 21 and len(DATASETS_E) == 13 and set(DATASETS_E) < set(DATASETS)
    assert {d.metric for d in DATASETS.values()} <= set(METRICS)
    assert prompts.load_shipped_prompts().keys() == {*DATASETS, "longbench-v2"}
    assert {"longbench", "longbench-e", "longbench-v2"} < set(TASKS)


def test_metrics_and_reply_limits_are_the_published_ones():
    assert (DATASETS["narrativeqa"].metric, DATASETS["narrativeqa"].max_new_tokens) == ("f1", 128)
    assert {name for name, d in DATASETS.items() if d.metric.endswith("first_line")} == {
        *("trec", "triviaqa", "samsum", "lsht")
    }
    limits = {name: d.max_new_tokens for name, d in DATASETS.items()}
    assert {name for name, n in limits.items() if n == 512} == {"gov_report", "qmsum", "multi_news", "vcsum"}
    assert {name for name, n in limits.items() if n == 128} == {"narrativeqa", "qasper", "dureader", "samsum"}
    code = {"lcc", "repobench-p"}
    assert {name for name, n in limits.items() if n == 64} == {
        "multifieldqa_en",
        "multifieldqa_zh",
        "trec",
        "lsht",
    } | code


def test_our_prompts_ask_for_the_input_wherever_the_data_have_one():
    without = {"gov_report", "multi_news", "vcsum", "passage_count", "lcc", "longbench-v2"}
    assert {
        name for name, prompt in prompts.load_shipped_prompts().items() if "{input}" not in prompt.question
    } == without


# Files and folders


def test_a_file_gives_samples_with_our_prompts(hotpot):
    sample = make("longbench/hotpotqa", order(file=hotpot))[0]
    assert sample.task == "longbench/hotpotqa" and sample.index == 6
    assert sample.tags == {"prompts": "vestige"}
    (turn,) = sample.turns
    assert turn.context.endswith("\n\nText 6 tells who.") and turn.question.startswith("Who is 6?\n")
    assert turn.answers == ("Man 6",) and turn.metric == "f1" and turn.max_new_tokens == 32


def test_without_a_length_a_row_has_that_of_its_longest_sample(tmp_path):
    rows = [row(i, context="word " * (10 * i)) for i in range(8)]
    made = make("longbench/hotpotqa", order(file=write(tmp_path / "hotpotqa.jsonl", rows)))
    assert [s.index for s in made] == [4, 6]
    assert {s.length for s in made} == {measure(made[1].turns)} and measure(made[1].turns) > measure(made[0].turns)


def test_a_folder_runs_what_is_there(tmp_path):
    write(tmp_path / "hotpotqa.jsonl", [row(i) for i in range(4)])
    write(tmp_path / "lcc.jsonl", [row(i, dataset="lcc") for i in range(4)])
    write(tmp_path / "trec_e.jsonl", [row(i) for i in range(4)])
    assert {s.task for s in make("longbench", order(file=tmp_path))} == {"longbench/hotpotqa", "longbench/lcc"}
    with pytest.raises(InputError, match=r"no such file: .*qasper\.jsonl"):
        make("longbench/qasper", order(file=tmp_path))


def test_a_folder_without_any_file_says_what_it_should_have(tmp_path):
    with pytest.raises(InputError, match=r"has none of LongBench's files, such as narrativeqa\.jsonl"):
        make("longbench", order(file=tmp_path))
    with pytest.raises(InputError, match=r"such as qasper_e\.jsonl"):
        make("longbench-e", order(file=tmp_path))


def test_a_file_may_hold_several_datasets_or_be_named_after_one(tmp_path):
    mixed = write(tmp_path / "mixed.jsonl", [row(i, dataset=("lcc", "qasper")[i % 2]) for i in range(8)])
    assert {s.task for s in make("longbench", order(file=mixed))} == {"longbench/lcc", "longbench/qasper"}
    with pytest.raises(InputError, match=r"no sample of trec; it has lcc, qasper"):
        make("longbench/trec", order(file=mixed))
    bare = [{k: v for k, v in row(i).items() if k != "dataset"} for i in range(4)]
    assert make("longbench", order(file=write(tmp_path / "musique.jsonl", bare)))[0].task == "longbench/musique"
    with pytest.raises(InputError, match=r"my\.jsonl, line 1: unknown data set 'my'"):
        make("longbench", order(file=write(tmp_path / "my.jsonl", bare)))


def test_an_unknown_dataset_names_the_near_one(hotpot):
    with pytest.raises(InputError, match=r"unknown data set of longbench 'hotpot'; did you mean 'hotpotqa'\?"):
        make("longbench/hotpot", order(file=hotpot))
    with pytest.raises(InputError, match=r"unknown data set of longbench-e 'musique'"):
        make("longbench-e/musique", order(file=hotpot))
    with pytest.raises(InputError, match=r"longbench-v2 has no parts, got longbench-v2/law"):
        make("longbench-v2/law", order(file=hotpot))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", r"line 9: not JSON: .* at character 2"),
        ("[1]", r"line 9: not a JSON object but \[1\]"),
        (json.dumps(row(answers=[])), r"line 9: 'answers' is not a list of texts but \[\]"),
        (json.dumps(row(answers=[1])), r"line 9: 'answers' is not a list of texts but \[1\]"),
        (json.dumps(row(context=None)), r"line 9: 'context' is not a text but null"),
        (json.dumps({"dataset": "hotpotqa", "input": ""}), r"line 9: 'answers' is missing; there is dataset, input"),
        (json.dumps(row(dataset="trek")), r"line 9: unknown data set 'trek'; did you mean 'trec'\?"),
        (json.dumps(row(dataset="trec")), r"line 9: 'all_classes' is not a list of texts but null"),
        ('{"dataset": "hotpotqa", "answers": ["\\ud800"]}', r"line 9: 'answers' has half a character"),
        ("[" * 100_000, r"line 9: not JSON that can be read"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, said):
    dataset = "trec" if "trec" in line else "hotpotqa"
    others = [json.dumps(row(i, dataset=dataset, all_classes=["a"])) for i in range(7)]
    path = tmp_path / "data.jsonl"  # a blank line first: the bad one is the ninth, and the eighth sample: of test
    path.write_text("\n".join(["", *others, line, ""]))
    with pytest.raises(InputError, match=said) as raised:
        make("longbench", order(file=path, split="test"))
    assert "\n" not in str(raised.value)


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    path = tmp_path / "hotpotqa.jsonl"
    lines = [json.dumps(row(i, context="a\u2028b"), ensure_ascii=False) for i in range(4)]
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    assert make("longbench", order(file=path))[0].turns[0].context.endswith("a\u2028b")


# Splits and choice


def test_dev_and_test_share_no_sample_and_files_keep_their_first_half(hotpot):
    dev, test = (make("longbench", order(file=hotpot, split=split)) for split in ("dev", "test"))
    assert [s.index for s in dev] == [6, 8, 10] and [s.index for s in test] == [7, 9, 11]


def test_a_hub_set_is_used_whole(hub):
    dev, test = (make("longbench/hotpotqa", order(split=split)) for split in ("dev", "test"))
    assert [s.index for s in dev] == [0, 2] and [s.index for s in test] == [1, 3]
    assert hub.calls == [("Xnhyacinth/LongBench", "hotpotqa", "test")] * 2


def test_the_seed_chooses_and_repeats():
    def places(seed: int) -> list[int]:
        return choose_places(200, order(seed=seed, samples=10), first=100, name="longbench/lcc")

    assert places(0) == places(0) == sorted(places(0)) and len(places(0)) == 10
    assert places(0) != places(1)
    assert all(place >= 100 and place % 2 == 0 for place in places(0))
    assert choose_places(9, order(samples=20), first=5, name="x") == [6, 8]  # all there are


def test_a_split_without_samples_is_an_error(tmp_path):
    path = write(tmp_path / "lcc.jsonl", [row(dataset="lcc"), row(dataset="lcc")])
    assert [s.index for s in make("longbench", order(file=path, split="test"))] == [1]
    with pytest.raises(InputError, match=r"longbench/lcc has no dev samples: there are 2, and those from 1 on"):
        make("longbench", order(file=path))


# Prompts


def test_columns_of_the_dataset_are_its_prompts(tmp_path):
    (turn,) = make("longbench", order(file=write(tmp_path / "d.jsonl", [own(i) for i in range(4)])))[0].turns
    expected = Turn(
        **{"context": "Read 2.", "question": "Q: who?", "answer_prefix": "A:", "answers": ("Man",)},
        **{"metric": "f1", "max_new_tokens": 52},
    )
    assert turn == expected
    assert make("longbench", order(file=tmp_path / "d.jsonl"))[0].tags == {"prompts": "dataset"}


def test_prompts_of_the_user_come_first(hotpot, tmp_path):
    mine = {"context": "Read: {context}!", "question": "{input} {", "answer_prefix": "It is", "max_new_tokens": 9}
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"hotpotqa": mine, "lcc": {"question": "Go on."}}))
    sample = make("longbench", order(file=hotpot, prompts=path))[0]
    assert sample.tags == {"prompts": "file"}
    (turn,) = sample.turns
    assert turn.context == "Read: Text 6 tells who.!" and turn.question == "Who is 6? {"
    assert turn.answer_prefix == "It is" and turn.max_new_tokens == 9


def test_what_is_filled_in_is_not_filled_again():
    entry = Entry(where="here", columns={"context": "{input} {", "input": "{context}"})
    assert prompts.fill("<{context}|{input}>", entry) == "<{input} {|{context}>"
    assert prompts.fill("{context}{context}", entry, context="") == ""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('{"hotpotqa": {}}', r"p\.json, hotpotqa: 'question' is missing"),
        ('{"hotpot": {}}', r"p\.json: unknown data set 'hotpot'; did you mean 'hotpotqa'\?"),
        ('{"lcc": {"question": "a", "prefix": "b"}}', r"lcc: unknown key 'prefix'"),
        ('{"lcc": {"question": "a", "context": "b"}}', r"lcc: 'context' has no place for \{context\}"),
        ('{"lcc": {"question": "{context}"}}', r"'question' has a place \{context\}; there can be: \{input\}"),
        ('{"lcc": {"question": "a", "context": "{context} {input}"}}', r"'context' has a place \{input\}"),
        ('{"lcc": {"question": "a", "answer_prefix": "{input}"}}', r"'answer_prefix' has a place .*: none"),
        ('{"longbench-v2": {"question": "{input}"}}', r"there can be: \{question\}, \{choice_A\}"),
        ('{"lcc": {"question": 1}}', r"'question' is not a text but 1"),
        ('{"lcc": {"question": " "}}', r"'question' is empty"),
        ('{"lcc": {"question": "a", "max_new_tokens": 0}}', r"not a whole number above 0 but 0"),
        ('{"lcc": {"question": "a", "max_new_tokens": true}}', r"not a whole number above 0 but true"),
        ('{"lcc":\n{"question": "a",}}', r"p\.json: not JSON: .* at line 2"),
        ("[]", r"p\.json: not a JSON object but \[\]"),
    ],
)
def test_a_prompt_file_that_is_of_no_use_says_why(hotpot, tmp_path, given, said):
    path = tmp_path / "p.json"
    path.write_text(given)
    with pytest.raises(InputError, match=said):
        make("longbench", order(file=hotpot, prompts=path))


# Reply limits


def test_replies_end_beyond_the_longest_answer_if_there_is_an_answer_room(tmp_path):
    rows = [row(i, answers=["one", "one two three"]) for i in range(4)]
    made = make("longbench", order(file=write(tmp_path / "hotpotqa.jsonl", rows), answer_room=16))
    assert made[0].turns[0].max_new_tokens == 3 + 16


# Length


def test_a_long_context_loses_its_middle_and_no_more_than_it_must(tmp_path):
    document = " ".join(f"w{n}" for n in range(500))
    path = write(tmp_path / "hotpotqa.jsonl", [row(i, context=document) for i in range(4)])
    (whole,) = make("longbench", order(file=path))[0].turns
    sample = make("longbench", order(file=path, length=120))[0]
    (turn,) = sample.turns
    assert sample.length == 120 and measure((turn,)) == 120
    assert (turn.question, turn.answer_prefix) == (whole.question, whole.answer_prefix)
    intro = whole.context.removesuffix(document)
    assert turn.context.startswith(f"{intro}w0 w1 w2 ") and turn.context.endswith(" w498 w499")
    kept = len(turn.context) - len(intro)
    assert turn.context == intro + cut_middle(document, kept)
    assert words(intro + cut_middle(document, kept + 1)) > words(turn.context)


def test_what_fits_is_not_cut(tmp_path):
    path = write(tmp_path / "hotpotqa.jsonl", [row(i) for i in range(4)])
    sample = make("longbench", order(file=path))[0]
    assert make("longbench", order(file=path, length=sample.length)) == [sample]
    assert make("longbench", order(file=path, length=sample.length - 1))[0].turns != sample.turns


def test_a_length_that_holds_no_prompt_is_an_error_with_both_numbers(hotpot):
    least = measure(make("longbench", order(file=hotpot))[0].turns) - words("Text 6 tells who.")
    with pytest.raises(InputError, match=rf"line 7: .* alone are {least} tokens, but --length is 20"):
        make("longbench", order(file=hotpot, length=20))
    assert make("longbench", order(file=hotpot, length=least))[0].turns[0].context.endswith("\n\n")


@given(st.text(alphabet="abcd", max_size=40), st.integers(0, 40))
def test_ends_are_halves_of_a_text(text, kept):
    kept = min(kept, len(text))
    cut = cut_middle(text, kept)
    head = (kept + 1) // 2
    assert len(cut) == kept and text.startswith(cut[:head]) and text.endswith(cut[head:])


@settings(max_examples=200)
@given(st.integers(0, 50), st.integers(-1, 60))
def test_most_is_the_largest_that_fits(whole, limit):
    expected = max((n for n in range(whole) if n <= limit), default=None)
    assert find_largest_fit(whole, lambda n: n <= limit) == expected


# E and v2


def test_e_is_tagged_by_length(tmp_path):
    lengths = [3999, 4000, 7999, 8000]
    rows = [row(i, length=lengths[i % 4]) for i in range(16)]
    write(tmp_path / "hotpotqa_e.jsonl", rows)
    both = [s for split in ("dev", "test") for s in make("longbench-e", order(file=tmp_path, split=split))]
    assert {s.task for s in both} == {"longbench-e/hotpotqa"}
    buckets = {lengths[s.index % 4]: s.tags["bucket"] for s in both}
    assert buckets == {3999: "0-4k", 4000: "4-8k", 7999: "4-8k", 8000: "8k+"}


def test_e_comes_from_the_hub_under_its_own_names(hub):
    hub.served = [own(i, task="trec-e", length="9000", all_classes=["a", "b"], answers=["a"]) for i in range(2)]
    (sample,) = make("longbench-e/trec", order())
    assert hub.calls == [("Xnhyacinth/LongBench", "trec_e", "test")]
    assert sample.tags == {"prompts": "dataset", "bucket": "8k+"}
    assert sample.turns[0].choices == ("a", "b") and sample.turns[0].metric == "classification_first_line"


@pytest.mark.parametrize("name", ["v2.jsonl", "data.json"])
def test_v2_asks_for_a_letter(tmp_path, name):
    rows = [choice(i) for i in range(3)]
    path = tmp_path / name
    path.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    dev = make("longbench-v2", order(file=path if name == "v2.jsonl" else tmp_path))
    assert [s.index for s in dev] == [0, 2] and {s.task for s in dev} == {"longbench-v2"}
    assert dev[1].tags == {"prompts": "vestige", "difficulty": "hard", "domain": "Law", "length_class": "short"}
    (turn,) = dev[1].turns
    assert turn.answers == ("C",) and turn.metric == "choice" and turn.max_new_tokens == 128
    assert turn.question.startswith("Which 2?\n(A) a2\n(B) b2\n(C) c2\n(D) d2\n")
    assert METRICS["choice"]("C) it is", turn) == 1.0 and METRICS["choice"]("A", turn) == 0.0


def test_v2_comes_from_the_hub(hub):
    hub.served = [choice(i) for i in range(2)]
    (sample,) = make("longbench-v2", order(split="test"))
    assert hub.calls == [("zai-org/LongBench-v2", None, "train")] and sample.index == 1


def test_v2_wants_a_letter_and_a_list(tmp_path):
    path = write(tmp_path / "a.jsonl", [choice(answer="E")])
    with pytest.raises(InputError, match=r"line 1: 'answer' is not A, B, C or D but 'E'"):
        make("longbench-v2", order(file=path))
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(InputError, match=r"b\.json: not a JSON list"):
        make("longbench-v2", order(file=tmp_path / "b.json"))


# The hub


def test_a_lost_connection_is_one_line_that_names_the_way_out(hub):
    hub.served = ConnectionError("no route\nto host")
    with pytest.raises(InputError) as raised:
        make("longbench/lcc", order())
    said = "cannot fetch Xnhyacinth/LongBench (ConnectionError: no route to host); give --longbench PATH"
    assert str(raised.value) == said


def test_without_datasets_the_pip_line_is_printed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'pip install "vestige\[bench\]".*--longbench PATH'):
        make("longbench/lcc", order())


def test_without_a_part_all_datasets_are_fetched(hub):
    hub.served = [own(i, all_classes=["Man"]) for i in range(2)]
    assert len(make("longbench", order())) == 21
    assert {config for _, config, _ in hub.calls} == set(DATASETS)


# Real data


def real_data() -> Path:
    beside = Path(__file__).parents[5] / "shared" / "data"
    return Path(os.environ.get("VESTIGE_DATA", beside)) / "longbench" / "multi_news.jsonl"


@pytest.mark.skipif(not real_data().exists(), reason="needs LongBench's multi_news")
def test_multi_news_is_read_cut_and_scored():
    dev = make("longbench/multi_news", order(file=real_data(), length=1000, samples=5))
    test = make("longbench/multi_news", order(file=real_data(), length=1000, split="test"))
    assert len(dev) == 5 and len(test) == 50
    assert all(s.index >= 100 for s in dev + test) and not {s.index for s in dev} & {s.index for s in test}
    assert max(measure(s.turns) for s in test) == 1000
    turn = test[0].turns[0]
    assert turn.metric == "rouge_l" and turn.max_new_tokens == 512
    assert METRICS["rouge_l"](turn.answers[0], turn) == pytest.approx(1.0, abs=1e-7)
    assert 0.0 < METRICS["rouge_l"](test[1].turns[0].answers[0], turn) < 0.4
