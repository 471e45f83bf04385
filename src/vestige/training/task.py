"""What a trainer brings to the loop, and what the loop demands of it."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from vestige.errors import InputError
from vestige.models.anatomy import check

LOSS, TOKENS = "loss", "tokens"
"""The part that is minimised, and the one that is counted and not averaged."""


@runtime_checkable
class Task(Protocol):
    """Something that can be learned: parameters, and a loss for each sample.

    It keeps no state beside the trainable parameters. What ``loss`` returns follows from them, from the index and from
    torch's global random numbers, which the loop seeds before every call: that is why a step number is all that a
    checkpoint must know of the data, and why any number of processes see the same samples.
    """

    @property
    def module(self) -> nn.Module:
        """What is trained: its parameters that require gradients, in float32. Others stay as they are, in any dtype.

        The loop puts it in training mode, and in evaluation mode to validate.
        """

    @property
    def num_samples(self) -> int | None:
        """Samples of an epoch, which the loop shuffles for each; None is a stream without end, in its own order."""

    def loss(self, index: int) -> Mapping[str, Tensor]:
        """Prepare one sample and return named scalars of it, the same names each time.

        ``"loss"`` is minimised, ``"tokens"``, if there, is added up; the others are parts to look at.

        Args:
            index: Below ``num_samples``; of a stream, the number of samples before this one.
        """

    def validate(self) -> Mapping[str, float]:
        """Return figures on data that is not trained on. Called without gradients, seeded alike each time.

        Every process computes all of them.
        """

    def identity(self) -> Mapping[str, Any]:
        """Return what a checkpoint must have in common with this task to be gone on with, as JSON values.

        Name what cannot be seen in the parameters: model id, config hash, data, sizes.
        """


def model_identity(model: PreTrainedModel) -> dict[str, str]:
    """Return the part of an identity that says which model is read: its weights, and the dtype it computes in."""
    return {"model": check(model).fingerprint(), "dtype": str(model.dtype)}


def find_trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name.

    Raises:
        InputError: There is none, or one is not float32.
    """
    found = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not found:
        raise InputError(f"{type(module).__name__} has no parameter that requires gradients: there is nothing to train")
    for name, parameter in found.items():
        if parameter.dtype != torch.float32:
            raise InputError(f"what is trained must be float32, but {name} is {parameter.dtype}")
    return found


def check_parts(parts: Mapping[str, Tensor]) -> Mapping[str, Float[Tensor, ""]]:
    """Return the parts of a loss, or raise an InputError if they are no scalars or nothing can be learned from them."""
    if LOSS not in parts:
        raise InputError(f"a task must return a part named {LOSS!r}, got {', '.join(parts) or 'nothing'}")
    for name, value in parts.items():
        if value.numel() != 1 or (not value.is_floating_point() and name != TOKENS):
            raise InputError(f"part {name!r} of a loss must be one floating-point number, got {_kind(value)}")
    if not parts[LOSS].requires_grad:
        raise InputError("the loss depends on no parameter that is trained: is it computed under no_grad, or detached?")
    return {name: value.reshape(()) for name, value in parts.items()}


def finite_or_none(value: float) -> float | None:
    """Return a number as JSON can hold it: None for NaN and infinities."""
    return value if math.isfinite(value) else None


def _kind(value: Tensor) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}"
