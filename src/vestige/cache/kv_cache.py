"""The cache that ``model.generate`` is handed: it decides when room is made, asks the policy, and keeps the books."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from vestige.budget import UNLIMITED, Budget, Footprint
from vestige.cache import evict
from vestige.cache.forward_pass import ForwardPass
from vestige.cache.layer import RaggedLayer
from vestige.cache.other_layers import copy_layer, tensors_of
from vestige.cache.recording import RecordingSpec
from vestige.cache.report import LayerReport, Report
from vestige.cache.schedule import Schedule
from vestige.cache.token_history import TokenHistory, check_positions
from vestige.errors import CacheError, InputError, PolicyError
from vestige.memory.base import AbsorbedRanges, ForgetResult, Memory
from vestige.models.layout import ModelLayout, check
from vestige.models.rope import Rope
from vestige.policies.base import NeedsReplay, NewPairs, Policy
from vestige.policies.observation import Phase, RowView
from vestige.spans import Span


class KVCache(Cache):
    """A KV cache that stays within its policy's budget, with memory really freed.

    Every full-attention layer becomes a :class:`~vestige.cache.layer.RaggedLayer`; sliding, linear and KV-shared layers
    are left as transformers makes them. The model must be attached (``with vestige.attach(model):``).

    Args:
        model: The model that will fill the cache.
        policy: What to keep; its budget says how much. ``policies.Full()`` keeps everything.
        memory: What remains of evicted pairs, for every later query to read; None forgets them.
        observers: Policies that a :meth:`fork` may change to: what they need is recorded too, so that one reading
            serves many policies.

    Raises:
        ModelError: The model cannot work with an evicting cache; the message says why.
        BudgetError: The budget is below the protected pairs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        memory: Memory | None = None,
        observers: Sequence[Policy] = (),
    ) -> None:
        self._start(check(model), policy, [policy, *observers], memory)
        if policy.budget is not None:
            policy.budget.check(
                policy.protected, footprint=self.anatomy.expected_footprint(model.dtype, self.bound_memory)
            )

    def _start(self, anatomy: ModelLayout, policy: Policy, observers: Sequence[Policy], memory: Memory | None) -> None:
        self.anatomy = anatomy
        layers = DynamicCache(config=anatomy.config).layers
        for idx in anatomy.evictable:
            layers[idx] = RaggedLayer(self, idx)
        super().__init__(layers=layers)
        self.policy, self.memory, self.absorbed = policy, memory, AbsorbedRanges()
        self.bound_memory = memory and memory.bind(anatomy.model)  # with what it needs for the model at hand
        self.recording = RecordingSpec.of(observers)
        self.recording.require_of(anatomy)
        self.schedule = Schedule()
        self.lengths: tuple[int, ...] | None = None
        """The announced full length of each batch row, which a fraction budget is a fraction of."""
        self.reading_to: tuple[int, ...] | None = None
        """Where the prefill under way will end, per batch row: a fraction of what is not announced looks ahead."""
        self.pins: tuple[Span, ...] = ()
        self.erased: tuple[Span, ...] = ()
        """What was erased and kept its positions: every replay of the ids leaves it out."""
        self.step: ForwardPass | None = None
        self.seen: tuple[int, ...] = ()
        self.peak_kv_bytes = 0
        self.evict_s = 0.0
        self.annotate_s = 0.0
        self.prepared = False
        self.fed = TokenHistory()
        self.outer_input_ids: Tensor | None = None
        """What the outer model was given, for decoders that are given embeddings."""

    # What people call.

    @property
    def evictable(self) -> list[RaggedLayer]:
        """The layers whose pairs can be evicted."""
        return [layer for layer in self.layers if isinstance(layer, RaggedLayer)]

    @property
    def ragged(self) -> bool:
        """Whether anything was evicted yet."""
        return any(layer.ragged for layer in self.evictable)

    @property
    def held(self) -> int:
        """Pairs stored over evictable layers and rows; pads do not count."""
        return sum(sum(layer.live_lengths()) for layer in self.evictable)

    @property
    def ids(self) -> Int[Tensor, "batch padded_seen"]:
        """The token ids fed so far, pads as they came; -1 where a model was fed embeddings."""
        return self.fed.ids

    @property
    def real(self) -> Bool[Tensor, "batch padded_seen"]:
        """False where a pad was fed."""
        return self.fed.real

    @property
    def padded(self) -> bool:
        """Whether any batch row was ever fed pads."""
        return any(layer.padded_seen != n for layer in self.evictable[:1] for n in self.seen)

    @property
    def growth_slots(self) -> int:
        """Free slots that each row gets when tokens come: room until the next settle. A cache at rest has none."""
        return self.policy.every

    @property
    def rope(self) -> Rope | None:
        """How the layers turn keys and queries, if that is recorded or looked at."""
        return self.anatomy.rope() if self.recording.turns else None

    def pin(self, span: Span) -> None:
        """Protect the pairs of a span, in every layer and batch row, from eviction.

        Raises:
            BudgetError: Sink, window and pins together exceed a budget in tokens.
        """
        pins = (*self.pins, span)
        pinned = sum(len(one) for one in pins)
        if (budget := self.policy.budget) is not None:
            ends = self.policy.protected_ends(int(budget.amount) if budget.kind == "tokens" else 0)
            budget.check(sum(ends) + pinned)
        self.pins = pins

    def settle(self, *, reading: bool = False, coming: int = 0) -> None:
        """Bring every batch row down to its limit: total, or between chunks total x the policy's reading slack.

        Does nothing where held is within the limit: then no bit of the cache changes. Waits for the next tokens where
        the policy looks at the latest queries and all of them were taken back.

        Args:
            reading: Between chunks.
            coming: Tokens about to be fed, so that room for them is made in the same copy; 0 leaves no free slots.

        Raises:
            PolicyError: A score is NaN, or what the policy needs was not recorded. The cache is unchanged.
            BudgetError: The protected pairs do not fit. The cache is unchanged.
        """
        if not self.policy.evicts or not self.seen or (reading and math.isinf(self.policy.reading_slack)):
            return
        if any(layer.is_missing(self.policy.ring_sizes) for layer in self.evictable):
            return
        self._check_whole()
        started = time.perf_counter()
        phase = Phase.PREFILL if self.schedule.prompt or not self.schedule.generated else Phase.DECODE
        room = self.pair_limits(reading=reading)
        noted = None if self.memory is None else self.absorbed
        gone = evict.evict(self.evictable, self.policy, room, self.seen, self.pins, phase, coming, noted)
        if not reading:
            evict.renew(self.evictable, self.policy, gone)
        if gone:
            self.evict_s += time.perf_counter() - started
        self.schedule.settled()

    def pair_limits(self, *, reading: bool = False) -> list[int]:
        """Return the average pairs per row that each batch row may hold after a settle.

        Args:
            reading: Between chunks: the policy's reading slack applies.
        """
        budget, factor = self.policy.budget, self.policy.reading_slack if reading else 1.0
        if budget is None:
            return [UNLIMITED] * len(self.seen)
        footprint, protected = self.footprint(), self.policy.protected
        ends = self.reading_to or self.seen
        pairs = [
            budget.pairs(seen=end, length=length, protected=protected, footprint=footprint)
            for end, length in zip(ends, self.lengths or (None,) * len(ends), strict=True)
        ]
        return [Budget.slacken(n, factor) for n in pairs]

    def footprint(self) -> Footprint:
        """Return what one batch row weighs."""
        layers, batch = self.evictable, max(len(self.seen), 1)
        pair_bytes = sum(layer.pair_bytes * layer.kv_heads for layer in layers)
        return Footprint(
            rows=sum(layer.kv_heads for layer in layers),
            pair_bytes=pair_bytes * batch,  # a budget in bytes is the whole cache's: batch rows share it evenly
            fixed_bytes=sum(layer.fixed_bytes for layer in layers) + pair_bytes * batch * self.growth_slots,
        )

    def forget(self, span: Span) -> ForgetResult:
        """Return how far the memory is free of a span, in every batch row. Nothing is changed.

        ``EXACT`` if no pair of the span was ever absorbed, or all were taken out again, else ``IMPOSSIBLE``: see
        :mod:`vestige.erasers.forget` for what can be done then, short of reading the ids anew without the span."""
        return ForgetResult.IMPOSSIBLE if self.absorbed.overlaps(span) else ForgetResult.EXACT

    def fork(self, policy: Policy | None = None, *, memory: Memory | Literal["same"] | None = "same") -> "KVCache":
        """Return an equal cache that shares no storage, with another policy or memory if one is given.

        A fork with another policy forgets the queries that this policy does not look at, so its bytes are its own.

        Raises:
            PolicyError: The policy needs something this cache did not record (see ``observers``), or the memory is
                another one and pairs were evicted already.
        """
        changed, policy = policy is not None, self.policy if policy is None else policy
        memory = self.memory if memory == "same" else memory
        self.recording.check(policy)
        if self.ragged and memory != self.memory:
            raise PolicyError(f"pairs were evicted already, so the memory stays {self.memory}; {memory} came too late")
        twin = object.__new__(KVCache)
        twin._start(self.anatomy, policy, [policy], memory)
        for name in _SHARED:
            setattr(twin, name, getattr(self, name))
        twin.schedule = Schedule(**vars(self.schedule))
        twin.fed, twin.absorbed = self.fed.copy(), self.absorbed.copy()
        twin.layers = [
            layer.copy_to(twin) if isinstance(layer, RaggedLayer) else copy_layer(layer) for layer in self.layers
        ]
        if changed:
            for layer in twin.evictable:
                layer.drop_unused(policy.annotations, policy.ring_sizes)
        else:
            twin.recording = self.recording
        twin.peak_kv_bytes = twin.nbytes
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        return self.fork()

    def empty_copy(self) -> "KVCache":
        """Return a cache like this one that has read nothing."""
        twin = object.__new__(KVCache)
        twin._start(self.anatomy, self.policy, [self.policy], self.memory)
        twin.recording = self.recording
        return twin

    def replace_with(self, other: "KVCache") -> None:
        """Become another cache of the same model, which is not to be used any more."""
        peak = max(self.peak_kv_bytes, self.nbytes + other.peak_kv_bytes)
        vars(self).update(vars(other))
        for layer in self.evictable:
            layer.belong_to(self)
        self.peak_kv_bytes = peak

    def save(self, path: str | Path) -> None:
        """Write the cache to a folder, whole or not at all: see :mod:`~vestige.cache.serialization`."""
        from vestige.cache import serialization

        serialization.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> "KVCache":
        """Read a cache that was saved for the same model; runs no code from the files.

        Raises:
            CacheFileError: Missing, damaged, or made for another model.
        """
        from vestige.cache import serialization

        return serialization.load(Path(path), model)

    def report(self) -> Report:
        """Return what the cache holds and costs."""
        layers, tokens = self.evictable, sum(self.seen)
        per_layer = [layer.live_lengths() for layer in layers]
        budget = (
            None if self.policy.budget is None or not self.seen else sum(self.pair_limits()) * self.footprint().rows
        )
        return Report(
            seen=self.seen,
            held=sum(map(sum, per_layer)),
            full=tokens * self.footprint().rows,
            kv_bytes=self.nbytes,
            peak_kv_bytes=max(self.peak_kv_bytes, self.nbytes),
            full_kv_bytes=sum(layer.dynamic_bytes for layer in layers),
            other_kv_bytes=sum(
                t.nbytes for layer in self.layers if not isinstance(layer, RaggedLayer) for t in tensors_of(layer)
            ),
            memory_bytes=sum(layer.memory_bytes for layer in layers),
            evict_s=self.evict_s,
            annotate_s=self.annotate_s,
            budget_total=budget,
            policy=type(self.policy).__name__,
            share=self.policy.share,
            layers=tuple(
                LayerReport(layer.layer_idx, tuple(rows), tokens // max(len(self.seen), 1))
                for layer, rows in zip(layers, per_layer, strict=True)
            ),
        )

    # What the attached model calls.

    def begin(
        self,
        ids: Tensor | None,
        new: int,
        batch: int,
        positions: Tensor | None,
        valid: Bool[Tensor, "batch new"] | None,
        *,
        check: bool = True,
    ) -> None:
        """Open a forward: settle if one is due, check that the input goes on where the cache ends, record the ids.

        Args:
            ids: Token ids, or None where the decoder was given embeddings.
            new: Tokens per batch row, pads included.
            batch: Batch rows.
            positions: ``batch new`` positions, or None where the model counts them itself.
            valid: False for pads, or None if there are none.
            check: Whether positions count tokens (those of images do not).

        Raises:
            CacheError: Another batch size, positions that do not begin at seen, or a forward that died midway.
        """
        self._check_whole()
        self.fed.check(ids)
        if self.seen and batch != len(self.seen):
            raise CacheError(
                f"the cache holds {len(self.seen)} batch rows, but {batch} were fed; "
                "repeat its rows first with cache.batch_repeat_interleave(n)"
            )
        self.seen = self.seen or (0,) * batch
        if check:
            check_positions(self.seen, positions, valid)
        if not self.schedule.reading and new > self.schedule.chunk:
            self.prepared = False  # a text that no prefill reads is not prepared for
        if self.policy.evicts and self.schedule.due(new, self.policy.every):
            if isinstance(self.policy, NeedsReplay) and not self.prepared:
                raise PolicyError(
                    f"policy {type(self.policy).__name__} runs forwards of its own after reading; "
                    "read the prompt with vestige.prefill(model, ids, cache) before generate"
                )
            self.settle(coming=new)
        device = self.anatomy.device if ids is None else ids.device
        real = torch.ones(batch, new, dtype=torch.bool, device=device) if valid is None else valid.to(device)
        number = self.step.number + 1 if self.step else 1
        self.step = ForwardPass.of(number, self.seen, real, padded=valid is not None)
        self.seen = tuple(s + n for s, n in zip(self.seen, self.step.fed, strict=True))
        self.schedule.fed(new)
        self.fed.add(ids, real)

    def take_step(self, layer: RaggedLayer) -> ForwardPass:
        """Return the forward under way to a layer that is about to store its pairs.

        Raises:
            CacheError: No forward was begun: the model is not attached.
        """
        if self.step is None or self.step.number <= layer.step_number:
            raise CacheError(
                "this model is not attached, so the cache cannot see what it is fed; "
                "run it inside `with vestige.attach(model):`"
            )
        return self.step

    def annotate(self, layer_idx: int, hidden: Tensor | None, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Return the side arrays that policies store beside new pairs."""
        if not self.recording.writers:
            return {}
        started = time.perf_counter()
        written = NewPairs(
            model=self.anatomy.model,
            layer_idx=layer_idx,
            hidden=hidden,
            keys=keys,
            values=values,
            output=self.anatomy.output(layer_idx) if "output" in self.recording.needs else None,
        )
        found = self.recording.annotate(written)
        self.annotate_s += time.perf_counter() - started
        return found

    @contextmanager
    def rolled_back(self, watch: Callable[[RowView], None] | None = None) -> Iterator[None]:
        """Take back at the end whatever is fed inside: only ``watch`` looks at it, and no settle happens.

        Args:
            watch: Shown each row as the queries fed attend to it; may write to the policy's own side arrays.
        """
        books = {name: getattr(self, name) for name in ("step", "seen", "recording", "fed", "schedule")}
        others = {i: copy_layer(layer) for i, layer in enumerate(self.layers) if not isinstance(layer, RaggedLayer)}
        padded = self.evictable[0].padded_seen
        watchers = () if watch is None else (watch,)
        self.recording = replace(self.recording, ring_sizes={}, watchers=watchers, layer_watchers=())
        self.fed = self.fed.copy()
        self.schedule = replace(self.schedule, reading=True)
        try:
            yield
        finally:
            for name, value in books.items():
                setattr(self, name, value)
            for i, layer in others.items():
                self.layers[i] = layer
            self._crop_layers(padded)

    def note_peak(self, extra: int = 0) -> None:
        """Remember the largest bytes so far; ``extra`` are those of a copy under construction."""
        self.peak_kv_bytes = max(self.peak_kv_bytes, self.nbytes + extra)

    @property
    def nbytes(self) -> int:
        """Bytes of live storage of the evictable layers."""
        return sum(layer.nbytes for layer in self.evictable)

    # The verbs of generate.

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: the cache grows as needed and is held down by settles."""
        return -1

    def reset(self) -> None:
        """Forget everything that was read; policy, memory (emptied) and observers stay."""
        self.replace_with(self.empty_copy())
        self.peak_kv_bytes = 0

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the last ``-tokens_to_remove`` tokens (pads count as tokens), of a forward that died midway, too.

        What was evicted is not restored, and a memory keeps what it absorbed of them.

        Raises:
            InputError: A positive number, or more tokens than were seen. The cache is unchanged.
            CacheError: The last forward died midway and would stay in part, or in layers of other kinds.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.16 counts candidates in a tensor
        padded = self.fed.ids.shape[1]
        if tokens_to_remove > 0 or -tokens_to_remove > padded:
            raise InputError(f"crop takes a number from {-padded} to 0: the tokens to remove; got {tokens_to_remove}")
        left = padded + tokens_to_remove
        others: list[Any] = [layer for layer in self.layers if not isinstance(layer, RaggedLayer)]
        if others or any(layer.padded_seen < left for layer in self.evictable):
            self._check_whole()
        for layer in others:
            layer.crop(tokens_to_remove)
        if tokens_to_remove == 0:
            return
        before, gone = self.seen, self.fed.crop(tokens_to_remove)
        self.seen = tuple(s - g for s, g in zip(before, gone, strict=True))
        self.absorbed.crop(self.seen)
        self.erased = tuple(Span(s.start, min(s.end, max(self.seen))) for s in self.erased if s.start < max(self.seen))
        for evictable in self.evictable:
            evictable.crop_records(before, self.seen)
        self._crop_layers(left)
        self.schedule.taken_back(-tokens_to_remove)

    def _crop_layers(self, left: int) -> None:
        """Take back all but the first ``left`` tokens of each layer, however many it stored."""
        for layer in self.evictable:
            layer.crop(left - layer.padded_seen)
            layer.step_number = 0 if self.step is None else self.step.number

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace batch row b by batch row ``beam_idx[b]``, as beam search asks."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._reorder_books(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row in place."""
        super().batch_repeat_interleave(repeats)
        self._reorder_books(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given batch rows in the given order."""
        super().batch_select_indices(indices)
        self._reorder_books(torch.arange(len(self.seen))[indices.cpu()])

    def _reorder_books(self, rows: Tensor) -> None:
        order = rows.tolist()
        self.seen = tuple(self.seen[b] for b in order)
        self.lengths = self.lengths and tuple(self.lengths[b] for b in order)
        self.absorbed = self.absorbed.select(order)
        self.fed.reorder(rows)

    # Books.

    def _check_whole(self) -> None:
        """Raise if the last forward died before all layers had stored its pairs."""
        stored = {layer.step_number for layer in self.evictable}
        if len(stored) > 1 or (self.step is not None and stored != {self.step.number}):
            raise CacheError(
                "the last forward on this cache died midway, so its layers disagree; go back to a fork or a new cache"
            )


_SHARED = ("lengths", "reading_to", "pins", "erased", "step", "seen", "prepared", "evict_s", "annotate_s")
"""What a fork takes over as it is: values that are replaced, never changed in place."""
