"""The loop: what it steps over, what it tells, what it refuses, and that a run goes on bit for bit."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.training.worker import CONFIG, SAMPLES, Points, at, run, trained
from vestige import InputError, VestigeError
from vestige.testing import tiny
from vestige.training import loop as loops
from vestige.training.config import LoopConfig
from vestige.training.loop import train
from vestige.training.metrics import read


def same(one: Points, other: Points) -> bool:
    pairs = zip(one.weights().items(), other.weights().items(), strict=True)
    return all(a == b and x.equal(y) for (a, x), (b, y) in pairs)


def told(folder: Path) -> list[dict]:
    """Return the records without times."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Points, Path]:
    """Return a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return trained(folder), folder


def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(whole):
    task, folder = whole
    fresh = Points()
    assert task.module[0].weight.equal(fresh.module[0].weight) and task.module[0].weight.dtype == torch.bfloat16
    assert not task.module[2].weight.equal(fresh.module[2].weight)
    figures = [record["validation"]["error"] for record in read(folder) if "validation" in record]
    fresh.module.eval()
    with torch.no_grad():
        assert figures[-1] < fresh.validate()["error"]


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(whole):
    indices = whole[0].indices
    assert len(indices) == CONFIG.steps * CONFIG.batch
    epochs = [indices[i : i + SAMPLES] for i in range(0, 40, SAMPLES)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_a_stream_is_read_in_its_own_order(tmp_path):
    assert trained(tmp_path, Points(num_samples=None)).indices == list(range(48))


def test_a_step_is_adamw_on_the_mean_of_its_samples_without_decay_of_biases(tmp_path):
    config = LoopConfig(steps=1, batch=3, lr=0.1, weight_decay=0.5, clip=0.01, schedule="constant")
    task, twin = Points(), Points()
    task.module[1].p = twin.module[1].p = 0.0
    trained(tmp_path, task, config)
    losses = [twin.loss(i)["loss"] for i in task.indices]
    (sum(losses) / 3).backward()
    gradients = [p.grad for p in twin.module[2].parameters()]
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    record, mean = read(tmp_path)[0], float(sum(losses).detach()) / 3
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5) and record["loss"] == pytest.approx(mean, rel=1e-5)
    assert norm > 0.01, "else nothing is clipped"
    for name, decay in (("weight", 0.5), ("bias", 0.0)):
        old = getattr(twin.module[2], name)
        grad = old.grad * 0.01 / norm
        new = old * (1 - 0.1 * decay) - 0.1 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(getattr(task.module[2], name), new, rtol=1e-4, atol=1e-5)


def test_a_record_has_parts_rate_norm_time_and_tokens_one_line_a_step(whole):
    records = [json.loads(line) for line in (whole[1] / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 13))
    for i, record in enumerate(records):
        wanted = {"step", "loss", "error", "size", "tokens", "lr", "grad_norm", "seconds"}
        assert {*record} == wanted | ({"validation"} if record["step"] in (4, 8, 12) else set())
        assert record["loss"] == pytest.approx(record["error"] + 0.1 * record["size"], rel=1e-5)
        assert record["lr"] == CONFIG.lr_at(i) and record["seconds"] >= 0
        assert record["tokens"] == sum(n + 1 for n in whole[0].indices[4 * i : 4 * i + 4])


def test_the_caller_hears_of_every_step(tmp_path):
    heard = []
    trained(tmp_path, on_step=lambda done, total, record: heard.append((done, total, dict(record))))
    assert [(done, total) for done, total, _ in heard] == [(n, 12) for n in range(1, 13)]
    assert [record for _, _, record in heard] == read(tmp_path)


def test_a_run_killed_dead_goes_on_to_the_same_bits(whole, tmp_path):
    script = [sys.executable, Path(__file__).parent / "worker.py", tmp_path, "--die-at", "30"]
    done = subprocess.run(script, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000006"]
    assert [record["step"] for record in read(tmp_path)] == list(range(1, 8))  # one more than will be kept
    task = trained(tmp_path, resume=True)
    assert same(task, whole[0]) and told(tmp_path) == told(whole[1])
    assert len(task.indices) == (12 - 6) * 4
    for name in ("weights", "optimizer"):
        paths = (folder / "step-00000012" / f"{name}.safetensors" for folder in (tmp_path, whole[1]))
        first, second = map(load_file, paths)
        assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("call", [0, 17, 47])
def test_a_signal_ends_a_run_with_a_checkpoint_that_goes_on_to_the_same_bits(whole, tmp_path, number, call):
    before = signal.getsignal(number)
    result = run(tmp_path, Points(before=at(call, lambda: os.kill(os.getpid(), number))))
    assert not result.finished and result.step == call // 4
    assert result.checkpoint == tmp_path / f"step-{call // 4:08d}" and result.checkpoint.is_dir()
    assert signal.getsignal(number) is before
    assert same(trained(tmp_path, resume=True), whole[0]) and told(tmp_path) == told(whole[1])


def test_the_second_ctrl_c_is_the_usual_one(tmp_path):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, Points(before=at(20, twice)))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)


def test_a_run_in_a_thread_of_its_own_needs_no_signals(whole, tmp_path):
    made: list[Points] = []
    thread = threading.Thread(target=lambda: made.append(trained(tmp_path)))
    thread.start()
    thread.join()
    assert same(made[0], whole[0])


def test_a_run_that_died_before_its_first_step_begins_with_the_same_weights(whole, tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, Points(before=at(0, lambda: 1 / 0)))
    task = Points()
    nn.init.zeros_(task.module[2].weight)  # as if it were drawn anew
    assert same(trained(tmp_path, task, resume=True), whole[0])


def test_resuming_a_finished_run_does_nothing_but_load(whole):
    task, heard = Points(), []
    result = run(whole[1], task, resume=True, on_step=lambda *words: heard.append(words))
    assert result.finished and result.step == 12 and same(task, whole[0]) and task.indices == heard == []


def test_resuming_where_nothing_is_begins(whole, tmp_path):
    assert same(trained(tmp_path / "new", resume=True), whole[0])


def test_how_often_is_saved_and_validated_changes_no_bit(whole, tmp_path):
    config = replace(CONFIG, save_every=100, validate_every=None)
    assert same(trained(tmp_path, config=config), whole[0])
    assert ["validation" in record for record in read(tmp_path)] == [False] * 11 + [True]


def test_what_the_caller_drew_before_changes_no_bit(whole, tmp_path):
    torch.manual_seed(99)
    assert same(trained(tmp_path), whole[0])


def test_another_seed_gives_another_order(whole, tmp_path):
    assert trained(tmp_path, config=replace(CONFIG, seed=6)).indices != whole[0].indices


class Broken(Points):
    """Points whose loss is not what it should be from some call on."""

    def __init__(self, change, call: int = 0) -> None:
        super().__init__()
        self.change, self.call = change, call

    def loss(self, index: int):
        parts = super().loss(index)
        return self.change(dict(parts)) if len(self.indices) > self.call else parts


def bad_gradient(parts):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad * math.inf

    return parts | {"loss": Bad.apply(parts["loss"])}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts | {"loss": parts["loss"] * math.nan}, "the loss is nan"),
        (lambda parts: parts | {"loss": parts["loss"] + math.inf}, "the loss is inf"),
        (bad_gradient, r"the norm of the gradient is (nan|inf)"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_stops_and_keeps_the_last_checkpoint(whole, tmp_path, change, words):
    task = Broken(change, call=4 * 4 + 2)
    with pytest.raises(VestigeError, match=rf"^step 5: {words}; the last good checkpoint is \S+step-00000003$"):
        run(tmp_path, task)
    assert [record["step"] for record in read(tmp_path)] == [1, 2, 3, 4]
    assert all(weight.isfinite().all() for weight in task.weights().values())
    assert same(trained(tmp_path, resume=True), whole[0])


def test_a_part_that_is_not_finite_is_null_and_stops_nothing(tmp_path):
    trained(tmp_path, Broken(lambda parts: parts | {"size": parts["size"] * math.nan}))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 12 and all('"size": null' in line for line in lines)


def test_a_parameter_that_no_gradient_reaches_is_an_error_in_the_first_step(tmp_path):
    task = Points()
    task.module.append(nn.Linear(3, 3))
    task._answer = lambda which: task.module[2](task.module[0](task.points[which]).float())
    with pytest.raises(InputError, match=r"^no gradient reached 2 of 4 parameters in the first step, 3.weight among"):
        run(tmp_path, task)
    assert read(tmp_path) == []


class Seldom(Points):
    """Points with a parameter that some steps pass over, after the first."""

    def __init__(self, **options) -> None:
        super().__init__(**options, num_samples=None)
        self.module.register_parameter("shift", nn.Parameter(torch.ones(3)))

    def loss(self, index: int):
        parts = super().loss(index)
        return parts if index // 4 % 3 else parts | {"loss": parts["loss"] + self.module.shift.square().sum()}


def test_a_parameter_that_some_steps_pass_over_is_resumed_to_the_same_bits(tmp_path):
    task = trained(tmp_path / "whole", Seldom())
    result = run(tmp_path / "run", Seldom(before=at(17, lambda: os.kill(os.getpid(), signal.SIGTERM))))
    assert result.step == 4
    assert same(trained(tmp_path / "run", Seldom(), resume=True), task)
    assert not task.module.shift.equal(torch.ones(3))


def test_a_validation_that_is_not_finite_is_null(tmp_path, monkeypatch):
    monkeypatch.setattr(Points, "validate", lambda self: {"error": math.nan, "size": 1})
    trained(tmp_path)
    assert read(tmp_path)[-1]["validation"] == {"error": None, "size": 1.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: {"error": parts["error"]}, "must return a part named 'loss', got error"),
        (lambda parts: parts | {"loss": parts["loss"].detach()}, "depends on no parameter that is trained"),
        (lambda parts: parts | {"size": torch.ones(2)}, r"part 'size' .* got torch.float32 of shape \(2,\)"),
        (lambda parts: parts | {"size": torch.tensor(1)}, r"part 'size' .* got torch.int64 of shape \(\)"),
    ],
)
def test_a_loss_of_the_wrong_kind_is_refused(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        run(tmp_path, Broken(change))


def test_parts_that_come_and_go_are_refused(tmp_path):
    with pytest.raises(
        InputError, match="the loss had parts loss, error, size, tokens and now has loss, error, tokens"
    ):
        run(tmp_path, Broken(lambda parts: {k: v for k, v in parts.items() if k != "size"}, call=2))


def test_a_module_without_or_with_low_precision_trainables_is_refused(tmp_path):
    frozen, low = Points(), Points()
    frozen.module.requires_grad_(False)
    low.module[2].bfloat16()
    with pytest.raises(InputError, match="Sequential has no parameter that requires gradients"):
        run(tmp_path / "a", frozen)
    with pytest.raises(InputError, match="must be float32, but 2.weight is torch.bfloat16"):
        run(tmp_path / "b", low)
    with pytest.raises(InputError, match="the task has no samples"):
        run(tmp_path / "c", Points(num_samples=0))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_on_a_model_in_bf16_trains_and_leaves_the_model_alone(tmp_path):
    class Head:
        """Bend the output of a frozen language model."""

        num_samples = None

        def __init__(self) -> None:
            self.base = tiny("llama", dtype=torch.bfloat16).requires_grad_(False)
            self.module = nn.Linear(128, 128)

        def loss(self, index: int):
            ids = torch.randint(1, 100, (1, 8))
            logits = self.module(self.base(ids).logits.float())
            return {"loss": nn.functional.cross_entropy(logits[0], ids[0])}

        def validate(self):
            return {}

        def identity(self):
            return {}

    task = Head()
    before = {name: parameter.clone() for name, parameter in task.base.named_parameters()}
    train(task, LoopConfig(steps=6, batch=2, lr=0.01), tmp_path)
    assert all(before[name].equal(parameter) for name, parameter in task.base.named_parameters())
    losses = [record["loss"] for record in read(tmp_path)]
    assert losses[-1] < losses[0] and "tokens" not in read(tmp_path)[0]


def test_only_the_main_process_writes_and_tells(tmp_path, monkeypatch):
    second = loops.Processes(index=1, count=2)
    for name in ("barrier", "all_reduce", "broadcast"):
        monkeypatch.setattr(loops.Processes, name, lambda self, tensors=(): None)
    heard: list[object] = []
    task = Points()
    train(task, CONFIG, tmp_path / "run", world=second, on_step=lambda *words: heard.append(words))
    assert heard == [] and not (tmp_path / "run").exists() and len(task.indices) == 24
