"""`vestige train eraser` from texts to an adapter that `vestige erase` takes."""

import json

import pytest

TRAIN = (
    "--steps", "3", "--batch", "2", "--rank", "2", "--least", "100", "--most", "150", "--validate-every", "2",
    "--save-every", "2", "--validation", "2",
)  # fmt: skip


def test_training_makes_an_adapter_with_a_card_that_erase_takes(vestige, folders, texts, place):
    command = ("train", "eraser", "--model", folders.chat, "--data", "texts", "--out", "made", *TRAIN)
    result = vestige(*command, "--json")
    assert result.code == 0, result.err
    assert result.row["finished"] and result.row["step"] == 3 and result.row["adapter"] == "made/adapter"
    card = json.loads((place / "made" / "adapter" / "card.json").read_text())
    assert card["steps"] == 3 and card["seed"] == 0 and len(card["data"]) == 3 and "exact" in card["validation"]
    assert card["command"].startswith("vestige train eraser") and card["minutes"] >= 0
    asked = ("--context", "story.txt", "--span", "30:40", "--question", "Who?", "--max-new-tokens", "3")
    row = vestige("erase", "--model", folders.chat, *asked, "--method", "learned(adapter=made/adapter)", "--json").row
    assert row["method"] == "learned" and row["slots_replaced"] == 60 and not row["exact"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "gone"), "gone"),
        (("--data", "texts", "--rank", "0"), "rank"),
        (("--data", "texts", "--least", "10"), "least and most"),
        (("--data", "story.txt"), "12 sentences or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(vestige, folders, texts, arguments, said):
    result = vestige("train", "eraser", "--model", folders.chat, "--out", "made", *arguments)
    assert result.code == 2 and said in result.err
