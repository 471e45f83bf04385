"""Checkpoints and metrics on disk: what a kill, damage, another task and a full disk leave."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.worker import CONFIG, Points, run, trained
from vestige import InputError
from vestige.training import checkpoint as checkpoints
from vestige.training.checkpoint import Checkpoints, State
from vestige.training.metrics import Metrics, read


def state(step: int, **changes) -> State:
    made = State(step=step, weights={"w": torch.ones(2)}, moments={}, rng=torch.get_rng_state())
    return replace(made, **changes)


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a finished run."""
    trained(tmp_path / "run")
    return tmp_path / "run"


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_last_two_are_kept_and_hold_tensors_and_json_only(folder):
    assert names(folder) == ["metrics.jsonl", "step-00000009", "step-00000012"]
    for path in folder.glob("step-*"):
        assert names(path) == ["checkpoint.json", "optimizer.safetensors", "weights.safetensors"]
        assert path.stat().st_mode & 0o777 == 0o755
        assert all(file.stat().st_mode & 0o777 == 0o644 for file in path.iterdir())
    inner = load_file(folder / "step-00000012" / "optimizer.safetensors")
    moments = {f"{kind}/2.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in ("weight", "bias")}
    assert inner.keys() == moments | {"rng"} and inner["rng"].dtype == torch.uint8
    assert load_file(folder / "step-00000012" / "weights.safetensors").keys() == {"2.weight", "2.bias"}
    books = json.loads((folder / "step-00000012" / "checkpoint.json").read_text())
    assert books["step"] == 12 and books["config"]["lr"] == CONFIG.lr and books["task"]["sizes"] == [4, 8, 3]


def test_the_random_state_comes_back(folder):
    run(folder, Points(), resume=True)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    run(folder, Points(), resume=True)
    assert drawn.equal(torch.rand(3))


def test_a_state_is_the_same_after_a_save_and_a_load(tmp_path):
    store = Checkpoints(tmp_path, {"task": {}, "config": {}})
    assert store.load() is None and store.newest() is None
    shared = torch.arange(6.0)
    made = state(7, weights={"a": shared.view(2, 3).T, "b": shared[:3]}, moments={"exp_avg/a": torch.randn(3, 2)})
    path = store.save(made)
    again = store.load()
    assert path == store.newest() == tmp_path / "step-00000007" and again.step == 7
    assert all(again.weights[name].equal(made.weights[name]) for name in "ab")
    assert again.moments["exp_avg/a"].equal(made.moments["exp_avg/a"]) and again.rng.equal(made.rng)


def test_a_folder_in_use_needs_resume_and_is_left_alone(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"run exists and is not empty; name a new folder, or go on with --resume"):
        run(folder, Points())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_or_a_file_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="has no checkpoint to go on with"):
        run(tmp_path, Points(), resume=True)
    with pytest.raises(InputError, match="thesis.txt is a file; name a folder for the run"):
        run(tmp_path / "thesis.txt", Points(), resume=True)
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path / "thesis.txt" / "below", Points())
    assert names(tmp_path) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.5}, "was made with config lr 0.05, not 0.5; name a new folder"),
        ({"steps": 13}, "was made with config steps 12, not 13"),
        ({"betas": (0.9, 0.99)}, r"was made with config betas \[0.9, 0.95\], not \[0.9, 0.99\]"),
        ({"seed": 1}, "was made with config seed 5, not 1"),
    ],
)
def test_another_config_is_refused_by_what_differs(folder, changes, words):
    with pytest.raises(InputError, match=rf"^\S+step-00000012 {words}"):
        run(folder, Points(), replace(CONFIG, **changes), resume=True)


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        ({"kind": "lines", "sizes": (4, 8, 3)}, "task kind 'points', not 'lines'"),
        ({"kind": "points"}, r"task sizes \[4, 8, 3\], not None"),
        ({"kind": "points", "sizes": (4, 8, 3), "model": "x"}, "task model None, not 'x'"),
    ],
)
def test_another_task_is_refused_by_what_differs(folder, monkeypatch, identity, words):
    monkeypatch.setattr(Points, "identity", lambda self: identity)
    task = Points()
    before = task.weights()
    with pytest.raises(InputError, match=words):
        run(folder, task, resume=True)
    assert all(before[name].equal(weight) for name, weight in task.weights().items())


def test_an_identity_that_is_no_json_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Points, "identity", lambda self: {"model": object()})
    with pytest.raises(InputError, match="the identity of a task must be JSON values: .*object"):
        run(tmp_path, Points())


def test_other_shapes_are_refused_before_anything_is_changed(folder):
    task = Points()
    task.module[2] = torch.nn.Linear(8, 3, bias=False)
    with pytest.raises(InputError, match=r"has shape \(3,\) for 2.bias, the task has none"):
        run(folder, task, resume=True)


@pytest.mark.parametrize("file", ["checkpoint.json", "weights.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x00" * 400])
def test_a_damaged_checkpoint_is_named_with_the_way_out_which_works(folder, file, content):
    path = folder / "step-00000012"
    (path / file).unlink()
    if content is not None:
        (path / file).write_bytes(content)
    with pytest.raises(InputError, match=r"step-00000012 is damaged \(.*\); remove it to go on from the one before"):
        run(folder, Points(), resume=True)
    for damaged in path.iterdir():
        damaged.unlink()
    path.rmdir()
    assert trained(folder, resume=True).indices and [record["step"] for record in read(folder)] == list(range(1, 13))


def test_a_checkpoint_of_another_format_is_refused(folder):
    path = folder / "step-00000012" / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(InputError, match="has format 99, this version of vestige reads 1"):
        run(folder, Points(), resume=True)


def test_what_a_kill_left_half_written_is_passed_over_and_removed(folder):
    (folder / ".step-abc").mkdir()
    (folder / ".step-abc" / "weights.safetensors").write_bytes(b"half")
    (folder / "step-00000012").rename(folder / ".step-def")
    trained(folder, resume=True)
    assert names(folder) == ["metrics.jsonl", "step-00000009", "step-00000012"]


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(tmp_path, monkeypatch):
    def full(tensors, path) -> None:
        if saved := list(tmp_path.glob("step-00000003")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), saved)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    words = r"cannot write the checkpoint \S+step-00000006: .*No space left.*; the last one is \S+step-00000003"
    with pytest.raises(InputError, match=words):
        run(tmp_path, Points())
    assert names(tmp_path) == ["metrics.jsonl", "step-00000000", "step-00000003"]


def test_lines_behind_a_checkpoint_and_half_lines_go(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert read(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    metrics = Metrics(tmp_path, 2)
    metrics.append({"step": 3, "loss": 0.5})
    metrics.close()
    assert read(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]
    assert read(tmp_path / "nowhere") == []


@pytest.mark.parametrize("line", ["{broken", "[1]", "7", "null", '{"loss": 1}', ""])
def test_a_malformed_line_is_refused_with_its_number_and_left_alone(tmp_path, line):
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match="metrics.jsonl is damaged: line 2 is not a record"):
        Metrics(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == text
