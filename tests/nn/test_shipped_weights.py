"""What comes with the package: small, safetensors and JSON alone, with a card, and of use on the model it is for."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.conftest import on_the_default_model
from vestige.models.loading import load
from vestige.nn.pretrained import SHIPPED
from vestige.pipelines.document_qa import RunConfig, run
from vestige.pipelines.erase_passage import EraseConfig, erase_text
from vestige.training.trainer import CARD

MOST_BYTES = {"eraser": 12_000_000, "indexmem": 8_000_000, "retention": 8_000_000}
MOST_MINUTES, CORES = 100, 2
"""On so many cores; a card that does not say on how many it was made is about that many."""
FOLDERS = sorted(path for path in SHIPPED.iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_shipped_weights_are_small_half_precise_and_run_nothing(folder: Path):
    files = list(folder.iterdir())
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES[folder.name.partition("-")[0]]
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_shipped_weights_have_a_card_that_says_how_to_make_them_again(folder: Path):
    card = json.loads((folder / CARD).read_text())
    assert {"model", "what", "data", "steps", "minutes", "seed", "command", "scores"} <= card.keys()
    assert card["command"].startswith("vestige train ") and "--resume" not in card["command"]
    assert card["minutes"] * card.get("cores", CORES) <= MOST_MINUTES * CORES
    assert not any("/" in name for name in card["data"])


@on_the_default_model
def test_the_shipped_eraser_steers_the_default_model_past_a_stale_fact():
    model, tokenizer = load("smollm2-135m", dtype="float32", progress=False)
    stale, question = "The meeting is in room 204.", "In which room is the meeting?"
    news = "The meeting is in room 311. Bring your own cup. Coffee is free today."
    asked = RunConfig(prompt=f"Minutes. {news} {stale} The lift is out of order.", questions=(question,))
    replies = {}
    for method in ("noop", "learned"):
        done = erase_text(EraseConfig(run=asked, span_text=stale, method=method), model, tokenizer)
        replies[method] = done.run.answers[0].text
    assert "204" in replies["noop"]
    assert "311" in replies["learned"] and "204" not in replies["learned"]
    (span,) = done.report.spans
    assert done.report.slots_replaced == 90 * len(span.span)


@on_the_default_model
@pytest.mark.parametrize(
    ("policy", "memory"), [("retention", "none"), ("indexmem", "none"), ("indexmem", "linear"), ("indexmem", "slots")]
)
def test_a_shipped_policy_keeps_a_tenth_that_answers_where_chance_does_not(policy: str, memory: str):
    model, tokenizer = load("smollm2-135m", dtype="float32", progress=False)
    days = (
        "Rain fell on the harbour all morning. Two gulls fought over a crust on the quay. A clerk came by with the "
        "post, and nobody had a letter. The lamps along the mole were lit early because of the fog. "
    )
    text = f"Notes of the week. {8 * days}The ferry leaves at 7:40. {8 * days}"
    replies = {}
    for one, beside in ((policy, memory), ("random", "none")):
        asked = RunConfig(
            prompt=text, questions=("When does the ferry leave?",), policy=one, budget="0.1", memory=beside
        )
        replies[one] = run(asked, model, tokenizer).answers[0].text
    assert "7:40" in replies[policy] and "7:40" not in replies["random"]
