"""Storage of one model layer: flat columns of pairs, one segment with slack per (batch row, KV head).

Dense and ragged are one storage. While nothing was evicted all rows have one length, so a strided view of the flat
buffer is the ``(batch, kv_heads, seen, head_dim)`` tensor that plain attention wants. Pads have position -1: they are
stored while the layer is dense and go with the first eviction.
"""

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from vestige.cache.forward_pass import ForwardPass
from vestige.cache.handle import KVHandle
from vestige.cache.observers import show
from vestige.cache.query_records import Record, kind_of
from vestige.errors import CacheError, PolicyError
from vestige.kernels import AttentionScale
from vestige.kernels import packed as ragged
from vestige.kernels.packed import PAIR
from vestige.memory.base import EvictedPairs, LayerMemory
from vestige.policies.observation import Observation, Phase

if TYPE_CHECKING:
    from vestige.cache.kv_cache import KVCache

_BLOCK = 1024
"""Queries whose moments are counted in at once."""


class RaggedLayer(CacheLayerMixin):
    """Keys, values, positions and side arrays of one layer, each row with its own length.

    ``columns`` maps a name to a flat ``slots ...`` tensor; "keys", "values" and "positions" (int32) are always there.
    Row ``batch_idx * kv_heads + head`` owns ``starts[row]`` to ``starts[row] + lengths[row]``.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True  # nothing is evicted between candidates being fed and some of them being taken back
    supports_early_init = False

    def __init__(self, cache: "KVCache", layer_idx: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = weakref.ref(cache)
        self.layer_idx = layer_idx
        self.dtype, self.device = cache.anatomy.model.dtype, cache.anatomy.device
        self.columns: dict[str, Tensor] = {}
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.kv_heads = 0
        self.padded_seen = 0
        self.ragged = False
        self.rings: dict[str, Record] = {}
        """The latest queries, and what enters the layer, as far as policies look back; and moments of all queries."""
        self.remains: LayerMemory | None = None
        """What the cache's memory knows of evicted pairs; None until it absorbed one."""
        self.attention: AttentionScale | None = None
        self.hidden: Tensor | None = None
        self._capacity = 0
        self._free_slots = 0
        self.step_number = 0
        self._tails: Tensor | None = None
        self._slots: dict[int, tuple[slice, Tensor]] = {}

    # What transformers calls.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take sizes, dtype and device from the first pairs."""
        batch, self.kv_heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        empty = {"keys": key_states, "values": value_states}
        self.columns = {name: x.new_empty(0, x.shape[-1]) for name, x in empty.items()}
        self.columns["positions"] = torch.empty(0, dtype=torch.int32, device=self.device)
        self.starts, self.lengths = [0] * (batch * self.kv_heads), [0] * (batch * self.kv_heads)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store new pairs; return handles that lead the attention function back to this layer.

        Args:
            key_states: ``batch kv_heads new head_dim``, after RoPE.
            value_states: ``batch kv_heads new value_dim``.

        Raises:
            CacheError: The model is not attached, or the batch is another one.
        """
        step = self.cache.take_step(self)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] * self.kv_heads != len(self.lengths):
            raise CacheError(f"the cache holds {self.batch_size} batch rows, but {key_states.shape[0]} were fed")
        new = {"keys": key_states, "values": value_states}
        new |= self.cache.annotate(self.layer_idx, self.hidden, key_states, value_states)
        if self.hidden is not None:
            self.record("hidden", self.hidden[:, None], step)
        new["positions"] = step.positions[:, None].expand(-1, self.kv_heads, -1)
        fed = self._append(new, step)
        # Only now do the new pairs count: what an interrupt cuts short before was never there.
        self.lengths = [length + n for length, n in zip(self.lengths, fed, strict=True)]
        self.padded_seen += step.new
        self.step_number = step.number
        return self._handle(key_states), self._handle(value_states)

    def get_seq_length(self) -> int:
        """Return the padded logical length, which positions and masks are made from; not the pairs held."""
        return self.padded_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (kv_length, kv_offset): everything while dense; only the new tokens once pairs were evicted."""
        if self.ragged:
            return query_length, self.padded_seen
        return self.padded_seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the layer grows as needed."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget all pairs; sizes are taken anew from the next ones."""
        fresh = RaggedLayer(self.cache, self.layer_idx)
        self.__dict__.update(fresh.__dict__)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the slots of the last ``-tokens_to_remove`` tokens; what was evicted before does not come back, and what
        a memory absorbed stays there.

        The slots become slack, so nothing is copied. Called by the cache, which knows the new length of each row.
        Records of queries are cropped by themselves: what is fed aside is not recorded.
        """
        if not self.is_initialized:
            return
        if self.ragged:
            seen = self.cache.seen
            left = [int((self.positions(row) < seen[row // self.kv_heads]).sum()) for row in range(self.rows)]
        else:  # pads are stored too, and all rows have one length
            left = [length + tokens_to_remove for length in self.lengths]
        self._free_slots += min(old - new for old, new in zip(self.lengths, left, strict=True))
        self._capacity = self._capacity if len(set(left)) == 1 else 0
        self.lengths, self._tails = left, None
        self.padded_seen += tokens_to_remove

    def crop_records(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Forget queries and hidden states of tokens that were taken back."""
        for ring in self.rings.values():
            ring.crop(before, after)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace batch row b by batch row ``beam_idx[b]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row in place."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows in the given order, repeats allowed."""
        if not self.is_initialized:
            return
        batch_rows = torch.arange(self.batch_size)[indices.cpu()].tolist()
        rows = [b * self.kv_heads + h for b in batch_rows for h in range(self.kv_heads)]
        lengths = [self.lengths[row] for row in rows]
        slots = ragged.packed_slots([self.starts[row] for row in rows], lengths, self.device)
        self._rebuild(slots, lengths)
        self.rings = {name: ring.select(batch_rows) for name, ring in self.rings.items()}
        self.remains = self.remains and self.remains.select(rows)

    # What the cache and the attention function call.

    @property
    def cache(self) -> "KVCache":
        """The cache that this layer belongs to."""
        cache = self._cache()
        if cache is None:
            raise CacheError("the cache of this layer is gone; keep a reference to it while the model runs")
        return cache

    def belong_to(self, cache: "KVCache") -> None:
        """Become a layer of another cache of the same model."""
        self._cache = weakref.ref(cache)

    @property
    def rows(self) -> int:
        """Number of rows: batch x KV heads."""
        return len(self.lengths)

    @property
    def batch_size(self) -> int:
        """Batch rows stored."""
        return self.rows // self.kv_heads if self.kv_heads else 0

    @property
    def nbytes(self) -> int:
        """Bytes of live storage: columns with their slack, rings, and what a memory keeps."""
        return sum(column.nbytes for column in self.columns.values()) + self._ring_bytes + self.memory_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of what remains of evicted pairs; part of ``nbytes``."""
        return self.remains.nbytes if self.remains else 0

    @property
    def fixed_bytes(self) -> int:
        """Bytes that no eviction frees, those that a memory takes from the first eviction on included."""
        if self.cache.bound_memory is None or not self.columns:
            return self._ring_bytes
        return self._ring_bytes + self.rows * self.cache.bound_memory.state_bytes(*self._pair_sizes)

    @property
    def _ring_bytes(self) -> int:
        return sum(ring.nbytes for ring in self.rings.values())

    @property
    def _pair_sizes(self) -> tuple[int, int]:
        return self.columns["keys"].shape[1], self.columns["values"].shape[1]

    @property
    def pair_bytes(self) -> int:
        """Bytes of one pair of one row, position and side arrays included."""
        return sum(column.element_size() * math.prod(column.shape[1:]) for column in self.columns.values())

    @property
    def dynamic_bytes(self) -> int:
        """What a DynamicCache would take for this layer."""
        sizes = [self.columns[name] for name in ("keys", "values")] if self.columns else []
        return sum(self.rows * self.padded_seen * x.shape[-1] * x.element_size() for x in sizes)

    @property
    def uniform(self) -> bool:
        """Whether all rows have one length and one capacity, so that a strided view shows them as one tensor."""
        return self._capacity > 0

    def view(self, name: str) -> Shaped[Tensor, "batch kv_heads held *rest"]:
        """Return a column of a uniform layer without copying it."""
        return self._spread(name).narrow(2, 0, self.lengths[0])

    def positions(self, row: int) -> Int[Tensor, " row_held"]:
        """Return the positions of one row's pairs, ascending; pads are -1."""
        start = self.starts[row]
        return self.columns["positions"][start : start + self.lengths[row]]

    def live_lengths(self) -> list[int]:
        """Return the pairs of each row, pads left out."""
        return self.lengths if self.ragged else self.live_slots()[1]

    def live_slots(self) -> tuple[Int[Tensor, " held"], list[int]]:
        """Return the slots of all pairs that are not pads, packed, and the length of each row."""
        slots = ragged.packed_slots(self.starts, self.lengths, self.device)
        if self.ragged or not len(slots):
            return slots, self.lengths
        real = self.columns["positions"][slots] >= 0
        return slots[real], ragged.counts_per_row(real, self.lengths)

    def packed(self) -> tuple[dict[str, Tensor], list[int]]:
        """Return keys, values and positions of all pairs that are not pads, and the length of each row."""
        slots, lengths = self.live_slots()
        return {name: ragged.gather(self.columns[name], slots) for name in PAIR}, lengths

    def observe(
        self,
        phase: Phase,
        seen: tuple[int, ...],
        pair_limits: Sequence[int],
        slots: Int[Tensor, " held"],
        lengths: Sequence[int],
    ) -> Observation:
        """Return what a policy may see of this layer, packed."""
        latest = {name: ring.latest(seen) for name, ring in self.rings.items()}
        packed = {name: ragged.gather(column.detach(), slots) for name, column in self.columns.items()}
        return Observation(
            layer_idx=self.layer_idx,
            phase=phase,
            kv_heads=self.kv_heads,
            seen=seen,
            pair_limits=tuple(pair_limits),
            cu_seqlens=tuple(ragged.cumulative(lengths)),
            keys=packed.pop("keys"),
            values=packed.pop("values"),
            positions=packed.pop("positions"),
            queries=latest.get("queries", ()),
            hidden=tuple(x[0] for x in latest.get("hidden", ())),
            query_moments=latest.get("query_moments", ()),
            rope=self.cache.rope,
            module=self.cache.anatomy.attentions[self.layer_idx],
            model=self.cache.anatomy.model,
            attention=self.attention,
            annotations=packed,
        )

    def keep(self, slots: Int[Tensor, " kept"], lengths: Sequence[int], coming: int = 0) -> None:
        """Hold only the given slots (packed, ascending in each row) and free the rest; have room if tokens come."""
        self._rebuild(slots, list(lengths), coming=[coming] * len(lengths) if coming else None)
        self.ragged = True

    def absorb_evicted(self, slots: Int[Tensor, " gone"], lengths: Sequence[int]) -> LayerMemory | None:
        """Return what remains of evicted pairs once these slots (packed) go too; the layer is not changed."""
        memory = self.cache.bound_memory
        if memory is None or not len(slots):
            return self.remains
        evicted = EvictedPairs.of(self.layer_idx, self.columns, slots, lengths)
        self.cache.note_peak(evicted.nbytes)
        empty = memory.empty(self.rows, *self._pair_sizes, self.device) if self.remains is None else {}
        before = self.remains or LayerMemory(memory=memory, layer_idx=self.layer_idx, state=empty)
        return before.absorb(evicted)

    def record(self, name: str, new: Float[Tensor, "batch heads new dim"], step: ForwardPass) -> None:
        """Remember the latest rows of a kind, if any policy looks back at them."""
        size = self.cache.recording.ring_sizes.get(name, 0)
        if size:
            if name not in self.rings:
                self.rings[name] = kind_of(name).like(new, size, step.seen)
                self.cache.note_peak()
            self.rings[name].record(new.detach(), step)

    def is_missing(self, names: Iterable[str]) -> bool:
        """Return whether all that one of these records knew was taken back, so that nobody can look at it."""
        return any(self.rings[name].blank(self.cache.seen) for name in names if name in self.rings)

    def show(self, query: Float[Tensor, "batch heads new head_dim"], step: ForwardPass, scale: AttentionScale) -> None:
        """Show new queries to what looks at every query, row by row; their own pairs are stored already."""
        self.attention = scale
        self.record("queries", query, step)
        if "query_moments" in self.cache.recording.ring_sizes:
            self._record_moments(query.detach(), step)
        hidden, self.hidden = self.hidden, None
        if self.cache.recording.watched:
            show(self, query.detach(), hidden, step, scale)

    def slots_of(self, b: int) -> tuple[slice, Int[Tensor, " slots"]]:
        """Return the slots of a batch row, free ones included, and the KV head of each; the same until some move."""
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
        pairs = slice(self.starts[row], self.starts[row] + self.lengths[row])
        return {name: column[pairs] for name, column in self.columns.items() if name not in PAIR}

    def shrink(self) -> None:
        """Give free slots back, if there are any."""
        if self._free_slots:
            self._rebuild(ragged.packed_slots(self.starts, self.lengths, self.device), list(self.lengths))

    def _record_moments(self, query: Float[Tensor, "batch heads new head_dim"], step: ForwardPass) -> None:
        """Count queries in as they were before RoPE, in blocks: turned back in float32, all of a text would weigh."""
        rope = self.cache.rope
        assert rope is not None, "moments are recorded for policies that need the rotation"
        for start in range(0, step.new, _BLOCK):
            part = replace(step, positions=step.positions[:, start : start + _BLOCK])
            block = query[:, :, start : start + _BLOCK].float()
            self.record("query_moments", rope.unrotate(block, part.positions, self.layer_idx), part)

    def drop_unused(self, annotations: frozenset[str], ring_sizes: Mapping[str, int]) -> None:
        """Forget side arrays and rings beyond those named, and make rings as short as asked."""
        self.columns = {name: x for name, x in self.columns.items() if name in PAIR or name in annotations}
        kept = {name: ring for name, ring in self.rings.items() if ring_sizes.get(name)}
        self.rings = {
            name: ring if ring.size == ring_sizes[name] else ring.shrunk(ring_sizes[name], self.cache.seen)
            for name, ring in kept.items()
        }

    def copy_to(self, cache: "KVCache") -> "RaggedLayer":
        """Return an equal layer of another cache, sharing no memory."""
        twin = RaggedLayer(cache, self.layer_idx)
        for name, value in vars(self).items():
            if name not in ("_cache", "layer_idx", "hidden", "_tails", "_slots"):
                setattr(twin, name, value)
        twin.columns = {name: column.detach().clone() for name, column in self.columns.items()}
        twin.starts, twin.lengths = list(self.starts), list(self.lengths)
        twin.rings = {name: ring.copy() for name, ring in self.rings.items()}
        twin.remains = self.remains and self.remains.copy()
        return twin

    def restore(
        self, columns: dict[str, Tensor], lengths: list[int], kv_heads: int, padded_seen: int, ragged_rows: bool
    ) -> None:
        """Take over packed columns, as :mod:`vestige.cache.serialization` saved them."""
        self.kv_heads, self.padded_seen, self.ragged = kv_heads, padded_seen, ragged_rows
        self.columns, self.is_initialized, self.step_number = columns, True, 1
        self.dtype, self.device = columns["keys"].dtype, columns["keys"].device
        self._rebuild(torch.arange(sum(lengths), device=self.device), list(lengths))

    # Storage.

    def _append(self, new: dict[str, Tensor], step: ForwardPass) -> list[int]:
        """Write new pairs behind each row's, and return how many each row got."""
        fed = [step.new] * self.rows
        source: Tensor | None = None
        if self.ragged and step.padded:  # pads are not stored beside evicted rows
            valid = (step.positions >= 0).repeat_interleave(self.kv_heads, 0)
            fed, source = valid.sum(1).tolist(), valid.flatten().nonzero()[:, 0]
        for name in new.keys() - self.columns.keys():
            self.columns[name] = self._empty_column(name, new[name])
        if self._free_slots < max(fed):
            slots = ragged.packed_slots(self.starts, self.lengths, self.device)
            self._rebuild(slots, list(self.lengths), coming=fed)
        self._free_slots -= max(fed)
        autograd = torch.is_grad_enabled() and any(x.requires_grad for x in (*new.values(), *self.columns.values()))
        if self.uniform and source is None and not autograd:
            for name, x in new.items():
                self._spread(name).narrow(2, self.lengths[0], step.new).copy_(x)
            return fed
        self._capacity = self._capacity if source is None else 0
        if step.new == 1 and source is None and not autograd:  # autograd keeps the index, which counting up would spoil
            slots = self._next_slots()
        else:
            ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
            slots, self._tails = ragged.packed_slots(ends, fed, self.device), None
        for name, x in new.items():
            packed = x.reshape(-1, *self.columns[name].shape[1:])
            packed = packed if source is None else packed[source]
            self.columns[name] = ragged.append(self.columns[name], slots, packed.to(self.columns[name].dtype))
        return fed

    def _spread(self, name: str) -> Shaped[Tensor, "batch kv_heads capacity *rest"]:
        """Return a column of a uniform layer as one tensor, slack and all, without copying it."""
        column = self.columns[name]
        return column.view(self.batch_size, self.kv_heads, self._capacity, *column.shape[1:])

    def _empty_column(self, name: str, like: Tensor) -> Tensor:
        if self.columns["positions"].shape[0]:
            raise PolicyError(f"pairs already in the cache have no {name!r}; give the policy before reading")
        return like.new_empty(0, *like.shape[3:])

    def _next_slots(self) -> Int[Tensor, " rows"]:
        """Return each row's next free slot, counted up in place: a decode step makes no index tensor."""
        if self._tails is None:
            ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
            self._tails = torch.tensor(ends, device=self.device)
        else:
            self._tails += 1
        return self._tails

    def _rebuild(self, slots: Tensor, lengths: list[int], coming: Sequence[int] | None = None) -> None:
        """Lay the chosen slots out anew, column by column, so that at most one column exists twice at a time.

        A cache at rest has no free slots. Where pairs are ``coming``, every row gets room for them, the last one being
        the first of the slack for the tokens until the next settle.
        """
        room = [0] * len(lengths) if coming is None else [max(n, 1) + self.cache.growth_slots - 1 for n in coming]
        capacities = [length + n for length, n in zip(lengths, room, strict=True)]
        index = ragged.layout_index(slots, lengths, capacities)
        highest = 0
        for name, column in self.columns.items():
            laid_out = ragged.gather(column, index)
            highest = max(highest, self.nbytes + laid_out.nbytes)
            self.columns[name] = laid_out
        self.cache.note_peak(highest - self.nbytes)
        self.lengths, self.starts = lengths, ragged.cumulative(capacities)[:-1]
        self._capacity = capacities[0] if len(set(lengths)) == len(set(capacities)) == 1 else 0
        self._free_slots, self._tails, self._slots = min(room, default=0), None, {}

    def _handle(self, new: Tensor) -> KVHandle:
        batch, heads, _, size = new.shape
        return KVHandle(self, torch.Size((batch, heads, self.padded_seen, size)), self.dtype, self.device)
