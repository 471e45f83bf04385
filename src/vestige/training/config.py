"""How long and how fast: the options of a training run, all of which a resumed run must share."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from vestige.errors import InputError, unknown_name_message

SCHEDULES = ("cosine", "wsd", "constant")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Options of the loop.

    Raises:
        InputError: An unknown schedule, or a number out of range.
    """

    steps: int
    """Updates of the parameters."""
    batch: int = 8
    """Samples of a step, over all processes: one at a time, gradients accumulated."""
    lr: float = 1e-3
    """Learning rate after the warm-up."""
    warmup: int = 0
    """Steps in which it rises in equal parts."""
    schedule: str = "cosine"
    """What follows: half a cosine, the same until ``decay`` is left and then a line ("wsd"), or the same to the end."""
    decay: float = 0.2
    """Share of all steps that "wsd" ends with."""
    final: float = 0.0
    """Share of ``lr`` that the schedule comes down to."""
    weight_decay: float = 0.01
    """AdamW's, decoupled; not on parameters of one dimension (biases, norms)."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    """Largest norm of the whole gradient; None leaves it as it is."""
    seed: int = 0
    """Everything that is drawn follows from it."""
    validate_every: int | None = None
    """Steps between two validations; there is one at the end in any case."""
    save_every: int = 100
    """Steps between two checkpoints; there is one at the end in any case."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(unknown_name_message("schedule", self.schedule, SCHEDULES))
        for name, least in (("steps", 1), ("batch", 1), ("warmup", 0), ("save_every", 1), ("validate_every", 1)):
            value = getattr(self, name)
            if not ((type(value) is int and value >= least) or (value is None and name == "validate_every")):
                raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.warmup > self.steps:
            raise InputError(f"warmup must not exceed steps, got {self.warmup} and {self.steps}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not ((value is None and name == "clip") or (value is not None and 0 < value < math.inf)):
                raise InputError(f"{name} must be a number above 0, got {value!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must not be negative, got {self.weight_decay!r}")
        for name in ("decay", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must lie in [0, 1), got {self.betas}")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of an update, the first of which is step 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * (self.final + (1 - self.final) * self._height(step))

    def _height(self, step: int) -> float:
        """Return how far the schedule is from its end, from 1 to 0, at a step after the warm-up."""
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))) / 2
        falling = min(self.steps - self.warmup, round(self.decay * self.steps))
        return min(1.0, (self.steps - step) / (falling + 1))

    def validates(self, done: int) -> bool:
        """Tell whether there is a validation once so many steps are done."""
        return done == self.steps or (self.validate_every is not None and done % self.validate_every == 0)

    def saves(self, done: int) -> bool:
        """Tell whether there is a checkpoint once so many steps are done."""
        return done == self.steps or done % self.save_every == 0

    def metadata(self) -> dict[str, Any]:
        """Return what must not change when a run goes on."""
        return asdict(self)
