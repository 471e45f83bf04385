"""Training on the default model: minutes, but what is learnt there shows."""

from importlib.resources import files

import pytest
import torch

from vestige.adapter import Adapter
from vestige.download import fetch, load
from vestige.learn import LoopConfig, train
from vestige.learn.erasing.samples import EraserOptions, Texts
from vestige.learn.erasing.task import EraserTask
from vestige.learn.prose import sentences


@pytest.mark.slow
def test_the_learned_eraser_gets_better_on_texts_it_has_not_seen(tmp_path):
    model, tokenizer = load(fetch("smollm2-135m"))
    prose = sentences((files("vestige") / "data" / "harbour.txt").read_text(encoding="utf-8"))
    half = len(prose) // 2
    torch.manual_seed(0)
    options = EraserOptions(neighbours=0, least=100, most=200)
    train_on, held = Texts(prose=[prose[:half]]), Texts(prose=[prose[half:]])
    task = EraserTask(model, tokenizer, Adapter.fresh(model), train_on, held, options, validation=24)
    with torch.no_grad():
        before = task.validate()
    train(task, LoopConfig(steps=40, batch=2, lr=5e-4, warmup=4), tmp_path / "out")
    with torch.no_grad():
        after = task.validate()
    assert after["kl"] < 0.7 * before["kl"] and after["exact"] > before["exact"] + 0.15, (before, after)
