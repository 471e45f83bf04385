"""One forward: what the decoder was given, the same for all layers."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class ForwardPass:
    """One forward on a cache.

    Args:
        number: Counts the cache's forwards, so that a layer can tell a new one from one it has stored.
        positions: Position of each new token in its batch row; -1 for pads.
        seen: Tokens of each batch row before this forward.
    """

    number: int
    positions: Int[Tensor, "batch new"]
    seen: tuple[int, ...]
    padded: bool
    """Whether any new token is a pad."""
    even: bool
    """Whether all batch rows have seen the same number of tokens, none of them pads in this forward."""

    @classmethod
    def of(cls, number: int, seen: tuple[int, ...], real: Bool[Tensor, "batch new"], *, padded: bool) -> "ForwardPass":
        """Return the forward of tokens behind those that each batch row has seen.

        Args:
            number: Of the forward.
            seen: Tokens of each batch row before it.
            real: False for pads.
            padded: Whether there are any; asking the tensor would wait for its device.
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
        """Tokens of each batch row that are no pads."""
        return tuple((self.positions >= 0).sum(1).tolist()) if self.padded else (self.new,) * len(self.seen)

    def find_valid(self, batch: int) -> Int[Tensor, " valid"]:
        """Return the indices of a batch row's new tokens that are not pads."""
        return (self.positions[batch] >= 0).nonzero()[:, 0]
