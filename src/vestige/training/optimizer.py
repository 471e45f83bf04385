"""AdamW and its gradients; its state as named tensors of a checkpoint, restored bit for bit."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from vestige.errors import InputError
from vestige.training.checkpoint import State
from vestige.training.config import LoopConfig
from vestige.training.distributed import Processes

MOMENTS = ("exp_avg", "exp_avg_sq")
Named = Mapping[str, nn.Parameter]


def adamw(parameters: Named, config: LoopConfig) -> AdamW:
    """Return an optimizer with weight decay on parameters of two or more dimensions: not on biases and norms."""
    deep = [p for p in parameters.values() if p.ndim >= 2]
    flat = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": deep, "weight_decay": config.weight_decay}, {"params": flat, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)


def gather_gradients(parameters: Named, world: Processes, *, first: bool) -> None:
    """Sum the gradients of all processes in place; a parameter without a gradient gets zeros.

    Args:
        parameters: All trained parameters.
        world: The processes.
        first: Whether this is the first step, in which every parameter must have a gradient in some process.

    Raises:
        InputError: In the first step, no gradient reached a parameter.
    """
    if first:
        _require_gradients(parameters, world)
    for parameter in parameters.values():
        if parameter.grad is None:  # AdamW would skip it in this process but not in others
            parameter.grad = torch.zeros_like(parameter)
    world.all_reduce([p.grad for p in parameters.values() if p.grad is not None])


def _require_gradients(parameters: Named, world: Processes) -> None:
    device = next(iter(parameters.values())).device
    reached = torch.tensor([float(p.grad is not None) for p in parameters.values()], device=device)
    world.all_reduce([reached])
    missed = [name for name, count in zip(parameters, reached.tolist(), strict=True) if not count]
    if missed:
        raise InputError(
            f"no gradient reached {len(missed)} of {len(parameters)} parameters in the first step, "
            f"{missed[0]} among them; freeze what does not take part"
        )


def moments(optimizer: AdamW, parameters: Named) -> dict[str, Tensor]:
    """Return the moments by name, as in a :class:`State`; empty before the first step."""
    state = optimizer.state
    return {f"{kind}/{name}": state[p][kind] for kind in MOMENTS for name, p in parameters.items() if p in state}


def restore(optimizer: AdamW, parameters: Named, state: State, path: Path) -> None:
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
