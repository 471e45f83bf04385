"""The training loop in one function, to read from top to bottom; use :mod:`vestige.training.loop` for real runs.

Both give the same weights. Not here: checkpoints and resuming, several processes, validation, schedules other than a
cosine, metrics as JSON lines, a progress bar, Ctrl-C, and most checks: a parameter without a gradient, or a loss that
is not a number, goes unnoticed.

Run it on any :class:`~vestige.training.task.Task`, from the repository's root::

    from examples.train_flat import train

    losses = train(task, steps=100, out=Path("weights.safetensors"))
"""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from vestige.training.sampler import derive_seed, find_sample_index
from vestige.training.task import Task


def train(
    task: Task,
    *,
    steps: int,
    batch: int = 8,
    lr: float = 1e-3,
    warmup: int = 0,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
    clip: float = 1.0,
    seed: int = 0,
    out: Path,
) -> list[float]:
    """Train a task, write its weights to a new safetensors file, and return the loss of every step.

    Args:
        task: Its parameters change in place.
        steps: Updates of the parameters.
        batch: Samples of a step.
        lr: Learning rate after the warm-up; it falls to 0 along half a cosine.
        warmup: Steps in which the learning rate rises linearly.
        weight_decay: Decoupled weight decay of parameters with two or more dimensions.
        betas: Betas of AdamW.
        clip: Largest norm of the whole gradient.
        seed: Seed of the order of samples and of all random choices.
        out: File for the weights.
    """
    # 1. The trained parameters are those that require gradients. Biases and norms (one dimension) have no decay.
    task.module.train()
    parameters = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
    deep = [p for p in parameters.values() if p.ndim >= 2]
    flat = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": deep, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)

    losses = []
    for step in range(steps):
        # 2. Accumulate the gradients of a batch, one sample at a time. The order of samples and all random numbers
        #    depend only on the seed and on the number of samples before.
        optimizer.zero_grad()
        total = 0.0
        for position in range(step * batch, (step + 1) * batch):
            torch.manual_seed(derive_seed(seed, "sample", position))
            loss = task.loss(find_sample_index(seed, position, task.num_samples))["loss"]
            (loss / batch).backward()
            total += loss.item()
        losses.append(total / batch)

        # 3. Clip the norm of the gradient, so that no odd sample dominates.
        torch.nn.utils.clip_grad_norm_(parameters.values(), clip)

        # 4. Set the learning rate: a linear rise, then half a cosine.
        if step < warmup:
            rate = lr * (step + 1) / warmup
        else:
            rate = lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate

        # 5. Do one step of AdamW.
        optimizer.step()

    # 6. Write the trained parameters by name, like the full loop's last checkpoint.
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, out)
    return losses
