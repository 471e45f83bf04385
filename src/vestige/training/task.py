"""The interface between a trainer and the loop, and the checks of what a trainer returns."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from vestige.errors import InputError
from vestige.models.layout import check

LOSS, TOKENS = "loss", "tokens"
"""Names of the part that is minimised, and of the part that is summed instead of averaged."""


@runtime_checkable
class Task(Protocol):
    """A trainer: parameters, and a loss for each sample.

    It keeps no state beside the trainable parameters. Its ``loss`` depends only on them, on the index and on torch's
    global random numbers, which the loop seeds before every call. So a checkpoint needs no more than the step number
    to continue with the same samples, and any number of processes see the same ones.
    """

    @property
    def module(self) -> nn.Module:
        """The module to train: its parameters that require gradients, in float32. Others stay fixed, in any dtype.

        The loop sets training mode, and evaluation mode for validation.
        """

    @property
    def num_samples(self) -> int | None:
        """Number of samples of an epoch, which the loop shuffles; None is an endless stream in its own order."""

    def loss(self, index: int) -> Mapping[str, Tensor]:
        """Return the loss of one sample as named scalars, with the same names in every call.

        ``"loss"`` is minimised, the optional ``"tokens"`` is summed, and the others are averaged for the record.

        Args:
            index: Below ``num_samples``; for a stream, the number of samples before this one.
        """

    def validate(self) -> Mapping[str, float]:
        """Return figures on held-out data. The loop calls it without gradients and with the same seed each time.

        Every process computes all figures.
        """

    def identity(self) -> Mapping[str, Any]:
        """Return JSON values that a checkpoint must share with this task in order to be resumed.

        Include what the parameters do not show: model id, config hash, data, sizes.
        """


def identify_model(model: PreTrainedModel) -> dict[str, str]:
    """Return the part of an identity that names the frozen model: its weights, and its dtype."""
    return {"model": check(model).fingerprint(), "dtype": str(model.dtype)}


def find_trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name.

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
    """Return the parts of a loss as scalars, or raise an InputError if they are not usable."""
    if LOSS not in parts:
        raise InputError(f"a task must return a part named {LOSS!r}, got {', '.join(parts) or 'nothing'}")
    for name, value in parts.items():
        if value.numel() != 1 or (not value.is_floating_point() and name != TOKENS):
            got = f"{value.dtype} of shape {tuple(value.shape)}"
            raise InputError(f"part {name!r} of a loss must be one floating-point number, got {got}")
    if not parts[LOSS].requires_grad:
        raise InputError("the loss depends on no parameter that is trained: is it computed under no_grad, or detached?")
    return {name: value.reshape(()) for name, value in parts.items()}


def finite_or_none(value: float) -> float | None:
    """Return a number, or None instead of NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None
