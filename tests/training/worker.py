"""A task small enough to train in milliseconds, and a script that trains it: to be killed, or to be one of several.

``python worker.py FOLDER [--die-at CALL]``; what launchers put into the environment says who the others are.
"""

import argparse
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vestige.training.config import LoopConfig
from vestige.training.distributed import find_processes
from vestige.training.loop import Outcome, train

CONFIG = LoopConfig(steps=12, batch=4, lr=0.05, warmup=3, validate_every=4, save_every=3, seed=5)
SAMPLES = 10
"""Fewer than three steps' worth: epochs end within steps."""


class Points:
    """Fit points with a frozen bf16 layer and a trained fp32 one, behind dropout that draws from torch's numbers."""

    def __init__(self, *, num_samples: int | None = SAMPLES, before: Callable[[int], None] = lambda call: None) -> None:
        generator = torch.Generator().manual_seed(1)
        base = nn.Linear(4, 8, dtype=torch.bfloat16).requires_grad_(False)
        self.module = nn.Sequential(base, nn.Dropout(0.2), nn.Linear(8, 3))
        for parameter in self.module.parameters():
            with torch.no_grad():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.points = torch.randn(50, 4, generator=generator, dtype=torch.bfloat16)
        self.targets = torch.randn(50, 3, generator=generator)
        self.num_samples = num_samples
        self.before = before
        """Is told how many samples came before, to do what may come between."""
        self.indices: list[int] = []

    def loss(self, index: int) -> Mapping[str, Tensor]:
        self.before(len(self.indices))
        self.indices.append(index)
        said = self._answer(index % 50)
        error = (said - self.targets[index % 50]).square().mean()
        size = said.square().mean()
        return {"size": size, "error": error, "loss": error + 0.1 * size, "tokens": torch.tensor(index + 1)}

    def validate(self) -> Mapping[str, float]:
        assert not torch.is_grad_enabled() and not self.module.training
        return {"error": float((self._answer(slice(20, 50)) - self.targets[20:]).square().mean())}

    def identity(self) -> Mapping[str, Any]:
        return {"kind": "points", "sizes": (4, 8, 3)}

    def weights(self) -> dict[str, Tensor]:
        """Return copies of all parameters and of the frozen layer."""
        return {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}

    def _answer(self, which: int | slice) -> Tensor:
        base, rest = self.module[0], self.module[1:]
        return rest(base(self.points[which]).float())


def trained(folder: Path, task: Points | None = None, config: LoopConfig = CONFIG, **options: Any) -> Points:
    """Return a task after training, to the end."""
    task = task or Points()
    assert run(folder, task, config, **options).finished
    return task


def run(folder: Path, task: Points, config: LoopConfig = CONFIG, **options: Any) -> Outcome:
    """Train with this process among those that there are."""
    return train(task, config, folder, world=find_processes(), **options)


def at(call: int, do: Callable[[], object]) -> Callable[[int], None]:
    """Return something for ``before`` that does one thing once."""
    return lambda count: do() if count == call else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--die-at", type=int, default=-1)
    options = parser.parse_args()
    task = Points(before=at(options.die_at, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    if os.environ.get("RANK") == "1":
        nn.init.zeros_(task.module[2].weight)  # must not matter: all begin with the main process's weights
    run(options.folder, task)
