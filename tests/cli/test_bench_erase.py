"""`vestige bench erase [TASK...]`: its table, its JSON, its complaints."""

import json
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.conftest import CHAT, byte_level_tokenizer
from vestige.testing import tiny

pytest.importorskip("wonderwords")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Save a tiny model with room for samples."""
    folder, tokenizer = tmp_path_factory.mktemp("model") / "roomy", byte_level_tokenizer(CHAT)
    logging.disable_progress_bar()
    tiny("llama", vocab_size=len(tokenizer), seed=6, max_position_embeddings=4096).save_pretrained(folder)
    logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def erase(vestige, model, place):
    """Run `vestige bench erase` in a folder with essays."""
    Path("essays").mkdir()
    for i in range(10):
        Path("essays", f"{i}.txt").write_text(" ".join(f"In essay {i} the clerk wrote line {n}." for n in range(40)))
    common = ("--model", model, "--essays", "essays", "--samples", "1", "--length", "900")
    return lambda *words: vestige("bench", "erase", *words, *common)


def test_json_is_one_object_of_rows_and_they_are_kept(erase):
    rows = erase("needles_early", "--method", "drop,shift", "--out", "out", "--json").row["rows"]
    assert [row["method"] for row in rows] == ["noop", "recompute", "drop", "shift"]
    kept = json.loads(Path("out", "rows.json").read_text())
    assert kept["rows"] == rows and kept["command"].startswith("vestige bench erase needles_early")


def test_people_see_a_table_and_a_run_goes_on(erase):
    said = erase("harmless", "--method", "drop", "--out", "out").out
    assert all(word in said for word in ("harmless", "recompute", "drop", "exact*", "results: out"))
    assert erase("harmless", "--method", "shift", "--out", "out", "--resume").code == 0
    assert len(Path("out", "samples.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("needles",), "unknown task 'needles'"),
        (("repeat",), "--out DIR"),
        (("distractor_qa", "--out", "out"), "distractor_qa needs --qa FILE"),
        (("repeat", "--out", "out", "--method", "learned"), "no eraser weights are shipped"),
        (("repeat", "--out", "out", "--method", "drop", "--budget", "0.5"), "takes no budget"),
        (("repeat", "--out", "essays", "--method", "drop"), "not empty"),
    ],
)
def test_bad_input_is_one_line(erase, words, said):
    assert said in erase(*words).complaint()


def test_edits_are_timed_and_kept_once(vestige, model, place):
    command = ("bench", "erase-speed", "--model", model, "--length", "240,400", "--method", "shift", "--before", "50")
    rows = vestige(*command, "--out", "out", "--json").row["rows"]
    assert [(row["length"], row["method"]) for row in rows] == [
        (length, name) for length in (240, 400) for name in ("noop", "recompute", "shift")
    ]
    assert json.loads(Path("out", "speed.json").read_text())["rows"] == rows
    assert "speed.json exists" in vestige(*command, "--out", "out").complaint()
    assert "shift" in vestige(*command).out


def test_a_span_that_does_not_fit_is_told(vestige, model):
    said = vestige("bench", "erase-speed", "--model", model, "--length", "150", "--method", "shift").complaint()
    assert "more than 200 tokens" in said
