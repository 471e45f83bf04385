"""Data-parallel training in several processes through ``accelerate``: each takes a share of every step.

Launch with ``torchrun --nproc_per_node 2 ...``, or with ``accelerate launch --multi_gpu --num_processes 2 ...``, which
also works without a GPU. ``accelerate launch --cpu --num_processes 2`` only starts one process (accelerate 1.15).
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vestige.errors import InputError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Environment variables with the number of processes: of torchrun and accelerate, and of three kinds of mpirun."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The rank of this process and the number of processes; with one process, its methods do nothing."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    """Device for this process's model; None, with a single process, leaves the choice to the caller."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def share(self, batch: int) -> range:
        """Return the indices of this process's samples within a step."""
        return range(self.index, batch, self.count)

    def check(self, batch: int) -> None:
        """Raise an InputError unless every process gets the same number of samples."""
        if batch % self.count:
            raise InputError(
                f"batch {batch} cannot be shared by {self.count} processes; use a multiple of {self.count}"
            )

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.count > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one message. All tensors are float32."""
        if self.count > 1:
            from accelerate.utils import reduce

            _replace(list(tensors), lambda flat: reduce(flat, reduction="sum"))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of the main process."""
        if self.count > 1:
            from accelerate.utils import broadcast

            _replace(list(tensors), broadcast)


def find_processes() -> Processes:
    """Return the processes that a launcher started; a single one if there was no launcher.

    Raises:
        InputError: There are several processes, and ``accelerate`` is not installed or does not see them.
    """
    count = max(int(os.environ.get(name) or 1) for name in SIZES)
    if count == 1:
        return Processes()
    try:
        from accelerate import Accelerator
    except ImportError:
        raise InputError('training in several processes needs accelerate: pip install "vestige[train]"') from None
    # Without a GPU, accelerate treats each launched process as a run of its own unless cpu=True.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if accelerator.num_processes != count:
        raise InputError(f"the launcher says {count} processes, accelerate sees {accelerator.num_processes}")
    return Processes(index=accelerator.process_index, count=count, device=accelerator.device)


def _replace(tensors: list[Tensor], exchange: Callable[[Tensor], Tensor]) -> None:
    """Exchange all tensors as one flat tensor, and copy the result back into them."""
    with torch.no_grad():
        flat = exchange(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
