"""`vestige train retention` from texts to gates that `vestige run` takes."""

import json
import shutil

import pytest

PROSE = " ".join(f"Sentence number {i} says that the year {1000 + 7 * i} was calm." for i in range(20))
TRAIN = (
    "--steps", "3", "--batch", "2", "--width", "8", "--length", "500", "--least", "450", "--warm", "1",
    "--validate-every", "2", "--save-every", "2", "--validation", "2",
)  # fmt: skip


@pytest.fixture
def model(folders, place):
    """The folder of a model with room for a replay."""
    shutil.copytree(folders.chat, place / "model")
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return "model"


@pytest.fixture
def texts(place):
    """A folder with three texts."""
    (place / "texts").mkdir()
    for n in range(3):
        (place / "texts" / f"{n}.txt").write_text(f"Text {n} begins with these words. {PROSE}")
    return place


def test_training_makes_gates_with_a_card_that_run_takes(vestige, model, texts):
    command = ("train", "retention", "--model", model, "--data", "texts", "--out", "made", *TRAIN)
    result = vestige(*command, "--json")
    assert result.code == 0, result.err
    assert result.row["finished"] and result.row["step"] == 3 and result.row["gates"] == "made/gates"
    card = json.loads((texts / "made" / "gates" / "card.json").read_text())
    assert card["steps"] == 3 and card["gates"]["width"] == 8 and len(card["data"]) == 3
    assert card["command"].startswith("vestige train retention") and "answers" in card["validation"]
    asked = ("--context", "story.txt", "--question", "Who?", "--max-new-tokens", "3", "--budget", "0.25")
    row = vestige("run", "--model", model, *asked, "--policy", "retention(gates='made/gates')", "--json").row
    assert row["policy"] == "retention" and row["share"] == "model" and row["held"] == row["budget_total"]


def test_a_finished_run_is_not_begun_again_and_other_options_are_refused(vestige, model, texts):
    command = ("train", "retention", "--model", model, "--data", "texts", "--out", "made", *TRAIN)
    assert vestige(*command).code == 0
    before = (texts / "made" / "gates" / "gates.safetensors").read_bytes()
    again = vestige(*command)
    assert again.code == 2 and "made" in again.err
    assert vestige(*command, "--resume").code == 0
    assert (texts / "made" / "gates" / "gates.safetensors").read_bytes() == before
    other = vestige(*command, "--resume", "--bias", "3")
    assert other.code == 2 and "bias" in other.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "gone"), "gone"),
        (("--data", "texts", "--length", "500", "--least", "10"), "96 <= least"),
        (("--data", "texts", "--length", "5000"), "5000 tokens do not fit the model's 512 positions"),
        (("--data", "texts", "--warm-by", "magic"), "unknown warm-by 'magic'; available: answers, replay"),
        (("--data", "texts", "--capacity", "0"), "capacity must be above 0"),
        (("--data", "story.txt"), "12 sentences or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(vestige, folders, texts, arguments, said):
    result = vestige("train", "retention", "--model", folders.chat, "--out", "made", *arguments)
    assert result.code == 2 and said in result.err
