"""The training loop of every trainer: AdamW on the fp32 parameters of a :class:`Task`, resumable bit for bit.

:mod:`examples.train_flat` is the same loop in one function, without checkpoints, processes and checks.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from vestige.errors import InputError, VestigeError
from vestige.training.checkpoint import Checkpoints, State
from vestige.training.config import LoopConfig
from vestige.training.distributed import Processes
from vestige.training.metrics import Metrics, Record
from vestige.training.sampler import derive_seed, find_sample_index
from vestige.training.task import LOSS, TOKENS, Task, check_parts, find_trainable_parameters, finite_or_none

OnStep = Callable[[int, int, Record], None]
"""Called after every step with the number of steps done, the number of all steps, and the step's record."""
Parts = dict[str, float]
Parameters = Mapping[str, nn.Parameter]
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a run; the weights are in the task's module."""

    step: int
    """Steps done."""
    finished: bool
    """Whether all steps are done; if not, a signal stopped the run, and it can be resumed."""
    checkpoint: Path
    """The newest checkpoint."""


def train(
    task: Task,
    config: LoopConfig,
    folder: Path,
    *,
    resume: bool = False,
    world: Processes | None = None,
    on_step: OnStep | None = None,
) -> Outcome:
    """Train a task and return the outcome; the first Ctrl-C or SIGTERM stops the run with a checkpoint.

    A resumed run ends with the same bits as an uninterrupted one, given as many processes of the same kind and a task
    with deterministic arithmetic. The loop seeds torch's global random numbers before every sample.

    Args:
        task: Its parameters change in place; a resumed run starts with the checkpoint's.
        config: A resumed run must have the same one.
        folder: Holds the checkpoints and ``metrics.jsonl``; new or empty, unless ``resume``.
        resume: Continue from the newest checkpoint, if there is one.
        world: From :func:`~vestige.training.distributed.find_processes`; only the main process writes.
        on_step: Called after every step in the main process.

    Raises:
        InputError: The folder, the task or a checkpoint cannot be used, or no gradient reaches a parameter.
        VestigeError: A loss or gradient is not finite; the message has the path of the last checkpoint.
    """
    world = world or Processes()
    world.check(config.batch)
    if task.num_samples is not None and task.num_samples < 1:
        raise InputError("the task has no samples")
    checkpoints = Checkpoints(folder, {"task": task.identity(), "config": asdict(config)})
    checkpoints.check(resume=resume)
    run = _Run(task, config, checkpoints, world)
    run.start(checkpoints.load() if resume else None)
    metrics = Metrics(folder, run.step) if world.main else None
    task.module.train()
    try:
        with StopSignals() as run.signals:
            while run.step < config.steps and (record := run.run_step()):
                if metrics:
                    metrics.append(record)
                if config.saves(run.step):
                    run.save()
                if on_step and world.main:
                    on_step(run.step, config.steps, record)
            return Outcome(step=run.step, finished=run.step == config.steps, checkpoint=run.save())
    finally:
        if metrics:
            metrics.close()


class _Run:
    """The parameters, optimizer and step of a run."""

    def __init__(self, task: Task, config: LoopConfig, checkpoints: Checkpoints, world: Processes) -> None:
        self.task, self.config, self.checkpoints, self.world = task, config, checkpoints, world
        self.parameters = find_trainable_parameters(task.module)
        self.optimizer = _make_adamw(self.parameters, config)
        self.step = 0
        self.signals = StopSignals()
        self.saved: Path | None = None
        self.rng = torch.get_rng_state()

    def start(self, state: State | None) -> None:
        """Restore a checkpoint, or write the first one: a run that dies early restarts with the same weights."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self.world.barrier()  # until all processes have looked for checkpoints
        if state is None:
            self.world.broadcast(self.parameters.values())
            self.save()
            return
        self.saved = self.checkpoints.path(state.step)
        _restore(self.optimizer, self.parameters, state, self.saved)
        self.step, self.rng = state.step, state.rng
        torch.set_rng_state(state.rng)

    def run_step(self) -> Record | None:
        """Do a step and return its record; None, with unchanged parameters, if a stop was requested."""
        started = time.perf_counter()
        parts = self._accumulate()
        if parts is None:
            return None
        lr = self.config.lr_at(self.step)
        limit = math.inf if self.config.clip is None else self.config.clip
        norm = float(clip_grad_norm_(self.parameters.values(), limit))  # before clipping
        self._require_finite(parts[LOSS], norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        figures = {name: int(value) if name == TOKENS else finite_or_none(value) for name, value in parts.items()}
        record: dict[str, Any] = {"step": self.step, **figures, "lr": lr, "grad_norm": norm}
        if self.config.validates(self.step):
            record["validation"] = self._validate()
        record["seconds"] = round(time.perf_counter() - started, 3)
        self.rng = torch.get_rng_state()
        return record

    def save(self) -> Path:
        """Write a checkpoint of this step, unless it exists; return its path."""
        path = self.checkpoints.path(self.step)
        if self.saved != path and self.world.main:
            moments = _name_moments(self.optimizer, self.parameters)
            self.checkpoints.save(State(step=self.step, weights=self.parameters, moments=moments, rng=self.rng))
        self.saved = path
        return path

    def _accumulate(self) -> Parts | None:
        """Accumulate the gradients of a step and return the parts of its loss; None if a stop was requested."""
        sums: dict[str, Tensor] = {}
        for place in self.world.share(self.config.batch):
            parts = self._backward(self.step * self.config.batch + place)
            if sums and sums.keys() != parts.keys():
                raise InputError(f"the loss had parts {', '.join(sums)} and now has {', '.join(parts)}")
            sums = {name: sums[name] + part if sums else part for name, part in parts.items()}
            if self.signals.requested:
                break
        totals = torch.stack([*sums.values(), torch.full_like(sums[LOSS], self.signals.requested)])
        self.world.all_reduce([totals])
        *values, stopped = totals.tolist()
        if stopped:  # in any process
            return None
        if self.step == 0:
            _require_gradients(self.parameters, self.world)
        for parameter in self.parameters.values():
            if parameter.grad is None:  # AdamW would skip it in this process but not in others
                parameter.grad = torch.zeros_like(parameter)
        self.world.all_reduce([p.grad for p in self.parameters.values() if p.grad is not None])
        named = zip(sums, values, strict=True)
        return {name: value if name == TOKENS else value / self.config.batch for name, value in named}

    def _backward(self, position: int) -> dict[str, Float[Tensor, ""]]:
        torch.manual_seed(derive_seed(self.config.seed, "sample", position))
        parts = check_parts(self.task.loss(find_sample_index(self.config.seed, position, self.task.num_samples)))
        (parts[LOSS] / self.config.batch).backward()
        named = sorted(parts, key=lambda name: (name != LOSS, name))  # the same order in every process
        return {name: parts[name].detach().to(parts[LOSS].device, torch.float32) for name in named}

    def _require_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        raise VestigeError(f"step {self.step + 1}: {what}; the last good checkpoint is {self.saved}")

    def _validate(self) -> dict[str, float | None]:
        torch.manual_seed(derive_seed(self.config.seed, "validation"))
        self.task.module.eval()
        with torch.no_grad():
            figures = {name: finite_or_none(float(value)) for name, value in self.task.validate().items()}
        self.task.module.train()
        return figures


class StopSignals:
    """While entered, the first Ctrl-C or SIGTERM sets ``requested``; the second one has its usual effect.

    Outside the main thread, where Python handles no signals, the flag is never set.
    """

    def __init__(self) -> None:
        self.requested = False
        self._usual = ExitStack()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._usual.callback(signal.signal, number, signal.signal(number, self._request))
        return self

    def __exit__(self, *error: object) -> None:
        self._usual.close()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._usual.close()


def _make_adamw(parameters: Parameters, config: LoopConfig) -> AdamW:
    """Return an optimizer with weight decay on parameters of two or more dimensions: not on biases and norms."""
    deep = [p for p in parameters.values() if p.ndim >= 2]
    flat = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": deep, "weight_decay": config.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)


def _require_gradients(parameters: Parameters, world: Processes) -> None:
    """Raise an InputError unless every parameter has a gradient in some process."""
    device = next(iter(parameters.values())).device
    reached = torch.tensor([float(p.grad is not None) for p in parameters.values()], device=device)
    world.all_reduce([reached])
    missed = [name for name, count in zip(parameters, reached.tolist(), strict=True) if not count]
    if missed:
        raise InputError(
            f"no gradient reached {len(missed)} of {len(parameters)} parameters in the first step, "
            f"{missed[0]} among them; freeze what does not take part"
        )


def _name_moments(optimizer: AdamW, parameters: Parameters) -> dict[str, Tensor]:
    """Return the moments by name, as in a :class:`State`; empty before the first step."""
    state = optimizer.state
    return {f"{kind}/{name}": state[p][kind] for kind in MOMENTS for name, p in parameters.items() if p in state}


def _restore(optimizer: AdamW, parameters: Parameters, state: State, path: Path) -> None:
    """Set parameters and moments to those of a checkpoint.

    Raises:
        InputError: The checkpoint has other parameters or shapes; nothing is changed.
    """
    for name in dict.fromkeys([*parameters, *state.weights]):
        was, now = (tuple(x[name].shape) if name in x else "none" for x in (state.weights, parameters))
        if was != now:
            raise InputError(f"{path} has shape {was} for {name}, the task has {now}")
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(state.weights[name])
        if state.step:
            # Every parameter had a gradient in every step, so its own count is the run's.
            own = {kind: state.moments[f"{kind}/{name}"].to(parameter.device) for kind in MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(state.step)), **own}
