"""One forward on a cache: its number, and the positions and pads of its tokens, the same for all layers."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class ForwardPass:
    """One forward on a cache.

    Args:
        number: Running number of the cache's forwards; a layer compares it with the last one that it stored.
        positions: Position of each new token in its batch row; -1 for pads.
        seen: Tokens of each batch row before this forward.
    """

    number: int
    positions: Int[Tensor, "batch new"]
    seen: tuple[int, ...]
    padded: bool
    """Whether any new token is a pad."""
    even: bool
    """Whether all batch rows have seen the same number of tokens and this forward has no pads."""

    @classmethod
    def of(cls, number: int, seen: tuple[int, ...], real: Bool[Tensor, "batch new"], *, padded: bool) -> "ForwardPass":
        """Return the forward of tokens that follow those seen.

        Args:
            number: Running number of the forward.
            seen: Tokens of each batch row before it.
            real: False for pads.
            padded: Whether there are pads; computing it from the tensor would wait for the device.
        """
        starts = torch.tensor(seen, device=real.device)[:, None]
        positions = torch.where(real, starts + real.cumsum(1) - 1, -1).to(torch.int32)
        return cls(number, positions, seen, padded=padded, even=not padded and len(set(seen)) == 1)

    @property
    def new(self) -> int:
        """Tokens fed, pads included."""
        return self.positions.shape[1]

    @property
    def fed(self) -> tuple[int, ...]:
        """New tokens of each batch row, pads not counted."""
        return tuple((self.positions >= 0).sum(1).tolist()) if self.padded else (self.new,) * len(self.seen)

    def find_valid(self, batch: int) -> Int[Tensor, " valid"]:
        """Return the indices of a batch row's new tokens that are not pads."""
        return (self.positions[batch] >= 0).nonzero()[:, 0]
