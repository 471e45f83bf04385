"""Each training command: as two processes, after a kill, and once it is done."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import launched
from vestige.training.metrics import read

COMMANDS = {
    "eraser": (
        "--steps", "3", "--batch", "2", "--rank", "2", "--least", "100", "--most", "150", "--passes", "2",
        "--pool", "4", "--neighbours", "1", "--nll", "0.5", "--validation", "1", "--save-every", "1",
    ),
    "retention": (
        "--steps", "3", "--batch", "2", "--width", "8", "--length", "500", "--least", "450", "--warm", "1",
        "--warm-loss", "lives", "--forgets", "gradually", "--validation", "1", "--save-every", "1",
    ),
    "retention at once": (
        "--steps", "3", "--batch", "2", "--width", "8", "--length", "500", "--least", "450", "--warm", "1",
        "--warm-loss", "ranking", "--forgets", "at_once", "--validation", "1", "--save-every", "1",
    ),
    "indexmem": (
        "--steps", "3", "--batch", "2", "--dim", "4", "--width", "8", "--length", "500", "--least", "450",
        "--alone", "2", "--validation", "1", "--save-every", "1",
    ),
}  # fmt: skip
WEIGHTS = {
    "eraser": "adapter/adapter_model.safetensors",
    "retention": "gates/gates.safetensors",
    "retention at once": "gates/gates.safetensors",
    "indexmem": "indexmem/slots.safetensors",
}


@pytest.fixture
def command(roomy, texts):
    """Return the words that train one kind into a folder."""

    def words(kind: str, out: str, *more: str) -> list[object]:
        data = ("--model", roomy, "--dtype", "float32", "--data", texts, "--out", out)
        return ["train", kind.split()[0], *data, *COMMANDS[kind], *more]

    return words


@pytest.fixture
def process(command):
    """Return what trains in a process of its own."""
    run = [sys.executable, "-c", "from vestige.cli.main import main; main()"]
    return lambda *words: [*run, *map(str, command(*words))]


def curve(folder: str) -> list[tuple[float, ...]]:
    """Return what each step of a run came to, its clock left out; what did not learn yet counts as -1."""
    return [
        tuple(-1.0 if x is None else x for name, x in record.items() if name not in ("seconds", "validation"))
        for record in read(folder)
    ]


@pytest.mark.parametrize("kind", COMMANDS)
def test_two_processes_come_to_the_losses_of_one(process, place, kind):
    pytest.importorskip("accelerate")
    for count, out in ((1, "one"), (2, "two")):
        for done in launched(process(kind, out), count):
            assert done.returncode == 0, done.stderr
    one, two = curve(place / "one"), curve(place / "two")
    assert len(one) == len(two) == 3
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_that_was_gone_on_with_has_the_bits_of_one_that_went_through(process, place, kind):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(process(kind, "through"), env=env, check=True, capture_output=True)
    shutil.copytree("through", "killed")
    shutil.rmtree("killed/step-00000003")  # as if killed in the last step, where what was learnt alone is behind it
    shutil.rmtree(f"killed/{WEIGHTS[kind].split('/')[0]}")
    subprocess.run(process(kind, "killed", "--resume"), env=env, check=True, capture_output=True)
    assert curve(place / "killed") == curve(place / "through")
    files = sorted((place / "through" / WEIGHTS[kind]).parent.glob("*.safetensors"))
    assert len(files) == (3 if kind == "indexmem" else 1)
    for file in files:
        weights, others = load_file(file), load_file(place / "killed" / file.relative_to(place / "through"))
        assert all(weights[name].equal(others[name]) for name in weights)


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("eraser", "lr", "0.5"),
        ("retention", "bias", "3"),
        ("retention", "dtype", "bfloat16"),
        ("indexmem", "width", "9"),
    ],
)
def test_a_finished_run_is_not_begun_again_and_other_options_are_refused(vestige, command, place, kind, option, value):
    assert vestige(*command(kind, "made")).code == 0
    before = (place / "made" / WEIGHTS[kind]).read_bytes()
    again = vestige(*command(kind, "made"))
    assert again.code == 2 and "made" in again.err
    assert vestige(*command(kind, "made", "--resume")).code == 0
    assert (place / "made" / WEIGHTS[kind]).read_bytes() == before
    other = vestige(*command(kind, "made", "--resume", f"--{option}", value))
    assert other.code == 2 and option in other.err


def test_an_adapter_can_be_trained_on_from_where_another_one_ended(vestige, command, place):
    assert vestige(*command("eraser", "first")).code == 0
    assert vestige(*command("eraser", "second", "--begin", "first/adapter", "--steps", "1", "--lr", "1e-12")).code == 0
    one, other = (load_file(f"{name}/{WEIGHTS['eraser']}") for name in ("first", "second"))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert any(weight.any() for name, weight in one.items() if "lora_B" in name)
    assert "nowhere is not an adapter" in vestige(*command("eraser", "third", "--begin", "nowhere")).complaint()
