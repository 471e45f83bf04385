"""What a layer remembers of the tokens that passed, whatever becomes of their pairs: latest rows, moments of all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.cache.forward_pass import ForwardPass
from vestige.policies.observation import OUTLIERS, Moments


class Record(Protocol):
    """What is remembered of one kind of rows: one tensor of live storage, batch rows first."""

    data: Tensor

    @property
    def size(self) -> int:
        """Rows remembered, or 1 for what has one size."""

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""

    def record(self, new: Float[Tensor, "batch heads new dim"], step: ForwardPass) -> None:
        """Take in new rows, pads left out."""

    def latest(self, seen: Sequence[int]) -> tuple[Any, ...]:
        """Return what each batch row's policy may look at, of which so many tokens were seen."""

    def is_blank(self, seen: Sequence[int]) -> bool:
        """Return whether nothing is known of the tokens that some batch row has seen."""

    def crop(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Forget the rows of tokens that were taken back: each batch row saw so many before, and sees so many now."""

    def skip(self, seen: Sequence[int]) -> None:
        """Go on behind tokens of which there are no rows."""

    def shrink_to(self, size: int, seen: Sequence[int]) -> "Record":
        """Return a smaller record."""

    def select(self, rows: Sequence[int]) -> "Record":
        """Return a record of these batch rows, in this order, that shares no memory."""

    def copy(self) -> "Record":
        """Return an equal record that shares no memory."""


@dataclass
class RingBuffer:
    """The latest ``size`` rows of each batch row: that of position p in slot ``p % size``, so order needs no pointer.

    Args:
        data: The slots.
        floor: First position of each batch row whose row can still be there: a crop takes later ones away, which have
            overwritten earlier ones.
    """

    data: Float[Tensor, "batch heads size dim"]
    floor: list[int]

    @classmethod
    def like(cls, new: Float[Tensor, "batch heads new dim"], size: int, seen: Sequence[int]) -> "RingBuffer":
        """Return an empty ring for rows such as these, the first of which come behind so many tokens."""
        batch, heads, _, dim = new.shape
        return cls(new.new_zeros(batch, heads, size, dim), list(seen))

    @property
    def size(self) -> int:
        """Rows remembered."""
        return self.data.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return self.data.nbytes

    def record(self, new: Float[Tensor, "batch heads new dim"], step: ForwardPass) -> None:
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
            valid = step.find_valid(b)[-self.size :]
            self.data[b][:, step.positions[b, valid].long() % self.size] = new[b][:, valid]

    def latest(self, seen: Sequence[int]) -> tuple[Float[Tensor, "heads _latest dim"], ...]:
        """Return each batch row's rows, oldest first: fewer than ``size`` where some were never there or taken back.

        Args:
            seen: Tokens of each batch row.
        """
        found = []
        for b, (begin, end) in enumerate(zip(self.find_begins(seen), seen, strict=True)):
            at = torch.arange(begin, end, device=self.data.device)
            found.append(self.data[b][:, at % self.size])
        return tuple(found)

    def find_begins(self, seen: Sequence[int]) -> list[int]:
        """Return the position of each batch row's oldest row; where there is none, the number of tokens seen."""
        return [min(max(floor, end - self.size), end) for floor, end in zip(self.floor, seen, strict=True)]

    def is_blank(self, seen: Sequence[int]) -> bool:
        """Return whether some batch row has seen tokens and has the row of none."""
        return any(begin == end > 0 for begin, end in zip(self.find_begins(seen), seen, strict=True))

    def crop(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Forget the rows of tokens that were taken back, and those that these had overwritten."""
        self.floor = [min(begin, end) for begin, end in zip(self.find_begins(before), after, strict=True)]

    def skip(self, seen: Sequence[int]) -> None:
        """Go on behind tokens of which there are no rows."""
        self.floor = list(seen)

    def shrink_to(self, size: int, seen: Sequence[int]) -> "RingBuffer":
        """Return a smaller ring of the latest rows."""
        smaller = RingBuffer(self.data.new_zeros(*self.data.shape[:2], size, self.data.shape[3]), list(self.floor))
        begins = smaller.find_begins(seen)
        for b, (end, latest) in enumerate(zip(seen, self.latest(seen), strict=True)):
            at = torch.arange(begins[b], end, device=self.data.device)
            smaller.data[b][:, at % size] = latest[:, latest.shape[1] - len(at) :]
        return smaller

    def select(self, rows: Sequence[int]) -> "RingBuffer":
        """Return a ring of these batch rows, in this order, that shares no memory."""
        return RingBuffer(self.data[torch.tensor(rows, device=self.data.device)], [self.floor[b] for b in rows])

    def copy(self) -> "RingBuffer":
        """Return an equal ring that shares no memory."""
        return RingBuffer(self.data.clone(), list(self.floor))


@dataclass
class QueryMoments:
    """Count, mean and scatter of all queries that a batch row has seen, as they were before RoPE, by query head.

    Blocks are merged as by Chan et al., so that chunks, turns and decode steps come to what one computation over all
    queries would. The first ``OUTLIERS`` tokens and pads are left out. A crop cannot take queries back: what it
    removes (rejected candidates of speculative decoding, say) stays counted.

    Args:
        data: The scatter (the sum of outer products about the mean), then the mean, then the count in every place of
            the last row: one float32 tensor, so that it is selected, copied and saved as a ring is.
    """

    data: Float[Tensor, "batch heads dim_plus_2 dim"]
    size: ClassVar[int] = 1

    @classmethod
    def like(cls, new: Float[Tensor, "batch heads new dim"], size: int, seen: Sequence[int]) -> "QueryMoments":
        """Return moments of no queries yet; size is 1."""
        batch, heads, _, dim = new.shape
        return cls(new.new_zeros(batch, heads, dim + 2, dim, dtype=torch.float32))

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return self.data.nbytes

    def record(self, new: Float[Tensor, "batch heads new dim"], step: ForwardPass) -> None:
        """Count in queries that were turned back to what they were before RoPE."""
        counted = (step.positions >= OUTLIERS)[:, None, :, None]  # (batch, 1, new, 1)
        queries = new.float().masked_fill(~counted, 0.0)
        scatter, mean, count = self.data[:, :, :-2], self.data[:, :, -2], self.data[:, :, -1]
        more = counted.sum(2).float()
        its_mean = queries.sum(2) / more.clamp_min(1)  # (batch, heads, dim)
        centred = (queries - its_mean[:, :, None]).masked_fill(~counted, 0.0)
        total, shift = (count + more).clamp_min(1), its_mean - mean
        scatter += centred.mT @ centred
        scatter += (count * more / total)[..., None] * shift[..., :, None] * shift[..., None, :]
        mean += shift * more / total
        count += more

    def latest(self, seen: Sequence[int]) -> tuple[Moments, ...]:
        """Return each batch row's moments so far, whatever its length."""
        count = self.data[:, :, -1].clamp_min(1)[..., None]
        return tuple(Moments(x[:, -2], x[:, :-2] / n) for x, n in zip(self.data.clone(), count, strict=True))

    def is_blank(self, seen: Sequence[int]) -> bool:
        """Return False: moments of no queries are zeros."""
        return False

    def crop(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Change nothing: what was counted in stays."""

    def skip(self, seen: Sequence[int]) -> None:
        """Change nothing: what is not read is not counted."""

    def shrink_to(self, size: int, seen: Sequence[int]) -> "QueryMoments":
        """Return a copy: moments have one size."""
        return self.copy()

    def select(self, rows: Sequence[int]) -> "QueryMoments":
        """Return moments of these batch rows, in this order, that share no memory."""
        return QueryMoments(self.data[torch.tensor(rows, device=self.data.device)])

    def copy(self) -> "QueryMoments":
        """Return equal moments that share no memory."""
        return QueryMoments(self.data.clone())


def record_class(name: str) -> type[RingBuffer] | type[QueryMoments]:
    """Return how rows of a kind are remembered."""
    return QueryMoments if name == "query_moments" else RingBuffer
