"""Several processes that train together, each on its share of every step, through ``accelerate``.

``torchrun --nproc_per_node 2 ...``, or ``accelerate launch --multi_gpu --num_processes 2 ...``, which works without a
GPU too; ``accelerate launch --cpu --num_processes 2`` starts one process only, whatever it is told (accelerate 1.15).
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vestige.errors import InputError

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are: torchrun and accelerate, and three kinds of mpirun."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that train together; alone it does nothing."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    """Where this process should have its model; None leaves it to the caller, where there is one process."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.index == 0

    def share(self, batch: int) -> range:
        """Return which of the samples of a step are this process's."""
        return range(self.index, batch, self.count)

    def check(self, batch: int) -> None:
        """Raise an InputError unless every process gets the same number of samples."""
        if batch % self.count:
            raise InputError(
                f"batch {batch} cannot be shared by {self.count} processes; use a multiple of {self.count}"
            )

    def barrier(self) -> None:
        """Return when every process is here."""
        if self.count > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one message. All must have the dtype float32."""
        if self.count > 1:
            from accelerate.utils import reduce

            _replace(list(tensors), lambda flat: reduce(flat, reduction="sum"))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the main process's."""
        if self.count > 1:
            from accelerate.utils import broadcast

            _replace(list(tensors), broadcast)


def find_processes() -> Processes:
    """Return this process among those that a launcher started; alone if there was no launcher.

    Raises:
        InputError: There are several and ``accelerate`` is not installed, or it does not see them.
    """
    count = max(int(os.environ.get(name) or 1) for name in SIZES)
    if count == 1:
        return Processes()
    try:
        from accelerate import Accelerator
    except ImportError:
        raise InputError('training in several processes needs accelerate: pip install "vestige[train]"') from None
    # Without a GPU it takes launched processes for strangers, each of which would train alone, unless told so.
    seen = Accelerator(cpu=not torch.accelerator.is_available())
    if seen.num_processes != count:
        raise InputError(f"the launcher says {count} processes, accelerate sees {seen.num_processes}")
    return Processes(index=seen.process_index, count=count, device=seen.device)


def _replace(tensors: list[Tensor], exchange: Callable[[Tensor], Tensor]) -> None:
    """Exchange all tensors as one, and put what comes back in their places."""
    with torch.no_grad():
        flat = exchange(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
