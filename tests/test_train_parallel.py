"""Each training command, as two processes and after a kill: the same as one that went through."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from launching import launched
from vestige.learn.metrics import read

PROSE = " ".join(f"Sentence number {i} says that the year {1000 + 7 * i} was calm." for i in range(20))
COMMANDS = {
    "eraser": (
        "--steps", "3", "--batch", "2", "--rank", "2", "--least", "100", "--most", "150", "--passes", "2",
        "--pool", "4", "--neighbours", "1", "--kl", "0.5", "--validation", "1", "--save-every", "1",
    ),
    "retention": (
        "--steps", "3", "--batch", "2", "--width", "8", "--length", "500", "--least", "450", "--warm", "1",
        "--validation", "1", "--save-every", "1",
    ),
}  # fmt: skip
WEIGHTS = {"eraser": "adapter/adapter_model.safetensors", "retention": "gates/gates.safetensors"}


@pytest.fixture
def command(folders, place):
    """Return what trains one kind into a folder, for this interpreter to run."""
    shutil.copytree(folders.chat, place / "model")
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    (place / "texts").mkdir()
    for n in range(3):
        (place / "texts" / f"{n}.txt").write_text(f"Text {n} begins with these words. {PROSE}")
    run = "from vestige.cli import main; main()"

    def words(kind: str, out: str, *more: str) -> list[str]:
        data = ("--model", "model", "--dtype", "float32", "--data", "texts", "--out", out)
        return [sys.executable, "-c", run, "train", kind, *data, *COMMANDS[kind], *more]

    return words


def curve(folder: str) -> list[tuple[float, ...]]:
    """Return what each step of a run came to, its clock left out."""
    return [tuple(x for name, x in record.items() if name not in ("seconds", "validation")) for record in read(folder)]


@pytest.mark.parametrize("kind", COMMANDS)
def test_two_processes_come_to_the_losses_of_one(command, place, kind):
    pytest.importorskip("accelerate")
    for count, out in ((1, "one"), (2, "two")):
        for done in launched(command(kind, out), count):
            assert done.returncode == 0, done.stderr
    one, two = curve(place / "one"), curve(place / "two")
    assert len(one) == len(two) == 3
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_that_was_gone_on_with_has_the_bits_of_one_that_went_through(command, place, kind):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(kind, "through"), env=env, check=True, capture_output=True)
    shutil.copytree("through", "killed")
    shutil.rmtree("killed/step-00000003")  # as if killed in the last step
    shutil.rmtree(f"killed/{WEIGHTS[kind].split('/')[0]}")
    subprocess.run(command(kind, "killed", "--resume"), env=env, check=True, capture_output=True)
    assert curve(place / "killed") == curve(place / "through")
    weights, others = (load_file(f"{name}/{WEIGHTS[kind]}") for name in ("through", "killed"))
    assert all(weights[name].equal(others[name]) for name in weights)
