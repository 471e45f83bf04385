"""Several processes: the same as one, or a clear error."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import launched
from tests.training.worker import CONFIG, Points, run, trained
from vestige import InputError
from vestige.training import distributed as parallels
from vestige.training.distributed import Processes, find_processes
from vestige.training.loop import train
from vestige.training.metrics import read

WORKER = Path(__file__).parent / "worker.py"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in parallels.SIZES:
        monkeypatch.delenv(name, raising=False)


def test_two_processes_come_to_the_losses_and_weights_of_one(tmp_path):
    pytest.importorskip("accelerate")
    one = trained(tmp_path / "one")
    for done in launched([sys.executable, WORKER, tmp_path / "two"], 2):
        assert done.returncode == 0, done.stderr
    curves = [[(r["loss"], r["error"], r["grad_norm"]) for r in read(tmp_path / name)] for name in ("one", "two")]
    assert len(curves[0]) == len(curves[1]) == CONFIG.steps
    for ours, theirs in zip(*curves, strict=True):
        assert theirs == pytest.approx(ours, abs=1e-6)
    tokens = [[record["tokens"] for record in read(tmp_path / name)] for name in ("one", "two")]
    assert tokens[0] == tokens[1]
    weights = load_file(tmp_path / "two" / "step-00000012" / "weights.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, one.weights()[name], rtol=0, atol=1e-6)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["metrics.jsonl", "step-00000009", "step-00000012"]


def test_a_process_alone_is_all_there_are_and_changes_nothing():
    one = find_processes()
    tensor = torch.ones(2)
    one.barrier()
    one.all_reduce([tensor])
    one.broadcast([tensor])
    assert one == Processes() and one.main and tensor.tolist() == [1, 1] and list(one.share(3)) == [0, 1, 2]


def test_shares_cover_a_batch_without_overlap():
    shares = [list(Processes(index=i, count=3).share(6)) for i in range(3)]
    assert shares == [[0, 3], [1, 4], [2, 5]]
    assert [Processes(index=i, count=3).main for i in range(3)] == [True, False, False]


def test_a_batch_that_processes_cannot_share_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="batch 4 cannot be shared by 3 processes; use a multiple of 3"):
        train(Points(), CONFIG, tmp_path / "run", world=Processes(count=3))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", parallels.SIZES)
def test_without_accelerate_several_processes_are_refused_with_the_pip_line(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv(name, "2")
    with pytest.raises(InputError, match=r'needs accelerate: pip install "vestige\[train\]"'):
        find_processes()


def test_one_process_needs_no_accelerate(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(tmp_path, Points()).finished
