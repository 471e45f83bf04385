"""Memories of evicted pairs: the interface `Memory`, its inputs, a layer's state, and the absorbed positions.

A memory sees pairs once, when they are evicted, and estimates for every later query the output and the weight of
attention over them. The size of a row's state does not depend on the length of the text.
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
"""A memory's tensors by name, ``rows ...`` each; replaced, never modified in place."""


class ForgetResult(Enum):
    """How completely a memory forgot a span."""

    EXACT = "exact"
    """No pair of the span was ever absorbed, so the memory never depended on it."""
    SUBTRACTED = "subtracted"
    """Absorbed pairs of the span were released: :func:`vestige.erasers.forget.forget`."""
    REBUILT = "rebuilt"
    """The memory was rebuilt: an eraser read the ids again without the span."""
    IMPOSSIBLE = "impossible"
    """Absorbed pairs of the span stay: the memory is no sum, or the pairs cannot be reproduced."""


@dataclass(frozen=True, kw_only=True)
class EvictedPairs:
    """Pairs of one layer that are about to be evicted, padded to the longest row, in float32. Pads are left out.

    Args:
        layer_idx: Index of the layer in the model.
        counts: Pairs of each row; they come first, in time order.
        keys: Keys as stored: after RoPE. Zeros after a row's pairs.
        values: Values as stored. Zeros after a row's pairs.
        positions: Position of each pair; -1 after a row's pairs.
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
        """Mask of the pairs; False after a row's last pair."""
        return self.positions >= 0

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return self.keys.nbytes + self.values.nbytes + self.positions.nbytes


@dataclass(frozen=True, kw_only=True)
class MemoryQuery:
    """Queries of one layer, by the row they read. All are later than the evicted pairs, so no mask is needed.

    Args:
        layer_idx: Index of the layer in the model.
        queries: Queries of all heads that read the row, after RoPE, in float32.
        scale: Factor and softcap of the layer; its sinks count with the kept pairs.
    """

    layer_idx: int
    queries: Float[Tensor, "rows queries head_dim"]
    scale: AttentionScale


@dataclass(frozen=True, kw_only=True)
class Memory(ABC):
    """Options of a memory. Frozen: its state lives in the cache, one per layer, and no method modifies it in place."""

    @abstractmethod
    def empty(self, rows: int, head_dim: int, value_dim: int, device: torch.device | str) -> State:
        """Return the state of rows that absorbed nothing."""

    @abstractmethod
    def absorb(self, state: State, evicted: EvictedPairs) -> State:
        """Return the state of rows that absorbed these pairs too."""

    @abstractmethod
    def recall(self, state: State, query: MemoryQuery) -> PartialAttention | AdditiveOutput:
        """Return an estimate of attention over the absorbed pairs of each row, ``rows queries ...``, in float32.

        An `AdditiveOutput` is instead added to the attention over the kept pairs. The result is differentiable in the
        queries. A row that absorbed nothing has no weight, or adds 0: see :func:`log_count`.
        """

    def bind(self, model: PreTrainedModel) -> "Memory":
        """Return this memory with the weights that it needs for a model.

        Raises:
            ModelError: The weights are missing or made for another model.
        """
        return self

    @property
    def releases(self) -> bool:
        """Whether absorbed pairs can be removed: see :meth:`release`."""
        return False

    def release(self, state: State, evicted: EvictedPairs) -> State:
        """Return the state of rows without these pairs, which they absorbed.

        Raises:
            PolicyError: The memory cannot remove pairs.
        """
        raise PolicyError(f"what {type(self).__name__} remembers cannot be taken apart again")

    def state_bytes(self, head_dim: int, value_dim: int) -> int:
        """Return the bytes of one row's state."""
        return sum(x.nbytes for x in self.empty(1, head_dim, value_dim, "cpu").values())  # quicker than on "meta"


def log_count(count: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Return the log of a count, clamped to -1e30: -inf, the log of 0, would make gradients NaN."""
    return count.log().clamp_min(-1e30)


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """State of one layer's memory: row ``batch_idx * kv_heads + head`` as in the layer."""

    memory: Memory
    layer_idx: int
    state: State

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""
        return sum(x.nbytes for x in self.state.values())

    def absorb(self, evicted: EvictedPairs) -> "LayerMemory":
        """Return the memory after it absorbed these pairs too."""
        with torch.no_grad():
            return replace(self, state=self.memory.absorb(self.state, evicted))

    def release(self, evicted: EvictedPairs) -> "LayerMemory":
        """Return the memory without these pairs, which it absorbed."""
        with torch.no_grad():
            return replace(self, state=self.memory.release(self.state, evicted))

    def recall(
        self, query: Float[Tensor, "batch heads new head_dim"], rows: slice, scale: AttentionScale
    ) -> PartialAttention | AdditiveOutput:
        """Return the output of queries that read ``rows`` of the memory, ``batch heads new ...``.

        Queries are after RoPE, those of the batch rows that ``rows`` belong to.
        """
        every = rows.stop - rows.start == len(next(iter(self.state.values())))
        state = self.state if every else {name: x[rows] for name, x in self.state.items()}
        flat = query.float().reshape(rows.stop - rows.start, -1, query.shape[-1])
        found = self.memory.recall(state, MemoryQuery(layer_idx=self.layer_idx, queries=flat, scale=scale))
        output = found.output.reshape(*query.shape[:3], -1)
        if isinstance(found, AdditiveOutput):
            return AdditiveOutput(output)
        return PartialAttention(output, found.lse.reshape(query.shape[:3]))

    def select(self, rows: Sequence[int]) -> "LayerMemory":
        """Return the memory of these rows, in this order, sharing no storage."""
        return replace(self, state={name: x[torch.tensor(rows, device=x.device)] for name, x in self.state.items()})

    def copy(self) -> "LayerMemory":
        """Return an equal memory that shares no storage."""
        return replace(self, state={name: x.clone() for name, x in self.state.items()})


@dataclass
class AbsorbedRanges:
    """Ranges of positions, by batch row, with a pair that the memory of some layer absorbed.

    One list serves all layers and heads: it suffices to decide whether a span can be forgotten.
    """

    ranges: dict[int, tuple[Span, ...]] = field(default_factory=dict)
    replayable: dict[int, int] = field(default_factory=dict)
    """Tokens of a batch row that were read before the first eviction and never cropped or moved: reading them again
    reproduces their pairs."""
    released: tuple[Span, ...] = ()
    """Spans whose absorbed pairs were all released, in all batch rows."""

    def add(self, batch_idx: int, positions: Int[Tensor, " gone"], seen: int) -> None:
        """Add absorbed positions, in any order and with repeats, of a batch row that has seen ``seen`` tokens."""
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
        """Record a crop of each batch row to ``seen`` tokens."""
        self.replayable = {b: min(most, seen[b]) for b, most in self.replayable.items()}

    def move(self, position_map: PositionMap, batch: int) -> None:
        """Record that spans, later than all absorbed pairs, were removed from each batch row.

        The tokens after them saw the spans, so no replay without the spans reproduces their pairs.
        """
        start = position_map.spans[0].start
        self.replayable = {b: min(self.replayable.get(b, start), start) for b in range(batch)}
        self.released = position_map.over(self.released)

    def remove(self, span: Span) -> None:
        """Remove a span, which was released in all batch rows."""
        self.released = (*self.released, span)
        for batch_idx, ranges in self.ranges.items():
            cut = [Span(held.start, min(held.end, span.start)) for held in ranges if held.start < span.start]
            cut += [Span(max(held.start, span.end), held.end) for held in ranges if held.end > span.end]
            self.ranges[batch_idx] = tuple(sorted(cut))

    def overlaps(self, span: Span) -> bool:
        """Return True if any position of a span was absorbed, in any batch row."""
        return any(held.common(span) for row in self.ranges.values() for held in row)

    def was_released(self, span: Span) -> bool:
        """Return True if a part of a span was released before and then absorbed again."""
        return any(self.overlaps(part) for released in self.released if (part := released.common(span)))

    def copy(self) -> "AbsorbedRanges":
        """Return an independent copy, for a fork."""
        return AbsorbedRanges(dict(self.ranges), dict(self.replayable), self.released)

    def select(self, batch_rows: Sequence[int]) -> "AbsorbedRanges":
        """Return the ranges of these batch rows, in this order."""
        old_of = list(enumerate(batch_rows))
        ranges = {new: self.ranges[old] for new, old in old_of if old in self.ranges}
        replayable = {new: self.replayable[old] for new, old in old_of if old in self.replayable}
        return AbsorbedRanges(ranges, replayable, self.released)
