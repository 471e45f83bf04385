"""What a layer remembers of the tokens that passed, whatever becomes of their pairs: rings of the latest rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from vestige.layers import Step


@dataclass
class Ring:
    """The latest ``size`` rows of each batch row: that of position p in slot ``p % size``, so order needs no pointer.

    Args:
        data: The slots.
    """

    data: Float[Tensor, "batch heads size dim"]

    @classmethod
    def like(cls, new: Float[Tensor, "batch heads new dim"], size: int) -> "Ring":
        """Return an empty ring for rows such as these."""
        batch, heads, _, dim = new.shape
        return cls(new.new_zeros(batch, heads, size, dim))

    @property
    def size(self) -> int:
        """Rows remembered."""
        return self.data.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return self.data.nbytes

    def record(self, new: Float[Tensor, "batch heads new dim"], step: "Step") -> None:
        """Remember the last of these rows, pads left out."""
        if step.even:
            last = step.seen[0] + step.new
            if step.new == 1:
                self.data[:, :, (last - 1) % self.size] = new[:, :, 0]
                return
            at = torch.arange(max(step.seen[0], last - self.size), last, device=new.device)
            self.data[:, :, at % self.size] = new[:, :, at - step.seen[0]]
            return
        for b in range(new.shape[0]):
            valid = step.valid(b)[-self.size :]
            self.data[b][:, step.positions[b, valid].long() % self.size] = new[b][:, valid]

    def latest(self, seen: Sequence[int], floor: Sequence[int]) -> tuple[Float[Tensor, "heads _latest dim"], ...]:
        """Return each batch row's rows, oldest first.

        Args:
            seen: Tokens of each batch row.
            floor: First position of each batch row whose row can still be there (a crop takes later ones away).
        """
        found = []
        for b, end in enumerate(seen):
            at = torch.arange(max(floor[b], end - self.size), end, device=self.data.device)
            found.append(self.data[b][:, at % self.size])
        return tuple(found)

    def shrunk(self, size: int, seen: Sequence[int], floor: Sequence[int]) -> "Ring":
        """Return a smaller ring of the latest rows."""
        smaller = self.data.new_zeros(*self.data.shape[:2], size, self.data.shape[3])
        for b, (end, latest) in enumerate(zip(seen, self.latest(seen, floor), strict=True)):
            kept = latest[:, -size:]
            smaller[b][:, torch.arange(end - kept.shape[1], end, device=smaller.device) % size] = kept
        return Ring(smaller)

    def select(self, rows: Sequence[int]) -> "Ring":
        """Return a ring of these batch rows, in this order, that shares no memory."""
        return Ring(self.data[torch.tensor(rows, device=self.data.device)])

    def copy(self) -> "Ring":
        """Return an equal ring that shares no memory."""
        return Ring(self.data.clone())
