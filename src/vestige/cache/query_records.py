"""Query statistics that survive eviction: a ring buffer of recent queries, running moments of all queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from vestige.cache.forward_pass import ForwardPass
from vestige.policies.observation import OUTLIERS, Moments


class Record(Protocol):
    """Statistics of one kind of rows (queries or hidden states): one tensor of live storage, batch rows first."""

    data: Tensor

    @property
    def size(self) -> int:
        """Number of rows stored, or 1 for a record of fixed size."""

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""

    def record(self, new: Float[Tensor, "batch heads new dim"], step: ForwardPass) -> None:
        """Add new rows, except pads."""

    def latest(self, seen: Sequence[int]) -> tuple[Any, ...]:
        """Return each batch row's statistics, given its number of tokens seen."""

    def is_blank(self, seen: Sequence[int]) -> bool:
        """Tell whether some batch row has seen tokens and has no row of them."""

    def crop(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Remove the rows of cropped tokens, given each batch row's tokens seen before and after the crop."""

    def skip(self, seen: Sequence[int]) -> None:
        """Continue after tokens that have no rows."""

    def shrink_to(self, size: int, seen: Sequence[int]) -> "Record":
        """Return a smaller record."""

    def select(self, rows: Sequence[int]) -> "Record":
        """Return a record of these batch rows in this order; it shares no memory."""

    def copy(self) -> "Record":
        """Return an equal record; it shares no memory."""


@dataclass
class RingBuffer:
    """The latest ``size`` rows of each batch row; position p is in slot ``p % size``, so order needs no pointer.

    Args:
        data: The slots.
        floor: First position of each batch row whose row can be present. A crop raises it: the rows that it removes had
            overwritten earlier ones.
    """

    data: Float[Tensor, "batch heads size dim"]
    floor: list[int]

    @classmethod
    def like(cls, new: Float[Tensor, "batch heads new dim"], size: int, seen: Sequence[int]) -> "RingBuffer":
        """Return an empty ring for rows of this shape that follow ``seen`` tokens."""
        batch, heads, _, dim = new.shape
        return cls(new.new_zeros(batch, heads, size, dim), list(seen))

    @property
    def size(self) -> int:
        """Number of rows stored."""
        return self.data.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return self.data.nbytes

    def record(self, new: Float[Tensor, "batch heads new dim"], step: ForwardPass) -> None:
        """Store the last of these rows, except pads."""
        if step.even:
            last = step.seen[0] + step.new
            if step.new == 1:
                self.data[:, :, (last - 1) % self.size] = new[:, :, 0]
                return
            positions = torch.arange(max(step.seen[0], last - self.size), last, device=new.device)
            self.data[:, :, positions % self.size] = new[:, :, positions - step.seen[0]]
            return
        for b in range(new.shape[0]):
            valid = step.find_valid(b)[-self.size :]
            self.data[b][:, step.positions[b, valid].long() % self.size] = new[b][:, valid]

    def latest(self, seen: Sequence[int]) -> tuple[Float[Tensor, "heads _latest dim"], ...]:
        """Return each batch row's rows, oldest first: fewer than ``size`` if some were cropped or never recorded.

        Args:
            seen: Tokens of each batch row.
        """
        rows = []
        for b, (begin, end) in enumerate(zip(self.find_begins(seen), seen, strict=True)):
            positions = torch.arange(begin, end, device=self.data.device)
            rows.append(self.data[b][:, positions % self.size])
        return tuple(rows)

    def find_begins(self, seen: Sequence[int]) -> list[int]:
        """Return the position of each batch row's oldest row, or its number of tokens seen if there is none."""
        return [min(max(floor, end - self.size), end) for floor, end in zip(self.floor, seen, strict=True)]

    def is_blank(self, seen: Sequence[int]) -> bool:
        """Tell whether some batch row has seen tokens and has no row of them."""
        return any(begin == end > 0 for begin, end in zip(self.find_begins(seen), seen, strict=True))

    def crop(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Remove the rows of cropped tokens, and those that these had overwritten."""
        self.floor = [min(begin, end) for begin, end in zip(self.find_begins(before), after, strict=True)]

    def skip(self, seen: Sequence[int]) -> None:
        """Continue after tokens that have no rows."""
        self.floor = list(seen)

    def shrink_to(self, size: int, seen: Sequence[int]) -> "RingBuffer":
        """Return a smaller ring of the latest rows."""
        smaller = RingBuffer(self.data.new_zeros(*self.data.shape[:2], size, self.data.shape[3]), list(self.floor))
        begins = smaller.find_begins(seen)
        for b, (end, latest) in enumerate(zip(seen, self.latest(seen), strict=True)):
            positions = torch.arange(begins[b], end, device=self.data.device)
            smaller.data[b][:, positions % size] = latest[:, latest.shape[1] - len(positions) :]
        return smaller

    def select(self, rows: Sequence[int]) -> "RingBuffer":
        """Return a ring of these batch rows in this order; it shares no memory."""
        return RingBuffer(self.data[torch.tensor(rows, device=self.data.device)], [self.floor[b] for b in rows])

    def copy(self) -> "RingBuffer":
        """Return an equal ring; it shares no memory."""
        return RingBuffer(self.data.clone(), list(self.floor))


@dataclass
class QueryMoments:
    """Count, mean and scatter of all queries of a batch row, before RoPE, by query head.

    Blocks are merged as by Chan et al., so that chunks and decode steps give the result of one computation over all
    queries. The first ``OUTLIERS`` tokens and pads do not count. A crop cannot remove queries: cropped ones (rejected
    candidates of speculative decoding, for instance) stay counted.

    Args:
        data: The scatter (the sum of outer products about the mean), then the mean, then the count, repeated over the
            last row. They are one float32 tensor, so that it is selected, copied and saved like a ring.
    """

    data: Float[Tensor, "batch heads dim_plus_2 dim"]
    size: ClassVar[int] = 1

    @classmethod
    def like(cls, new: Float[Tensor, "batch heads new dim"], size: int, seen: Sequence[int]) -> "QueryMoments":
        """Return empty moments; their size is 1."""
        batch, heads, _, dim = new.shape
        return cls(new.new_zeros(batch, heads, dim + 2, dim, dtype=torch.float32))

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return self.data.nbytes

    def record(self, new: Float[Tensor, "batch heads new dim"], step: ForwardPass) -> None:
        """Add queries without RoPE."""
        counted = (step.positions >= OUTLIERS)[:, None, :, None]  # (batch, 1, new, 1)
        queries = new.float().masked_fill(~counted, 0.0)
        scatter, mean, count = self.data[:, :, :-2], self.data[:, :, -2], self.data[:, :, -1]
        new_count = counted.sum(2).float()
        new_mean = queries.sum(2) / new_count.clamp_min(1)  # (batch, heads, dim)
        centred = (queries - new_mean[:, :, None]).masked_fill(~counted, 0.0)
        total, shift = (count + new_count).clamp_min(1), new_mean - mean
        scatter += centred.mT @ centred
        scatter += (count * new_count / total)[..., None] * shift[..., :, None] * shift[..., None, :]
        mean += shift * new_count / total
        count += new_count

    def latest(self, seen: Sequence[int]) -> tuple[Moments, ...]:
        """Return each batch row's moments; ``seen`` does not matter."""
        count = self.data[:, :, -1].clamp_min(1)[..., None]
        return tuple(Moments(x[:, -2], x[:, :-2] / n) for x, n in zip(self.data.clone(), count, strict=True))

    def is_blank(self, seen: Sequence[int]) -> bool:
        """Return False: empty moments are zeros."""
        return False

    def crop(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Do nothing: cropped queries stay counted."""

    def skip(self, seen: Sequence[int]) -> None:
        """Do nothing: skipped tokens have no queries."""

    def shrink_to(self, size: int, seen: Sequence[int]) -> "QueryMoments":
        """Return a copy: moments have one size."""
        return self.copy()

    def select(self, rows: Sequence[int]) -> "QueryMoments":
        """Return moments of these batch rows in this order; they share no memory."""
        return QueryMoments(self.data[torch.tensor(rows, device=self.data.device)])

    def copy(self) -> "QueryMoments":
        """Return equal moments; they share no memory."""
        return QueryMoments(self.data.clone())


def record_class(name: str) -> type[RingBuffer] | type[QueryMoments]:
    """Return the record class for a kind of rows."""
    return QueryMoments if name == "query_moments" else RingBuffer
