"""Pairs of one layer in flat columns: one segment with free slots per (batch row, KV head).

Dense and ragged layers share this storage. Until the first eviction all rows have one length, so a strided view of the
flat buffer is the ``(batch, kv_heads, seen, head_dim)`` tensor for plain attention. Pads have position -1; the first
eviction drops them.
"""

import math
import weakref
from collections.abc import Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from vestige.cache.forward_pass import ForwardPass
from vestige.cache.state import CacheState
from vestige.errors import CacheError, PolicyError
from vestige.kernels import packed
from vestige.kernels.packed import PAIR


class PairStorage:
    """Keys, values, positions and side arrays of one layer, each row with its own length.

    ``columns`` maps a name to a flat ``slots ...`` tensor; "keys", "values" and "positions" (int32) are always there.
    Row ``batch_idx * kv_heads + head`` owns ``starts[row]`` to ``starts[row] + lengths[row]``.
    """

    def __init__(self, state: CacheState, layer_idx: int) -> None:
        self._state = weakref.ref(state)
        self.layer_idx = layer_idx
        self.dtype, self.device = state.layout.model.dtype, state.layout.device
        self.columns: dict[str, Tensor] = {}
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.kv_heads = 0
        self.padded_seen = 0
        self.ragged = False
        self._capacity = 0
        self._free_slots = 0
        self._tails: Tensor | None = None
        self._slots: dict[int, tuple[slice, Tensor]] = {}

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Set sizes, dtype and device from the first pairs, ``batch kv_heads new dim``."""
        batch, self.kv_heads = keys.shape[:2]
        self.dtype, self.device = keys.dtype, keys.device
        self.columns = {name: x.new_empty(0, x.shape[-1]) for name, x in {"keys": keys, "values": values}.items()}
        self.columns["positions"] = torch.empty(0, dtype=torch.int32, device=self.device)
        self.starts = [0] * (batch * self.kv_heads)
        self.lengths = [0] * (batch * self.kv_heads)

    def truncate(self, left: Sequence[int]) -> None:
        """Keep the first ``left`` pairs of each row; the other slots become free, without a copy."""
        self._free_slots += min(old - new for old, new in zip(self.lengths, left, strict=True))
        self._capacity = self._capacity if len(set(left)) == 1 else 0
        self.lengths, self._tails = list(left), None

    @property
    def column_bytes(self) -> int:
        """Bytes of all columns, free slots included."""
        return sum(column.nbytes for column in self.columns.values())

    @property
    def state(self) -> CacheState:
        """The state of the cache that this layer belongs to."""
        state = self._state()
        if state is None:
            raise CacheError("the cache of this layer is gone; keep a reference to it while the model runs")
        return state

    @property
    def rows(self) -> int:
        """Number of rows: batch x KV heads."""
        return len(self.lengths)

    @property
    def batch_size(self) -> int:
        """Number of batch rows."""
        return self.rows // self.kv_heads if self.kv_heads else 0

    @property
    def pair_bytes(self) -> int:
        """Bytes of one pair of one row, position and side arrays included."""
        return sum(column.element_size() * math.prod(column.shape[1:]) for column in self.columns.values())

    @property
    def _pair_sizes(self) -> tuple[int, int]:
        return self.columns["keys"].shape[1], self.columns["values"].shape[1]

    @property
    def uniform(self) -> bool:
        """Whether all rows have one length and one capacity, so that a strided view covers them."""
        return self._capacity > 0

    def view(self, name: str) -> Shaped[Tensor, "batch kv_heads held *rest"]:
        """Return a column of a uniform layer without copying it."""
        return self._view_capacity(name).narrow(2, 0, self.lengths[0])

    def positions(self, row: int) -> Int[Tensor, " row_held"]:
        """Return the positions of one row's pairs, ascending; pads are -1."""
        return self.columns["positions"][self.slots_of_row(row)]

    def slots_of_row(self, row: int) -> slice:
        """Return the slots of one row's pairs."""
        return slice(self.starts[row], self.starts[row] + self.lengths[row])

    def slots_of_batch_row(self, b: int) -> tuple[slice, Int[Tensor, " slots"]]:
        """Return the slots of a batch row, free ones included, and the KV head of each; cached until pairs move."""
        if b not in self._slots:
            rows = [*self.starts, len(self.columns["positions"])][b * self.kv_heads : (b + 1) * self.kv_heads + 1]
            sizes = torch.tensor(rows).diff()
            self._slots[b] = (
                slice(rows[0], rows[-1]),
                torch.arange(self.kv_heads).repeat_interleave(sizes).to(self.device),
            )
        return self._slots[b]

    def annotations(self, row: int) -> dict[str, Tensor]:
        """Return views of one row's side arrays."""
        pairs = self.slots_of_row(row)
        return {name: column[pairs] for name, column in self.columns.items() if name not in PAIR}

    def stored_slots(self) -> Int[Tensor, " stored"]:
        """Return the packed slots of all pairs, pads included."""
        return packed.packed_slots(self.starts, self.lengths, self.device)

    def live_lengths(self) -> list[int]:
        """Return the number of pairs in each row, pads not counted."""
        return self.lengths if self.ragged else self.live_slots()[1]

    def live_slots(self) -> tuple[Int[Tensor, " held"], list[int]]:
        """Return the packed slots of all pairs that are not pads, and the number of pairs in each row."""
        slots = self.stored_slots()
        if self.ragged or not len(slots):
            return slots, self.lengths
        real = self.columns["positions"][slots] >= 0
        return slots[real], packed.counts_per_row(real, self.lengths)

    def packed_pairs(self) -> tuple[dict[str, Tensor], list[int]]:
        """Return keys, values and positions of all pairs that are not pads, and the number of pairs in each row."""
        slots, lengths = self.live_slots()
        return {name: packed.gather(self.columns[name], slots) for name in PAIR}, lengths

    def keep(self, slots: Int[Tensor, " kept"], lengths: Sequence[int], coming: int = 0) -> None:
        """Keep only the given slots and free the rest.

        Args:
            slots: Packed, ascending in each row.
            lengths: Number of slots in each row.
            coming: Tokens about to be stored; with 0 no row keeps a free slot.
        """
        self._rebuild(slots, list(lengths), coming=[coming] * len(lengths) if coming else None)
        self.ragged = True

    def shrink(self) -> None:
        """Release free slots, if there are any."""
        if self._free_slots:
            self._rebuild(self.stored_slots(), list(self.lengths))

    def _append(self, new: dict[str, Tensor], step: ForwardPass) -> list[int]:
        """Append new pairs to each row; return the number that each row got."""
        counts = [step.new] * self.rows
        source: Tensor | None = None
        if self.ragged and step.padded:  # a ragged layer stores no pads
            valid = (step.positions >= 0).repeat_interleave(self.kv_heads, 0)
            counts, source = valid.sum(1).tolist(), valid.flatten().nonzero()[:, 0]
        self._make_room(new, counts)
        autograd = torch.is_grad_enabled() and any(x.requires_grad for x in (*new.values(), *self.columns.values()))
        if self.uniform and source is None and not autograd:
            for name, x in new.items():
                self._view_capacity(name).narrow(2, self.lengths[0], step.new).copy_(x)
            return counts
        self._capacity = self._capacity if source is None else 0
        if step.new == 1 and source is None and not autograd:  # autograd keeps the index; it must not change
            slots = self._advance_tails()
        else:
            slots, self._tails = packed.packed_slots(self._ends, counts, self.device), None
        for name, x in new.items():
            flat = x.reshape(-1, *self.columns[name].shape[1:])
            flat = flat if source is None else flat[source]
            self.columns[name] = packed.append(self.columns[name], slots, flat.to(self.columns[name].dtype))
        return counts

    @property
    def _ends(self) -> list[int]:
        """The slot after the last pair of each row."""
        return [start + length for start, length in zip(self.starts, self.lengths, strict=True)]

    def _view_capacity(self, name: str) -> Shaped[Tensor, "batch kv_heads capacity *rest"]:
        """Return a column of a uniform layer as one tensor, free slots included, without copying it."""
        column = self.columns[name]
        return column.view(self.batch_size, self.kv_heads, self._capacity, *column.shape[1:])

    def _make_room(self, new: dict[str, Tensor], counts: list[int]) -> None:
        """Add empty columns for new side arrays, and free slots if some row has too few for its new pairs."""
        for name in new.keys() - self.columns.keys():
            if self.columns["positions"].shape[0]:
                raise PolicyError(f"pairs already in the cache have no {name!r}; give the policy before reading")
            self.columns[name] = new[name].new_empty(0, *new[name].shape[3:])
        if self._free_slots < max(counts):
            self._rebuild(self.stored_slots(), list(self.lengths), coming=counts)
        self._free_slots -= max(counts)

    def _advance_tails(self) -> Int[Tensor, " rows"]:
        """Return each row's next free slot; it is incremented in place, so a decode step makes no index tensor."""
        if self._tails is None:
            self._tails = torch.tensor(self._ends, device=self.device)
        else:
            self._tails += 1
        return self._tails

    def _rebuild(self, slots: Tensor, lengths: list[int], coming: Sequence[int] | None = None) -> None:
        """Copy the given slots to a new layout, column by column, so that at most one column exists twice at a time.

        An idle cache has no free slots. If pairs are ``coming``, every row gets slots for them and for the tokens until
        the next settle; the last coming pair counts as the first of these.
        """
        free = [0] * len(lengths) if coming is None else [max(n, 1) + self.state.growth_slots - 1 for n in coming]
        capacities = [length + n for length, n in zip(lengths, free, strict=True)]
        index = packed.layout_index(slots, lengths, capacities)
        highest = 0
        for name, column in self.columns.items():
            new_column = packed.gather(column, index)
            highest = max(highest, self.column_bytes + new_column.nbytes)
            self.columns[name] = new_column
        self.state.note_peak(highest - self.column_bytes)
        self.lengths, self.starts = lengths, packed.cumulative(capacities)[:-1]
        self._capacity = capacities[0] if len(set(lengths)) == len(set(capacities)) == 1 else 0
        self._free_slots, self._tails, self._slots = min(free, default=0), None, {}
