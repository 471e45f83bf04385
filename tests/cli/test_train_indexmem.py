"""`vestige train indexmem` from texts to weights that `vestige run` takes."""

import json

import pytest

TRAIN = (
    "--steps", "3", "--batch", "2", "--dim", "4", "--width", "8", "--length", "500", "--least", "450", "--alone", "1",
    "--validate-every", "2", "--save-every", "2", "--validation", "2",
)  # fmt: skip


@pytest.mark.parametrize("apart", ["--apart", "--no-apart"])
def test_training_makes_weights_with_a_card_that_run_takes(vestige, roomy, texts, place, apart):
    command = ("train", "indexmem", "--model", roomy, "--data", "texts", "--out", "made", *TRAIN, apart)
    result = vestige(*command, "--json")
    assert result.code == 0, result.err
    assert result.row["finished"] and result.row["step"] == 3 and result.row["indexmem"] == "made/indexmem"
    card = json.loads((place / "made" / "indexmem" / "card.json").read_text())
    assert (
        card["steps"] == 3
        and card["indexer"]["dim"] == 4
        and card["memory"]["width"] == 8
        and card["memories"] == ["linear", "slots"]
    )
    assert card["indexer"]["apart"] == (apart == "--apart") and card["options"]["alone"] == 2
    assert card["command"].startswith("vestige train indexmem") and "answers" in card["validation"]
    asked = ("--context", "story.txt", "--question", "Who?", "--max-new-tokens", "3", "--budget", "0.25")
    for memory in card["memories"]:
        used = ("--policy", "indexmem(indexer=made/indexmem)", "--memory", f"{memory}(latent=made/indexmem)")
        row = vestige("run", "--model", roomy, *asked, *used, "--json").row
        assert row["policy"] == "indexmem" and row["share"] == "head" and row["memory_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "gone"), "gone"),
        (("--data", "texts", "--length", "500", "--least", "10"), "96 <= least"),
        (("--data", "texts", "--length", "5000"), "5000 tokens do not fit the model's 512 positions"),
        (("--data", "texts", "--teacher", "magic"), "unknown teacher 'magic'; available: answers, text"),
        (("--data", "texts", "--memory", "magic"), "unknown trained memory 'magic'; available: linear, slots"),
        (("--data", "texts", "--schedule", "magic"), "unknown schedule 'magic'"),
        (("--data", "texts", "--aware", "2"), "aware must lie in [0, 1]"),
        (("--data", "texts", "--steps", "5", "--alone", "5"), "memories would learn nothing"),
        (("--data", "story.txt"), "two texts of 12 sentences or more, one of them to validate on; there is none"),
        (("--data", "texts/0.txt"), "there is 1 among 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(vestige, folders, texts, arguments, said):
    result = vestige("train", "indexmem", "--model", folders.chat, "--out", "made", *arguments)
    assert result.code == 2 and said in result.complaint()


def test_weights_of_another_model_are_refused_in_one_line(vestige, folders, roomy, texts, place):
    assert vestige("train", "indexmem", "--model", roomy, "--data", "texts", "--out", "made", *TRAIN).code == 0
    asked = ("run", "--model", folders.chat, "--context", "story.txt", "--question", "Who?", "--budget", "0.25")
    policy = vestige(*asked, "--policy", "indexmem(indexer=made/indexmem)")
    memory = vestige(*asked, "--policy", "snapkv", "--memory", "linear(latent=made/indexmem)")
    assert policy.code == memory.code == 2
    assert "indexer made for another model" in policy.complaint()
    assert "linear memory made for another model" in memory.complaint()
