"""The bookkeeping that a cache shares with its layers: tokens fed, statistics recorded, spans erased, costs."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vestige.budget import UNLIMITED, Budget, Footprint
from vestige.cache.forward_pass import ForwardPass
from vestige.cache.recording import RecordingSpec
from vestige.cache.schedule import Schedule
from vestige.cache.token_history import TokenHistory, check_positions
from vestige.errors import CacheError, InputError, PolicyError
from vestige.memory.base import AbsorbedRanges, Memory
from vestige.models.layout import ModelLayout
from vestige.models.rope import Rope
from vestige.policies.base import NeedsReplay, NewPairs, Policy
from vestige.policies.observation import RowView
from vestige.spans import PositionMap, Span, merge_spans, within


@runtime_checkable
class EvictableLayer(Protocol):
    """The part of an evictable layer that the bookkeeping reads."""

    kv_heads: int
    padded_seen: int
    step_number: int

    @property
    def nbytes(self) -> int:
        """Bytes of live storage."""

    @property
    def pair_bytes(self) -> int:
        """Bytes of one pair of one row."""

    @property
    def fixed_bytes(self) -> int:
        """Bytes that no eviction frees."""


class CacheState:
    """Policy, memory, token history, schedule and counters of one cache.

    The cache owns its state; layers refer to it weakly, so that storage dies with the cache.

    Args:
        layout: Layout of the model that fills the cache.
        policy: Chooses the pairs to keep.
        observers: Policies whose statistics are recorded; the policy is one of them.
        memory: Summarises evicted pairs; None forgets them.
    """

    def __init__(self, layout: ModelLayout, policy: Policy, observers: Sequence[Policy], memory: Memory | None) -> None:
        self.layout = layout
        self.policy = policy
        self.memory = memory
        self.bound_memory = memory and memory.bind(layout.model)
        """The memory, bound to its weights for this model."""
        self.recording = RecordingSpec.of(observers)
        self.recording.check_model(layout)
        self.storage: Sequence[EvictableLayer] = ()
        """The evictable layers."""
        self.schedule = Schedule()
        self.history = TokenHistory()
        self.step: ForwardPass | None = None
        self.seen: tuple[int, ...] = ()
        """Tokens of each batch row, pads not counted."""
        self.lengths: tuple[int, ...] | None = None
        """Announced full length of each batch row; fraction budgets refer to it."""
        self.reading_to: tuple[int, ...] | None = None
        """Length of each batch row at the end of the current prefill; replaces a length that was not announced."""
        self.pins: tuple[Span, ...] = ()
        self.erased: tuple[Span, ...] = ()
        """Erased spans that kept their positions; every replay of the ids skips them."""
        self.absorbed = AbsorbedRanges()
        self.prepared = False
        """Whether the policy has run its own forwards over all tokens read."""
        self.outer_input_ids: Tensor | None = None
        """Ids passed to the outer model, for decoders that get embeddings."""
        self.peak_kv_bytes = 0
        self.evict_s = 0.0
        self.annotate_s = 0.0

    @property
    def rope(self) -> Rope | None:
        """Rotations of the layers, if a recorded statistic needs them."""
        return self.layout.rope() if self.recording.needs_rope else None

    @property
    def growth_slots(self) -> int:
        """Free slots that each row gets when tokens arrive: enough until the next settle. An idle cache has none."""
        return self.policy.every

    @property
    def padded(self) -> bool:
        """Whether any batch row contains pads."""
        return any(layer.padded_seen != n for layer in self.storage[:1] for n in self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of live storage of the evictable layers."""
        return sum(layer.nbytes for layer in self.storage)

    def note_peak(self, extra: int = 0) -> None:
        """Record the largest number of bytes so far; ``extra`` counts a copy under construction."""
        self.peak_kv_bytes = max(self.peak_kv_bytes, self.nbytes + extra)

    def raise_peak(self, nbytes: int) -> None:
        """Record a peak that another cache reached on behalf of this one."""
        self.peak_kv_bytes = max(self.peak_kv_bytes, nbytes)

    # Budget.

    def footprint(self) -> Footprint:
        """Return the size of one batch row."""
        batch = max(len(self.seen), 1)
        pair_bytes = sum(layer.pair_bytes * layer.kv_heads for layer in self.storage)
        return Footprint(
            rows=sum(layer.kv_heads for layer in self.storage),
            pair_bytes=pair_bytes * batch,  # a budget in bytes is the whole cache's: batch rows share it evenly
            fixed_bytes=sum(layer.fixed_bytes for layer in self.storage) + pair_bytes * batch * self.growth_slots,
        )

    def pair_limits(self, *, reading: bool = False) -> list[int]:
        """Return the average number of pairs per row that each batch row may hold after a settle.

        Args:
            reading: Whether chunks follow, so that the policy's reading slack applies.
        """
        budget = self.policy.budget
        if budget is None:
            return [UNLIMITED] * len(self.seen)
        factor = self.policy.reading_slack if reading else 1.0
        footprint, protected = self.footprint(), self.policy.protected
        ends = self.reading_to or self.seen
        pairs = [
            budget.pairs(seen=end, length=length, protected=protected, footprint=footprint)
            for end, length in zip(ends, self.lengths or (None,) * len(ends), strict=True)
        ]
        return [Budget.slacken(n, factor) for n in pairs]

    def announce(self, length: int | Sequence[int] | None, batch: int) -> None:
        """Set the full length of each batch row, to which fraction budgets refer from now on.

        Args:
            length: Tokens, for all batch rows or for each; None keeps the lengths announced before.
            batch: Number of batch rows.

        Raises:
            BudgetError: The budget for one of these lengths is below the protected pairs.
            InputError: The number of lengths is not the number of batch rows.
        """
        lengths = None if length is None else (length,) * batch if isinstance(length, int) else tuple(length)
        if lengths is not None and len(lengths) != batch:
            raise InputError(f"{len(lengths)} lengths were announced for {batch} batch rows")
        if self.policy.budget is not None:
            self.policy.budget.check(self.policy.protected, length=None if lengths is None else min(lengths))
        self.lengths = lengths or self.lengths

    @contextmanager
    def reading_until(self, ends: tuple[int, ...]) -> Iterator[None]:
        """Compute budgets inside for these lengths; the lengths of an outer call take precedence."""
        outer, self.reading_to = self.reading_to, self.reading_to or ends
        try:
            yield
        finally:
            self.reading_to = outer

    def pin(self, span: Span) -> None:
        """Protect a span from eviction, in every layer and batch row.

        Raises:
            BudgetError: Sink, window and pins together exceed a budget in tokens.
        """
        pins = (*self.pins, span)
        if (budget := self.policy.budget) is not None:
            ends = self.policy.protected_ends(int(budget.amount) if budget.kind == "tokens" else 0)
            budget.check(sum(ends) + sum(map(len, pins)))
        self.pins = pins

    # One forward.

    def check_input(
        self,
        ids: Tensor | None,
        batch: int,
        positions: Tensor | None,
        valid: Bool[Tensor, "batch new"] | None,
        *,
        check: bool = True,
    ) -> None:
        """Refuse an input that does not continue where the cache ends.

        Args:
            ids: Token ids, or None if the decoder gets embeddings.
            batch: Number of batch rows.
            positions: ``batch new`` positions, or None if the model counts them itself.
            valid: False for pads, or None if there are none.
            check: Whether positions count tokens (image positions do not).

        Raises:
            CacheError: Another batch size, positions that do not begin at ``seen``, or a previous forward that failed.
        """
        self.check_whole()
        self.history.check(ids)
        if self.seen and batch != len(self.seen):
            raise CacheError(
                f"the cache holds {len(self.seen)} batch rows, but {batch} were fed; "
                "repeat its rows first with cache.batch_repeat_interleave(n)"
            )
        self.seen = self.seen or (0,) * batch
        if check:
            check_positions(self.seen, positions, valid)

    def must_settle(self, new: int) -> bool:
        """Tell whether to settle before a forward of ``new`` tokens.

        Raises:
            PolicyError: The policy must first run forwards of its own, which only ``vestige.prefill`` allows.
        """
        if not self.schedule.reading and new > self.schedule.chunk:
            self.prepared = False  # no prefill reads this text, so the policy cannot prepare for it
        if not (self.policy.evicts and self.schedule.is_due(new, self.policy.every)):
            return False
        if isinstance(self.policy, NeedsReplay) and not self.prepared:
            raise PolicyError(
                f"policy {type(self.policy).__name__} runs forwards of its own after reading; "
                "read the prompt with vestige.prefill(model, ids, cache) before generate"
            )
        return True

    def begin(self, ids: Tensor | None, batch: int, new: int, valid: Bool[Tensor, "batch new"] | None) -> None:
        """Begin a forward of ``new`` tokens per batch row, pads included: count them and record their ids."""
        device = self.layout.device if ids is None else ids.device
        real = torch.ones(batch, new, dtype=torch.bool, device=device) if valid is None else valid.to(device)
        number = self.step.number + 1 if self.step else 1
        self.step = ForwardPass.of(number, self.seen, real, padded=valid is not None)
        self.seen = tuple(s + n for s, n in zip(self.seen, self.step.fed, strict=True))
        self.schedule.count(new)
        self.history.add(ids, real)

    def take_step(self, layer: EvictableLayer) -> ForwardPass:
        """Return the current forward to a layer that is about to store its pairs.

        Raises:
            CacheError: No forward has begun: the model is not attached.
        """
        if self.step is None or self.step.number <= layer.step_number:
            raise CacheError(
                "this model is not attached, so the cache cannot see what it is fed; "
                "run it inside `with vestige.attach(model):`"
            )
        return self.step

    def annotate(self, layer_idx: int, hidden: Tensor | None, keys: Tensor, values: Tensor) -> Mapping[str, Tensor]:
        """Return the side arrays that policies store with new pairs."""
        if not self.recording.writers:
            return {}
        started = time.perf_counter()
        new = NewPairs(
            model=self.layout.model,
            layer_idx=layer_idx,
            hidden=hidden,
            keys=keys,
            values=values,
            output=self.layout.output(layer_idx) if "output" in self.recording.needs else None,
        )
        arrays = self.recording.annotate(new)
        self.annotate_s += time.perf_counter() - started
        return arrays

    def check_whole(self) -> None:
        """Raise a CacheError if the last forward failed before all layers stored its pairs."""
        stored = {layer.step_number for layer in self.storage}
        if len(stored) > 1 or (self.step is not None and stored != {self.step.number}):
            raise CacheError(
                "the last forward on this cache died midway, so its layers disagree; go back to a fork or a new cache"
            )

    # Changes of the sequence; the caller changes the layers.

    @contextmanager
    def rolled_back(self, watchers: tuple[Callable[[RowView], None], ...]) -> Iterator[None]:
        """Restore the bookkeeping at the end; inside, only these watchers observe queries, and no settle is due."""
        before = {name: getattr(self, name) for name in ("step", "seen", "recording", "history", "schedule")}
        self.recording = replace(self.recording, ring_sizes={}, watchers=watchers, layer_watchers=())
        self.history = self.history.copy()
        self.schedule = replace(self.schedule, reading=True)
        try:
            yield
        finally:
            vars(self).update(before)

    def crop(self, tokens: int) -> None:
        """Remove the last ``tokens`` tokens, pads included."""
        cropped = self.history.crop(-tokens)
        self.seen = tuple(s - n for s, n in zip(self.seen, cropped, strict=True))
        self.absorbed.crop(self.seen)
        end = max(self.seen)
        self.erased = tuple(Span(span.start, min(span.end, end)) for span in self.erased if span.start < end)
        self.schedule.take_back(tokens)

    def skip(self, ids: Int[Tensor, "batch new"], real: Bool[Tensor, "batch new"]) -> None:
        """Count tokens that the model does not read: record their ids; no pairs are stored, positions have a gap."""
        self.history.add(ids, real)
        self.seen = tuple(s + int(n) for s, n in zip(self.seen or (0,) * len(ids), real.sum(1), strict=True))

    def remove(self, remap: PositionMap) -> None:
        """Remove spans from the sequence; later tokens move up."""
        positions = torch.where(self.history.real, self.history.real.cumsum(1) - 1, -1)
        self.history.select(~within(positions, remap.spans))
        self.seen = tuple(map(remap.at, self.seen))
        self.absorbed.move(remap, len(self.seen))
        self.lengths = self.lengths and tuple(n - remap.removed for n in self.lengths)
        self.move_spans(remap, self)

    def move_spans(self, remap: PositionMap, source: "CacheState") -> None:
        """Copy pins and erased spans from another state, at their new positions."""
        self.pins, self.erased = remap.over(source.pins), remap.over(source.erased)

    def mark_erased(self, spans: Sequence[Span]) -> None:
        """Exclude spans, which keep their positions, from every later replay."""
        self.erased = merge_spans((*self.erased, *spans))

    def restart_schedule(self, prompt: int) -> None:
        """Restart the schedule with ``prompt`` tokens that are read and not settled yet."""
        self.schedule = Schedule(prompt=prompt)

    def reorder(self, batch_rows: Tensor) -> None:
        """Keep the given batch rows in the given order."""
        order = batch_rows.tolist()
        self.seen = tuple(self.seen[b] for b in order)
        self.lengths = self.lengths and tuple(self.lengths[b] for b in order)
        self.absorbed = self.absorbed.select(order)
        self.history.reorder(batch_rows)

    def join(self, states: Sequence["CacheState"]) -> None:
        """Copy the batch rows of several states into this one, in order."""
        self.seen = tuple(n for state in states for n in state.seen)
        self.history = TokenHistory.join([state.history for state in states])
        nothing = torch.empty(len(self.seen), 0, dtype=torch.int32, device=self.layout.device)
        self.step = ForwardPass(1, nothing, self.seen, padded=False, even=False)

    def fork(self, policy: Policy, memory: Memory | None) -> "CacheState":
        """Return an equal state with this policy and memory, which shares nothing that changes in place."""
        copy = CacheState(self.layout, policy, [policy], memory)
        for name in _FORKED:
            setattr(copy, name, getattr(self, name))
        copy.schedule = replace(self.schedule)
        copy.history = self.history.copy()
        copy.absorbed = self.absorbed.copy()
        return copy


_FORKED = ("lengths", "reading_to", "pins", "erased", "step", "seen", "prepared", "evict_s", "annotate_s")
"""Attributes that a fork copies by reference: values that are replaced, never changed in place."""


def expected_footprint(layout: ModelLayout, memory: Memory | None = None) -> Footprint:
    """Estimate the size of a batch row from the model's config, to refuse an impossible budget before reading."""
    sizes = [(layout.kv_heads(layer), layout.head_dim(layer)) for layer in layout.attentions]
    pair_bytes = sum(heads * (2 * head_dim * layout.model.dtype.itemsize + 4) for heads, head_dim in sizes)
    fixed_bytes = 0 if memory is None else sum(heads * memory.state_bytes(dim, dim) for heads, dim in sizes)
    return Footprint(sum(heads for heads, _ in sizes), pair_bytes, fixed_bytes)
