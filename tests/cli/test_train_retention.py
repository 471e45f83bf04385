"""`vestige train retention` from texts to gates that `vestige run` takes."""

import json

import pytest

TRAIN = (
    "--steps", "3", "--batch", "2", "--width", "8", "--length", "500", "--least", "450", "--warm", "1",
    "--validate-every", "2", "--save-every", "2", "--validation", "2",
)  # fmt: skip


def test_training_makes_gates_with_a_card_that_run_takes(vestige, roomy, texts, place):
    command = ("train", "retention", "--model", roomy, "--data", "texts", "--out", "made", *TRAIN)
    result = vestige(*command, "--json")
    assert result.code == 0, result.err
    assert result.row["finished"] and result.row["step"] == 3 and result.row["gates"] == "made/gates"
    card = json.loads((place / "made" / "gates" / "card.json").read_text())
    assert card["steps"] == 3 and card["gates"]["width"] == 8 and len(card["data"]) == 3
    assert card["command"].startswith("vestige train retention") and "answers" in card["validation"]
    asked = ("--context", "story.txt", "--question", "Who?", "--max-new-tokens", "3", "--budget", "0.25")
    row = vestige("run", "--model", roomy, *asked, "--policy", "retention(gates=made/gates)", "--json").row
    assert row["policy"] == "retention" and row["share"] == "model" and row["held"] == row["budget_total"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "gone"), "gone"),
        (("--data", "texts", "--length", "500", "--least", "10"), "96 <= least"),
        (("--data", "texts", "--length", "5000"), "5000 tokens do not fit the model's 512 positions"),
        (("--data", "texts", "--warm-by", "magic"), "unknown warm-by 'magic'; available: answers, replay"),
        (("--data", "texts", "--bias", "22"), "bias must be at most 18, or gates live too long to learn"),
        (("--data", "texts", "--capacity", "0"), "capacity must be above 0"),
        (("--data", "story.txt"), "two texts of 12 sentences or more, one of them to validate on; there is none"),
        (("--data", "texts/0.txt"), "there is 1 among 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(vestige, folders, texts, arguments, said):
    result = vestige("train", "retention", "--model", folders.chat, "--out", "made", *arguments)
    assert result.code == 2 and said in result.complaint()
