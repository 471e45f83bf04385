"""Options of a training run; a resumed run must have the same ones."""

import math
from dataclasses import dataclass

from vestige.errors import InputError, unknown_name_message

SCHEDULES = ("cosine", "wsd", "constant")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Options of the loop.

    Raises:
        InputError: The schedule is unknown, or a number is out of range.
    """

    steps: int
    """Updates of the parameters."""
    batch: int = 8
    """Samples of a step, over all processes; gradients are accumulated one sample at a time."""
    lr: float = 1e-3
    """Learning rate after the warm-up."""
    warmup: int = 0
    """Steps in which the learning rate rises linearly."""
    schedule: str = "cosine"
    """After the warm-up: half a cosine, "constant", or constant until a linear decay at the end ("wsd")."""
    decay: float = 0.2
    """Share of all steps in which "wsd" decays."""
    final: float = 0.0
    """Share of ``lr`` at which the schedule ends."""
    weight_decay: float = 0.01
    """AdamW's decoupled decay; not for parameters of one dimension (biases, norms)."""
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    """Largest norm of the whole gradient; None does not clip."""
    seed: int = 0
    """Seed of all random choices."""
    validate_every: int | None = None
    """Steps between validations; the last step always has one."""
    save_every: int = 100
    """Steps between checkpoints; the last step always has one."""

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
        """Return the learning rate of a step; the first step is 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * (self.final + (1 - self.final) * self._height(step))

    def _height(self, step: int) -> float:
        """Return the height of the schedule, from 1 to 0, at a step after the warm-up."""
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))) / 2
        falling = min(self.steps - self.warmup, round(self.decay * self.steps))
        return min(1.0, (self.steps - step) / (falling + 1))

    def validates(self, done: int) -> bool:
        """Return whether a validation follows when ``done`` steps are done."""
        return done == self.steps or (self.validate_every is not None and done % self.validate_every == 0)

    def saves(self, done: int) -> bool:
        """Return whether a checkpoint follows when ``done`` steps are done."""
        return done == self.steps or done % self.save_every == 0
