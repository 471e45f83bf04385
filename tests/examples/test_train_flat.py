"""The flat loop beside the full one."""

import pytest
from safetensors.torch import load_file

from examples import train_flat
from tests.training.worker import Points, run
from vestige.training.config import LoopConfig
from vestige.training.metrics import read


@pytest.mark.parametrize("options", [{}, {"warmup": 3, "weight_decay": 0.3, "betas": (0.8, 0.9), "clip": 0.1}])
def test_the_flat_loop_comes_to_the_same_weights_and_losses_as_the_full_one(tmp_path, options):
    full, plain = Points(), Points()
    result = run(tmp_path / "full", full, LoopConfig(steps=7, batch=3, lr=0.05, seed=2, **options))
    losses = train_flat.train(plain, steps=7, batch=3, lr=0.05, seed=2, out=tmp_path / "flat.safetensors", **options)
    assert losses == pytest.approx([record["loss"] for record in read(tmp_path / "full")], rel=1e-6)
    ours, theirs = load_file(result.checkpoint / "weights.safetensors"), load_file(tmp_path / "flat.safetensors")
    assert ours.keys() == theirs.keys() == {"2.weight", "2.bias"}
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert not ours["2.weight"].equal(Points().weights()["2.weight"])
