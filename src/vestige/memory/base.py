"""What remains of the evicted: the interface that every memory implements, a layer's state of it, what it took in.

A memory sees pairs once, when they are evicted, and answers every later query with an estimate of what attention over
them would have read and weighed. Its state has one size per row, whatever the length.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from vestige.errors import PolicyError
from vestige.kernels import AttentionScale, packed
from vestige.kernels.merge import AdditiveOutput, PartialAttention
from vestige.spans import PositionMap, Span

State = Mapping[str, Tensor]
"""A memory's tensors by name, ``rows ...`` each; replaced, never changed in place."""


class ForgetResult(Enum):
    """How far a memory is free of a span."""

    EXACT = "exact"
    """No pair of the span was ever absorbed, so the memory is what it would be without them."""
    SUBTRACTED = "subtracted"
    """Pairs of the span were absorbed, and were taken out again: :func:`vestige.erasers.forget.forget`."""
    REBUILT = "rebuilt"
    """The memory was made anew by replaying the ids without the span: what erasers do."""
    IMPOSSIBLE = "impossible"
    """Pairs of the span were absorbed and stay: the memory is no sum, or nothing gives those very pairs again."""


@dataclass(frozen=True, kw_only=True)
class EvictedPairs:
    """Pairs of one layer that are about to go, padded to the longest row, in float32. Pads are not among them.

    Args:
        layer_idx: Index of the layer in the model.
        counts: Pairs of each row; they come first, in time order.
        keys: Keys as stored: after RoPE. Zeros behind a row's pairs.
        values: Values as stored. Zeros behind a row's pairs.
        positions: Position of each pair; -1 behind a row's pairs.
    """

    layer_idx: int
    counts: Int[Tensor, " rows"]
    keys: Float[Tensor, "rows longest head_dim"]
    values: Float[Tensor, "rows longest value_dim"]
    positions: Int[Tensor, "rows longest"]

    @classmethod
    def of(
        cls, layer_idx: int, columns: Mapping[str, Tensor], slots: Int[Tensor, " gone"], lengths: Sequence[int]
    ) -> "EvictedPairs":
        """Return copies of the given slots of a layer's columns; row r owns the next ``lengths[r]`` of them."""
        rows, longest = len(lengths), max(lengths)
        index = packed.layout_index(slots, lengths, [longest] * rows)
        counts = torch.tensor(lengths, device=slots.device)
        beyond = torch.arange(longest, device=slots.device) >= counts[:, None]

        def padded(name: str) -> Tensor:
            chosen = packed.gather(columns[name].detach(), index)
            return chosen.view(rows, longest, *chosen.shape[1:])

        keys, values = (padded(name).float().masked_fill(beyond[..., None], 0.0) for name in ("keys", "values"))
        positions = padded("positions").masked_fill(beyond, -1)
        return cls(layer_idx=layer_idx, counts=counts, keys=keys, values=values, positions=positions)

    @property
    def valid(self) -> Bool[Tensor, "rows longest"]:
        """False behind a row's pairs."""
        return self.positions >= 0

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes


@dataclass(frozen=True, kw_only=True)
class MemoryQuery:
    """Queries of one layer, by the row they read. All of them come after what was evicted, so no mask is needed.

    Args:
        layer_idx: Index of the layer in the model.
        queries: After RoPE, in float32; those of all heads that read the row.
        scale: Factor and softcap of the layer; its sinks are counted with the kept pairs.
    """

    layer_idx: int
    queries: Float[Tensor, "rows queries head_dim"]
    scale: AttentionScale


@dataclass(frozen=True, kw_only=True)
class Memory(ABC):
    """Options of a memory. Frozen: its state lives in the cache, one per layer, and no method changes it in place."""

    @abstractmethod
    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        """Return the state of rows that absorbed nothing."""

    @abstractmethod
    def absorb(self, state: State, evicted: EvictedPairs) -> State:
        """Return the state of rows that absorbed these pairs too."""

    @abstractmethod
    def recall(self, state: State, asked: MemoryQuery) -> PartialAttention | AdditiveOutput:
        """Return an estimate of attention over what each row absorbed, ``rows queries ...``, in float32; or what is to
        be added to attention over what is kept.

        Differentiable in the queries. A row that absorbed nothing weighs nothing, or adds 0: see :func:`log_count`.
        """

    def bind(self, model: PreTrainedModel) -> "Memory":
        """Return this memory with everything at hand that it needs for a model.

        Raises:
            ModelError: What it needs was made for another model, or cannot be had.
        """
        return self

    @property
    def releases(self) -> bool:
        """Whether pairs that were absorbed can be taken out again: see :meth:`release`."""
        return False

    def release(self, state: State, evicted: EvictedPairs) -> State:
        """Return the state of rows without these pairs, which they absorbed.

        Raises:
            PolicyError: A sum like this one cannot be taken apart.
        """
        raise PolicyError(f"what {type(self).__name__} remembers cannot be taken apart again")

    def state_bytes(self, head_dim: int, value_dim: int) -> int:
        """Return the bytes of one row's state."""
        return sum(x.nbytes for x in self.empty(1, head_dim, value_dim, "cpu").values())  # quicker than on "meta"


def log_count(count: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Return the log of a count, and of 0 a number so low that ``exp`` gives 0: -inf would make gradients NaN."""
    return count.log().clamp_min(-1e30)


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """What one layer remembers of its evicted pairs: row ``batch_idx * kv_heads + head`` as in the layer.

    Args:
        memory: Whose state it is.
        layer_idx: Index of the layer in the model.
        state: The memory's tensors.
    """

    memory: Memory
    layer_idx: int
    state: State

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return sum(x.nbytes for x in self.state.values())

    def absorb(self, evicted: EvictedPairs) -> "LayerMemory":
        """Return what remains once these pairs are gone too."""
        with torch.no_grad():
            return replace(self, state=self.memory.absorb(self.state, evicted))

    def release(self, evicted: EvictedPairs) -> "LayerMemory":
        """Return what would remain had these pairs never been absorbed."""
        with torch.no_grad():
            return replace(self, state=self.memory.release(self.state, evicted))

    def recall(
        self, query: Float[Tensor, "batch heads new head_dim"], rows: slice, scale: AttentionScale
    ) -> PartialAttention | AdditiveOutput:
        """Return what queries read from the memory, ``batch heads new ...``.

        Args:
            query: Queries after RoPE, of the batch rows that ``rows`` belong to.
            rows: Rows that these read.
            scale: Of the layer.
        """
        every = rows.stop - rows.start == len(next(iter(self.state.values())))
        state = self.state if every else {name: x[rows] for name, x in self.state.items()}
        flat = query.float().reshape(rows.stop - rows.start, -1, query.shape[-1])
        found = self.memory.recall(state, MemoryQuery(layer_idx=self.layer_idx, queries=flat, scale=scale))
        output = found.output.reshape(*query.shape[:3], -1)
        return (
            AdditiveOutput(output)
            if isinstance(found, AdditiveOutput)
            else PartialAttention(output, found.lse.reshape(query.shape[:3]))
        )

    def select(self, rows: Sequence[int]) -> "LayerMemory":
        """Return the memory of these rows, in this order, sharing no storage."""
        return replace(self, state={name: x[torch.tensor(rows, device=x.device)] for name, x in self.state.items()})

    def copy(self) -> "LayerMemory":
        """Return an equal memory that shares no storage."""
        return replace(self, state={name: x.clone() for name, x in self.state.items()})


@dataclass
class AbsorbedRanges:
    """The ranges of positions of which some layer's memory took in a pair, by batch row.

    One list for all layers and heads: whether a span can be forgotten asks for no more.
    """

    ranges: dict[int, tuple[Span, ...]] = field(default_factory=dict)
    replayable: dict[int, int] = field(default_factory=dict)
    """Tokens of a batch row that were read before anything was evicted, and never taken back or moved: reading them
    once more gives their pairs again."""
    released: tuple[Span, ...] = ()
    """Of which every pair that had been absorbed was taken out again, in all batch rows."""

    def add(self, batch_idx: int, positions: Int[Tensor, " gone"], seen: int) -> None:
        """Note positions of a batch row that has seen so many tokens; in any order and repeated as they come."""
        if not len(positions):
            return
        self.replayable.setdefault(batch_idx, seen)
        before = self.ranges.get(batch_idx, ())
        length = max([int(positions.max()) + 1, *(span.end for span in before[-1:])])
        taken = torch.zeros(length + 2, dtype=torch.int8, device=positions.device)  # 0 at both ends
        taken[positions.long() + 1] = 1
        for span in before:
            taken[span.start + 1 : span.end + 1] = 1
        edges = taken.diff().nonzero()[:, 0].tolist()
        self.ranges[batch_idx] = tuple(map(Span, edges[::2], edges[1::2]))

    def crop(self, seen: Sequence[int]) -> None:
        """Note that tokens were taken back, to so many of each batch row."""
        self.replayable = {b: min(most, seen[b]) for b, most in self.replayable.items()}

    def moved(self, closing: PositionMap, batch: int) -> None:
        """Note that spans, behind all that was absorbed, left each batch row: what follows was read with them in view,
        and no replay without them gives its pairs."""
        start = closing.spans[0].start
        self.replayable = {b: min(self.replayable.get(b, start), start) for b in range(batch)}
        self.released = closing.over(self.released)

    def remove(self, span: Span) -> None:
        """Note that nothing of a span is there any more, in any batch row."""
        self.released = (*self.released, span)
        for batch_idx, ranges in self.ranges.items():
            cut = [Span(one.start, min(one.end, span.start)) for one in ranges if one.start < span.start]
            cut += [Span(max(one.start, span.end), one.end) for one in ranges if one.end > span.end]
            self.ranges[batch_idx] = tuple(sorted(cut))

    def overlaps(self, span: Span) -> bool:
        """Return whether any position of a span is among them, in any batch row."""
        return any(one.common(span) for row in self.ranges.values() for one in row)

    def again(self, span: Span) -> bool:
        """Return whether pairs of a span were absorbed that come beside others of it, which were taken out before."""
        return any(self.overlaps(part) for one in self.released if (part := one.common(span)))

    def copy(self) -> "AbsorbedRanges":
        """Return the same, for a fork."""
        return AbsorbedRanges(dict(self.ranges), dict(self.replayable), self.released)

    def select(self, batch_rows: Sequence[int]) -> "AbsorbedRanges":
        """Return the ranges of these batch rows, in this order."""
        old_of = list(enumerate(batch_rows))
        ranges = {new: self.ranges[old] for new, old in old_of if old in self.ranges}
        replayable = {new: self.replayable[old] for new, old in old_of if old in self.replayable}
        return AbsorbedRanges(ranges, replayable, self.released)
