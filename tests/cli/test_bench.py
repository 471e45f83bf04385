"""`vestige bench TASK...`: the contract of its options, its complaints and its JSON."""

import json
import re
from pathlib import Path

import pytest

from vestige import InputError

CASE = {
    "task": "lamps", "length": 200, "context": "Ada keeps lamp 4. " * 20, "question": "Who keeps it?", "answer": "Ada",
    "max_new_tokens": 2,
}  # fmt: skip


@pytest.fixture
def here(place) -> Path:
    """Work in a folder with two cases and a folder that is not empty."""
    lines = [CASE, CASE | {"context": "Bo keeps lamp 5. " * 20}]
    Path("cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Path("full").mkdir()
    Path("full", "x").write_text("x")
    return place


@pytest.fixture
def bench(vestige, folders):
    """Run `vestige bench` with the tiny model."""
    return lambda *words: vestige("bench", *words, "--model", folders.chat)


GOOD = ("cases", "cases.jsonl", "--out", "out")


def test_json_is_one_object_of_rows_and_the_last_line(bench, here):
    result = bench(
        *GOOD, "--policy", "full,snapkv", "--budget", "40,0.5", "--share", "head,model", "--json", "--seed=3"
    )
    assert result.code == 0
    assert result.row.keys() == {"rows"} and len(result.out.splitlines()) == 1
    rows = result.row["rows"]
    assert [(r["policy"], r["share"], r["budget"]) for r in rows if r["policy"] == "snapkv"] == [
        ("snapkv", share, budget) for share in ("head", "model") for budget in ("40", "0.5")
    ]  # fmt: skip
    assert rows[0]["policy"] == "full" and rows[0]["budget"] == "1.0" and len(rows) == 5
    assert all(row["n"] == 2 and row["seed"] == 3 and row["split"] == "dev" for row in rows)
    assert json.loads(Path("out", "rows.json").read_text())["rows"] == rows
    promised = (
        "score score_ci95 n kept_fraction kv_bytes peak_kv_bytes full_kv_bytes memory_bytes prefill_s evict_s "
        "decode_ms question_aware model chunk split task length policy share memory budget peer"
    )
    assert all(set(promised.split()) <= row.keys() for row in rows)


def test_people_see_a_table_of_80_columns_and_where_the_results_are(bench, here):
    result = bench(*GOOD, "--policy", "full,snapkv", "--budget", "40,0.1")
    assert result.code == 0 and "results: out; pictures: vestige report out" in result.out
    assert all(word in result.out for word in ("lamps", "full", "snapkv", "failed", "score", "100.0%"))
    assert "failed: lamps snapkv@0.1: budget 0.1 gives" in " ".join(result.err.split())
    assert max(map(len, result.out.splitlines())) <= 80


def test_words_in_brackets_are_shown_as_they_are(bench, here, tmp_path):
    Path("odd.jsonl").write_text(json.dumps(CASE | {"task": "lamps [/b] [red]"}))
    result = bench("cases", "odd.jsonl", "--out", "[bold]out", "--policy", "full,snapkv", "--budget", "0.1")
    assert result.code == 0, result.err
    assert "results: [bold]out;" in result.out and "failed: lamps [/b] [red] snapkv@0.1" in " ".join(result.err.split())


def test_options_may_stand_before_the_task(vestige, folders, here):
    words = ("--model", folders.chat, "--policy", "random", "--budget", "0.5", "--out", "out", "--json")
    assert vestige("bench", *words, "cases", "cases.jsonl").row["rows"][0]["policy"] == "random"
    named = vestige("bench", "tasks", *words[:-2], "other", "--json", "cases", "cases.jsonl")
    assert named.row["rows"][0]["n"] == 2


def test_samples_and_lengths_choose(bench, here):
    assert bench(*GOOD, "--samples", "1", "--json").row["rows"][0]["n"] == 1
    assert bench("cases", "cases.jsonl", "--out", "b", "--length", "200", "--json").row["rows"][0]["n"] == 2
    assert (
        "has no case of length 300; there are 200"
        in bench("cases", "cases.jsonl", "--out", "c", "--length", "300").complaint()
    )


def test_a_part_of_the_cases_can_be_named(bench, here):
    Path("more.jsonl").write_text("\n".join(json.dumps(CASE | {"task": task}) for task in ("a", "b")))
    rows = bench("cases/b", "more.jsonl", "--out", "out", "--json").row["rows"]
    assert [row["task"] for row in rows] == ["b"]


def test_resume_goes_on_and_adds_arms(bench, here):
    first = bench(*GOOD, "--policy", "full", "--json").row["rows"]
    again = bench(*GOOD, "--policy", "full,snapkv", "--budget", "40", "--resume", "--json").row["rows"]
    assert again[0] == first[0] and [row["policy"] for row in again] == ["full", "snapkv"]


def test_an_interrupt_is_one_line_and_what_is_done_stays(bench, here, monkeypatch):
    from vestige.bench import runner

    asked = []
    original = runner.vestige_runner.run

    def stopping(*args, **options):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(runner.vestige_runner, "run", stopping)
    result = bench(*GOOD, "--json")
    assert (result.code, result.out, result.err) == (130, "", "error: interrupted\n")
    assert len(Path("out", "samples.jsonl").read_text().splitlines()) == 1
    assert bench(*GOOD, "--json", "--resume").row["rows"][0]["n"] == 2


BAD: dict[str, tuple[tuple[object, ...], str]] = {
    "unknown task": (("rulr", "--out", "out"), "unknown task 'rulr'; did you mean 'ruler'. available: cases, dialogue"),
    "unknown second task": (("niah", "speed", "--out", "out"), "unknown task 'speed'"),
    "no out": (("cases", "cases.jsonl"), "--out"),
    "no task": (("--out", "out"), "Missing argument '(?i:task)"),
    "cases without a file": (("--out", "out", "cases"), "cases needs a file: vestige bench cases FILE.jsonl"),
    "missing cases": (("cases", "gone.jsonl", "--out", "out"), "no such file.* gone.jsonl"),
    "missing essays": (("niah", "--essays", "gone", "--out", "out"), "no such file.* gone"),
    "malformed cases": (("cases", "story.txt", "--out", "out"), "story.txt, line 1: not JSON"),
    "full out": (("cases", "cases.jsonl", "--out", "full"), "full exists and is not empty; .*, or go on with --resume"),
    "out as file": (("cases", "cases.jsonl", "--out", "story.txt"), "story.txt is a file; name a folder for --out"),
    "long out": (("cases", "cases.jsonl", "--out", "n" * 300), "File name too long"),
    "resume of something else": (("cases", "cases.jsonl", "--out", "full", "--resume"), "full has no results to go on"),
    "unknown policy": ((*GOOD, "--policy", "full,snapvk", "--budget", "40"), "'snapvk'; did you mean 'snapkv'"),
    "no policy": ((*GOOD, "--policy", ","), "name at least one --policy or --peer"),
    "no budget": ((*GOOD, "--policy", "full,snapkv"), "policy 'snapkv' needs a budget: tokens"),
    "bad budget": ((*GOOD, "--policy", "snapkv", "--budget", "0.5,x"), "cannot read budget 'x'"),
    "bad budget of full": ((*GOOD, "--budget", "x"), "cannot read budget 'x'"),
    "small budget": ((*GOOD, "--policy", "snapkv", "--budget", "20"), "20 pairs a row.* protect 36"),
    "unknown share": ((*GOOD, "--policy", "snapkv", "--budget", "40", "--share", "all"), "unknown share 'all'"),
    "unknown memory": ((*GOOD, "--policy", "snapkv", "--budget", "40", "--memory", "moment"), "memory 'moment'"),
    "unknown memory of full": ((*GOOD, "--memory", "moment"), "unknown memory 'moment'.*available: none"),
    "bad split": ((*GOOD, "--split", "train"), "--split must be one of dev, test, got 'train'"),
    "unknown peer": ((*GOOD, "--peer", "kvpres:SnapKVPress"), "unknown peer 'kvpres:SnapKVPress'.*available: kvpress:"),
    "peer without budget": ((*GOOD, "--peer", "kvpress:SnapKVPress"), "peer kvpress:SnapKVPress needs --budget"),
    "word for a length": ((*GOOD, "--length", "2k"), "--length takes whole numbers .*'2k'"),
    "zero length": ((*GOOD, "--length", "0"), "--length must be positive"),
    "zero samples": ((*GOOD, "--samples", "0"), "--samples must be at least 1, got 0"),
    "zero chunk": ((*GOOD, "--chunk", "0"), "--chunk must be at least 1, got 0"),
    "zero batch": ((*GOOD, "--batch", "0"), "--batch must be at least 1, got 0"),
    "zero answer room": ((*GOOD, "--answer-room", "0"), "--answer-room must be at least 1, got 0"),
    "unknown option": ((*GOOD, "--polcy", "full"), "No such option: --polcy"),
    "unknown model": ((*GOOD, "--model", "smolm2-135m"), "unknown model 'smolm2-135m'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_makes_nothing(vestige, folders, here, name):
    words, message = BAD[name]
    model = () if "--model" in words else ("--model", folders.chat)
    complaint = vestige("bench", *words, *model).complaint()
    assert re.search(message, complaint), complaint
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "name", ["unknown task", "missing cases", "full out", "unknown memory", "bad split", "unknown peer"]
)
def test_bad_input_does_not_cost_a_download(vestige, here, monkeypatch, name):
    def load(*args, **options):
        raise InputError("a model was loaded")

    monkeypatch.setattr("vestige.models.loading.load", load)
    assert "a model was loaded" not in vestige("bench", *BAD[name][0]).complaint()


def test_nested_presses_are_one_peer(bench, here, monkeypatch):
    opened = []

    def refuse(name, **options):
        opened.append(name)
        raise InputError("not here")

    monkeypatch.setattr("vestige.bench.runner.peers.open_peer", refuse)
    press = "kvpress:ComposedPress([KnormPress(), SnapKVPress(window_size=32, kernel_size=5)])"
    rows = bench(*GOOD, "--budget", "40", "--peer", f"{press}, transformers:dynamic", "--json").row["rows"]
    assert opened == [press, "transformers:dynamic"]
    assert [row["policy"] for row in rows] == ["full", *opened]


def test_a_malformed_line_is_named_by_its_number(bench, here):
    Path("bad.jsonl").write_text(json.dumps(CASE) + "\n{}\n")
    assert "bad.jsonl, line 2:" in bench("cases", "bad.jsonl", "--out", "out").complaint()


def test_other_settings_on_resume_are_one_line(bench, here):
    bench(*GOOD)
    assert "was begun with seed 0, not 1" in bench(*GOOD, "--resume", "--seed", "1").complaint()
    samples = Path("out", "samples.jsonl")
    samples.write_text("{\n" + samples.read_text())
    assert "samples.jsonl is damaged: line 1 is not a record" in bench(*GOOD, "--resume").complaint()


OPTIONS = (
    "model policy budget length samples split share memory peer chunk batch question-aware answer-room essays qa "
    "longbench prompts out resume device dtype seed json help"
)


@pytest.mark.parametrize("words", [("bench", "--help"), ("bench", "tasks", "--help"), ("bench", "ruler", "--help")])
def test_help_has_every_option_of_the_contract(vestige, words):
    result = vestige(*words)
    assert result.code == 0 and result.err == ""
    assert set(OPTIONS.split()) <= set(re.findall(r"--([a-z-]+)", result.out))
    assert "TASK..." in result.out and "cases FILE.jsonl" in result.out and "bench speed" in result.out


def test_bench_alone_names_its_commands(vestige):
    result = vestige("bench")
    assert all(word in result.out + result.err for word in ("Commands:", "tasks", "speed"))


def test_speed_is_a_command_still(bench, vestige, here, monkeypatch):
    asked = []
    monkeypatch.setattr("vestige.bench.speed.speed", lambda config, *_, **__: asked.append(config) or [])
    assert bench("speed", "--length", "60", "--json").row == {"rows": []}
    assert asked[0].lengths == (60,)
    assert "--blocks" in vestige("bench", "speed", "--help").out
