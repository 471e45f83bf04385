"""One evictable layer: the interface of its pairs to transformers, the cache and the attention function."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from vestige.cache.attention import KVHandle, attend_dense
from vestige.cache.forward_pass import ForwardPass
from vestige.cache.observers import notify_observers, unrotated_blocks
from vestige.cache.query_records import Record, record_class
from vestige.cache.state import CacheState
from vestige.cache.storage import PairStorage
from vestige.errors import CacheError, ModelError
from vestige.kernels import AttentionScale, packed, reference
from vestige.kernels.merge import AdditiveOutput, merge
from vestige.kernels.packed import PAIR
from vestige.memory.base import EvictedPairs, LayerMemory
from vestige.policies.observation import Observation, Phase


class RaggedLayer(PairStorage, CacheLayerMixin):
    """Pairs of one layer, statistics of its queries, and the memory of its evicted pairs."""

    is_sliding = False
    is_compileable = False
    is_croppable = True  # no settle happens between feeding candidates and removing the rejected ones
    supports_early_init = False

    def __init__(self, state: CacheState, layer_idx: int) -> None:
        CacheLayerMixin.__init__(self)
        PairStorage.__init__(self, state, layer_idx)
        self.step_number = 0
        """Number of the forward that stored pairs last."""
        self.rings: dict[str, Record] = {}
        """Latest queries and layer inputs, as many as policies need, and moments of all queries."""
        self.remains: LayerMemory | None = None
        """The memory's state for evicted pairs; None until it absorbs one."""
        self.attention: AttentionScale | None = None
        """Scale of the layer's attention; None until the first query."""
        self.hidden: Tensor | None = None
        """Input of the attention module in the current forward, if a policy needs it."""

    # Called by transformers.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take sizes, dtype and device from the first pairs."""
        self.allocate(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store new pairs; return handles that the attention function resolves to this layer.

        Args:
            key_states: ``batch kv_heads new head_dim``, after RoPE.
            value_states: ``batch kv_heads new value_dim``.

        Raises:
            CacheError: The model is not attached, or the batch is another one.
        """
        state = self.state
        step = state.take_step(self)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] * self.kv_heads != len(self.lengths):
            raise CacheError(f"the cache holds {self.batch_size} batch rows, but {key_states.shape[0]} were fed")
        new = {"keys": key_states, "values": value_states}
        new |= state.annotate(self.layer_idx, self.hidden, key_states, value_states)
        if self.hidden is not None:
            self.record("hidden", self.hidden[:, None], step)
        new["positions"] = step.positions[:, None].expand(-1, self.kv_heads, -1)
        counts = self._append(new, step)
        # The new pairs count from here on: an interrupt before this line leaves no trace.
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]
        self.padded_seen += step.new
        self.step_number = step.number
        return self._make_handle(key_states), self._make_handle(value_states)

    def get_seq_length(self) -> int:
        """Return the padded logical length, the base of positions and masks; not the pairs held."""
        return self.padded_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (kv_length, kv_offset): all tokens while dense, only the new ones after an eviction."""
        if self.ragged:
            return query_length, self.padded_seen
        return self.padded_seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the layer grows as needed."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Remove all pairs; the next ones set the sizes again."""
        vars(self).update(vars(RaggedLayer(self.state, self.layer_idx)))

    def crop(self, tokens_to_remove: int) -> None:
        """Free the slots of the last ``-tokens_to_remove`` tokens, without a copy.

        Evicted pairs do not come back, and absorbed ones stay in the memory. The cache calls this after it set the new
        length of each row. It crops query records separately, since tokens that are rolled back are not recorded.
        """
        if not self.is_initialized:
            return
        if self.ragged:
            seen = self.state.seen
            left = [int((self.positions(row) < seen[row // self.kv_heads]).sum()) for row in range(self.rows)]
        else:  # pads are stored too, and all rows have one length
            left = [length + tokens_to_remove for length in self.lengths]
        self.truncate(left)
        self.padded_seen += tokens_to_remove

    def crop_records(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Remove queries and hidden states of tokens that were cropped."""
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
        slots = packed.packed_slots([self.starts[row] for row in rows], lengths, self.device)
        self._rebuild(slots, lengths)
        self.rings = {name: ring.select(batch_rows) for name, ring in self.rings.items()}
        self.remains = self.remains and self.remains.select(rows)

    # Called by the cache and the attention function.

    @property
    def nbytes(self) -> int:
        """Bytes of live storage: columns with their free slots, rings, and the memory."""
        return self.column_bytes + self._ring_bytes + self.memory_bytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of the memory of evicted pairs; part of ``nbytes``."""
        return self.remains.nbytes if self.remains else 0

    @property
    def fixed_bytes(self) -> int:
        """Bytes that no eviction frees, including those that the memory needs from the first eviction on."""
        if self.state.bound_memory is None or not self.columns:
            return self._ring_bytes
        return self._ring_bytes + self.rows * self.state.bound_memory.state_bytes(*self._pair_sizes)

    @property
    def _ring_bytes(self) -> int:
        return sum(ring.nbytes for ring in self.rings.values())

    @property
    def dynamic_bytes(self) -> int:
        """Bytes that a DynamicCache would need for this layer."""
        sizes = [self.columns[name] for name in ("keys", "values")] if self.columns else []
        return sum(self.rows * self.padded_seen * x.shape[-1] * x.element_size() for x in sizes)

    def observe(
        self,
        phase: Phase,
        seen: tuple[int, ...],
        pair_limits: Sequence[int],
        slots: Int[Tensor, " held"],
        lengths: Sequence[int],
    ) -> Observation:
        """Return this layer's packed pairs and statistics for the policy.

        Args:
            phase: Prefill or decode.
            seen: Tokens of each batch row.
            pair_limits: Average pairs per row that each batch row may hold.
            slots: Slots of all pairs that are not pads.
            lengths: Number of these in each row.
        """
        latest = {name: ring.latest(seen) for name, ring in self.rings.items()}
        columns = {name: packed.gather(column.detach(), slots) for name, column in self.columns.items()}
        return Observation(
            layer_idx=self.layer_idx,
            phase=phase,
            kv_heads=self.kv_heads,
            seen=seen,
            pair_limits=tuple(pair_limits),
            cu_seqlens=tuple(packed.cumulative(lengths)),
            keys=columns.pop("keys"),
            values=columns.pop("values"),
            positions=columns.pop("positions"),
            queries=latest.get("queries", ()),
            hidden=tuple(x[0] for x in latest.get("hidden", ())),
            query_moments=latest.get("query_moments", ()),
            rope=self.state.rope,
            module=self.state.layout.attentions[self.layer_idx],
            model=self.state.layout.model,
            attention=self.attention,
            annotations=columns,
        )

    def absorb_evicted(self, slots: Int[Tensor, " evicted"], lengths: Sequence[int]) -> LayerMemory | None:
        """Return the layer's memory after absorbing the pairs in these packed slots; the layer is not changed."""
        memory = self.state.bound_memory
        if memory is None or not len(slots):
            return self.remains
        evicted = EvictedPairs.of(self.layer_idx, self.columns, slots, lengths)
        self.state.note_peak(evicted.nbytes)
        empty = memory.empty(self.rows, *self._pair_sizes, self.device) if self.remains is None else {}
        before = self.remains or LayerMemory(memory=memory, layer_idx=self.layer_idx, state=empty)
        return before.absorb(evicted)

    def record(self, name: str, new: Float[Tensor, "batch heads new dim"], step: ForwardPass) -> None:
        """Record new rows of a kind, if any policy needs them."""
        size = self.state.recording.ring_sizes.get(name, 0)
        if size:
            if name not in self.rings:
                self.rings[name] = record_class(name).like(new, size, step.seen)
                self.state.note_peak()
            self.rings[name].record(new.detach(), step)

    def is_missing(self, names: Iterable[str]) -> bool:
        """Tell whether a crop removed all rows of one of these records."""
        return any(self.rings[name].is_blank(self.state.seen) for name in names if name in self.rings)

    def attend(
        self,
        module: nn.Module,
        query: Float[Tensor, "batch heads new head_dim"],
        mask: Tensor | None,
        scale: AttentionScale,
        position_bias: Tensor | None,
        options: dict[str, Any],
    ) -> Float[Tensor, "batch new heads value_dim"]:
        """Attend over the stored pairs: by plain attention while the layer is dense, else by the ragged kernel.

        Raises:
            ModelError: The model adds position biases, which a ragged layer cannot apply.
        """
        state = self.state
        assert state.step is not None, "update has refused a forward that was never begun"
        if getattr(module, "layer_idx", self.layer_idx) == self.layer_idx:  # not a consumer of shared pairs
            self._observe_queries(query, state, state.step, scale)
        if self.ragged:
            if position_bias is not None:
                raise ModelError("position biases have no place beside evicted pairs; this model cannot be evicted")
            return self._attend_ragged(query, state.step, scale).transpose(1, 2).contiguous()
        keys, values = self.view("keys"), self.view("values")
        return attend_dense(module, query, keys, values, mask, scale, position_bias, options)

    def drop_unused(self, annotations: frozenset[str], ring_sizes: Mapping[str, int]) -> None:
        """Drop all other side arrays and rings, and shrink rings to these sizes."""
        self.columns = {name: x for name, x in self.columns.items() if name in PAIR or name in annotations}
        kept = {name: ring for name, ring in self.rings.items() if ring_sizes.get(name)}
        self.rings = {
            name: ring if ring.size == ring_sizes[name] else ring.shrink_to(ring_sizes[name], self.state.seen)
            for name, ring in kept.items()
        }

    def copy_to(self, state: CacheState) -> "RaggedLayer":
        """Return an equal layer for another cache's state; they share no memory."""
        copy = RaggedLayer(state, self.layer_idx)
        for name, value in vars(self).items():
            if name not in ("_state", "layer_idx", "hidden", "_tails", "_slots"):
                setattr(copy, name, value)
        copy.columns = {name: column.detach().clone() for name, column in self.columns.items()}
        copy.starts, copy.lengths = list(self.starts), list(self.lengths)
        copy.rings = {name: ring.copy() for name, ring in self.rings.items()}
        copy.remains = self.remains and self.remains.copy()
        return copy

    def restore(
        self, columns: dict[str, Tensor], lengths: list[int], kv_heads: int, padded_seen: int, ragged_rows: bool
    ) -> None:
        """Fill an empty layer with packed columns, as :mod:`vestige.cache.serialization` saved them."""
        self.kv_heads, self.padded_seen, self.ragged = kv_heads, padded_seen, ragged_rows
        self.columns, self.is_initialized, self.step_number = columns, True, 1
        self.dtype, self.device = columns["keys"].dtype, columns["keys"].device
        self._rebuild(torch.arange(sum(lengths), device=self.device), list(lengths))

    # Attention.

    def _observe_queries(self, query: Tensor, state: CacheState, step: ForwardPass, scale: AttentionScale) -> None:
        """Record new queries, whose pairs are stored already, and pass them to observers."""
        recording = state.recording
        self.attention = scale
        self.record("queries", query, step)
        if "query_moments" in recording.ring_sizes:
            assert state.rope is not None, "moments are recorded for policies that need the rotation"
            for block, part in unrotated_blocks(query.detach(), step, state.rope, self.layer_idx):
                self.record("query_moments", block, part)
        hidden, self.hidden = self.hidden, None
        if recording.has_observers:
            notify_observers(recording, state.layout.model, self, query.detach(), hidden, step, scale)

    def _attend_ragged(self, query: Tensor, step: ForwardPass, scale: AttentionScale) -> Tensor:
        """Attend over rows of different lengths; the output at pads, which have no pairs, is 0."""
        if not step.padded:
            return self._attend_rows(query, slice(0, self.rows), scale)
        out = query.new_zeros(*query.shape[:3], self.columns["values"].shape[-1])
        missing = step.new - query.shape[2]  # KV-shared layers may get the last tokens only
        for b in range(query.shape[0]):
            rows, real = slice(b * self.kv_heads, (b + 1) * self.kv_heads), step.find_valid(b)
            real = real[real >= missing] - missing
            if len(real):
                out[b][:, real] = self._attend_rows(query[b : b + 1, :, real], rows, scale)[0]
        return out

    def _attend_rows(self, query: Tensor, rows: slice, scale: AttentionScale) -> Tensor:
        """Attend over some rows and the memory of their evicted pairs; no query is a pad."""
        keys, values = self.columns["keys"], self.columns["values"]
        pairs = (query, keys, values, self.starts[rows], self.lengths[rows], scale)
        if self.remains is None:
            return reference.attend(*pairs)
        recalled = self.remains.recall(query, rows, scale)
        if isinstance(recalled, AdditiveOutput):
            return reference.attend(*pairs) + recalled.output.to(query.dtype)
        return merge(reference.attend_partially(*pairs), recalled).to(query.dtype)

    # Storage.

    def _make_handle(self, new: Tensor) -> KVHandle:
        batch, heads, _, size = new.shape
        return KVHandle(self, torch.Size((batch, heads, self.padded_seen, size)), self.dtype, self.device)
