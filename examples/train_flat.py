"""The loop in one function, to be read from top to bottom; :mod:`vestige.training.loop` is the one to train with.

Both come to the same weights. Left out here: checkpoints and going on after a kill, several processes, validation,
other schedules than a cosine, metrics as JSON lines, a progress bar, Ctrl-C, and most checks: a parameter that no
gradient reaches, or a loss that is not a number, goes unnoticed.
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
        task: Its parameters are changed in place.
        steps: Updates of the parameters.
        batch: Samples of a step.
        lr: Learning rate after the warm-up; half a cosine brings it down to 0.
        warmup: Steps in which it rises in equal parts.
        weight_decay: Decoupled, of parameters with two dimensions or more.
        betas: AdamW's.
        clip: Largest norm of the whole gradient.
        seed: Of the order of samples, and of what is drawn while one is prepared.
        out: The file.
    """
    # 1. What is trained: whatever requires gradients. Biases and norms (one dimension) are not decayed.
    task.module.train()
    parameters = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
    deep = [p for p in parameters.values() if p.ndim >= 2]
    flat = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": deep, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)

    losses = []
    for step in range(steps):
        # 2. Gradients of a batch, one sample at a time. Order and random numbers follow from the seed and from how
        #    many samples came before, never from what happened on the way.
        optimizer.zero_grad()
        total = 0.0
        for position in range(step * batch, (step + 1) * batch):
            torch.manual_seed(derive_seed(seed, "sample", position))
            loss = task.loss(find_sample_index(seed, position, task.num_samples))["loss"]
            (loss / batch).backward()
            total += loss.item()
        losses.append(total / batch)

        # 3. No gradient is longer than ``clip``, whatever one odd sample says.
        torch.nn.utils.clip_grad_norm_(parameters.values(), clip)

        # 4. The learning rate rises in a line and falls in half a cosine.
        if step < warmup:
            rate = lr * (step + 1) / warmup
        else:
            rate = lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate

        # 5. One step of AdamW.
        optimizer.step()

    # 6. What was trained, by name: the weights of the full loop's last checkpoint.
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, out)
    return losses
