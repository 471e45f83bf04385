"""The training loop of every trainer: AdamW on the fp32 parameters of a :class:`Task`, resumable bit for bit.

:mod:`examples.train_flat` is the same loop in one function, without checkpoints, processes and checks.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from vestige.errors import InputError, VestigeError
from vestige.training.checkpoint import Checkpoints, State
from vestige.training.config import LoopConfig
from vestige.training.distributed import Processes
from vestige.training.metrics import Metrics, Record
from vestige.training.optimizer import adamw, gather_gradients, moments, restore
from vestige.training.sampler import derive_seed, find_sample_index
from vestige.training.signals import StopSignals
from vestige.training.task import LOSS, TOKENS, Task, check_parts, find_trainable_parameters, finite_or_none

OnStep = Callable[[int, int, Record], None]
"""Called after every step with the number of steps done, the number of all steps, and the step's record."""
Parts = dict[str, float]


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
    checkpoints = Checkpoints(folder, {"task": task.identity(), "config": config.metadata()})
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
        self.optimizer = adamw(self.parameters, config)
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
        restore(self.optimizer, self.parameters, state, self.saved)
        self.step, self.rng = state.step, state.rng
        torch.set_rng_state(state.rng)

    def run_step(self) -> Record | None:
        """Do a step and return its record; None, with unchanged parameters, if a stop was requested."""
        started = time.perf_counter()
        parts = self._accumulate()
        if parts is None:
            return None
        lr, norm = self.config.lr_at(self.step), self._clip()
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
            inner = moments(self.optimizer, self.parameters)
            self.checkpoints.save(State(step=self.step, weights=self.parameters, moments=inner, rng=self.rng))
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
        gather_gradients(self.parameters, self.world, first=self.step == 0)
        named = zip(sums, values, strict=True)
        return {name: value if name == TOKENS else value / self.config.batch for name, value in named}

    def _backward(self, position: int) -> dict[str, Float[Tensor, ""]]:
        torch.manual_seed(derive_seed(self.config.seed, "sample", position))
        parts = check_parts(self.task.loss(find_sample_index(self.config.seed, position, self.task.num_samples)))
        (parts[LOSS] / self.config.batch).backward()
        named = sorted(parts, key=lambda name: (name != LOSS, name))  # the same order in every process
        return {name: parts[name].detach().to(parts[LOSS].device, torch.float32) for name in named}

    def _clip(self) -> float:
        """Clip the gradient and return its norm before clipping."""
        limit = math.inf if self.config.clip is None else self.config.clip
        return float(clip_grad_norm_(self.parameters.values(), limit))

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
